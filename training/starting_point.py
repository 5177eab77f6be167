"""Where a run begins: at a checkpoint of its own, at somebody's, at a pretrained pipeline, or at nothing."""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object

from ..command_line import ElsewhereError
from ..pipelines.loading import load_pipeline
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from .checkpoints import Checkpoint, DamagedCheckpointError, find_checkpoints, load_checkpoint
from .options import TrainOptions


CHECKPOINTS_NAME = "checkpoints"

# What a run trains where neither the options nor the weights that it begins with say it.
_DEFAULTS = {"prediction_type": "v_prediction", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}

Result = TypeVar("Result")


@dataclass
class StartingPoint:
    """Where a run begins.

    Attributes:
        checkpoint: A state to go on from, or None.
        pretrained: A pipeline to fine-tune, or None.
        began_from: What the whole run began from, for the record: a checkpoint's folder, a pipeline, or None.
        damaged: Checkpoints that were passed over because they are not whole, and why.
    """

    checkpoint: Checkpoint | None = None
    pretrained: ClassConditionalPipeline | None = None
    began_from: str | None = None
    damaged: list[tuple[Path, str]] = field(default_factory=list)


def find_starting_point(options: TrainOptions, accelerator: Accelerator) -> StartingPoint:
    """Finds where the run begins, the same in every process.

    The main process reads a checkpoint and gives it to the others, so that only its machine needs to have it.

    Raises:
        ValueError: If a checkpoint that was asked for cannot be gone on from, or none of those of the run is whole.
    """
    checkpoint, began_from, damaged = on_main_process(accelerator, lambda: _find_checkpoint(options))
    if checkpoint is not None:
        return StartingPoint(checkpoint=checkpoint, began_from=began_from, damaged=damaged)
    if options.pretrained_model_name_or_path is None:
        return StartingPoint()
    pretrained = on_every_process(
        accelerator,
        lambda: load_pipeline(options.pretrained_model_name_or_path, dtype=torch.float32),
        # one process of each machine downloads what is not in its cache
        in_turn=True,
    )
    return StartingPoint(pretrained=pretrained, began_from=options.pretrained_model_name_or_path)


def resolve_options(options: TrainOptions, start: StartingPoint) -> TrainOptions:
    """The options with what the starting point says where they are silent."""
    known = dict(_DEFAULTS)
    if start.checkpoint is not None:
        known |= {name: start.checkpoint.options[name] for name in known if name in start.checkpoint.options}
    elif start.pretrained is not None:
        config = start.pretrained.scheduler.config
        known |= {name: config[name] for name in ("prediction_type", "num_train_timesteps")}
        # the schedule is the pipeline's own, whatever it is called
        known["beta_schedule"] = None
    silent = {name: value for name, value in known.items() if getattr(options, name) is None}
    return dataclasses.replace(options, **silent)


def _find_checkpoint(options: TrainOptions) -> tuple[Checkpoint | None, str | None, list[tuple[Path, str]]]:
    """The checkpoint to go on from, what its run began from, and the damaged ones that were passed over."""
    wanted = options.resume_from_checkpoint
    own_folder = Path(options.output_dir) / CHECKPOINTS_NAME
    own = find_checkpoints(own_folder)
    if wanted == "never":
        _require_no_later(own, -1, "resume_from_checkpoint is never")
        return None, None, []
    if wanted != "latest" and (Path(wanted).resolve().parent == own_folder.resolve() or not own):
        if not Path(wanted).is_dir():
            raise ValueError(
                f"resume_from_checkpoint is {wanted!r}, but there is no such folder: give a checkpoint, or latest, or"
                " never"
            )
        checkpoint = load_checkpoint(wanted)
        if own:
            _require_no_later(own, checkpoint.progress.step, f"resume_from_checkpoint is {wanted}")
            return checkpoint, checkpoint.progress.began_from, []
        return checkpoint, wanted, []

    damaged = []
    for folder in reversed(own):
        try:
            checkpoint = load_checkpoint(folder)
        except DamagedCheckpointError as error:
            damaged.append((folder, str(error)))
            continue
        began_from = checkpoint.progress.began_from
        asked = options.pretrained_model_name_or_path if wanted == "latest" else wanted
        if asked is not None and began_from != asked:
            raise ValueError(
                f"{own_folder} has checkpoints of a run that began from {began_from or 'random weights'}, not from"
                f" {asked}: give another output_dir"
            )
        return checkpoint, began_from, damaged
    if damaged:
        raise ValueError(
            f"none of the checkpoints in {own_folder} is whole ({damaged[0][1]}): move them away to begin anew"
        )
    return None, None, []


def _require_no_later(own: list[Path], step: int, reason: str) -> None:
    """Going back must not mix two runs in one folder, nor remove what one of them has."""
    later = [folder for folder in own if int(folder.name.removeprefix("checkpoint-")) > step]
    if later:
        raise ValueError(
            f"{reason}, but {later[-1]} is there already: move the later checkpoints away, or give another output_dir"
        )


def on_main_process(accelerator: Accelerator, find: Callable[[], Result]) -> Result:
    """What the main process finds, given to every process.

    Args:
        accelerator: Whose processes these are.
        find: Runs in the main process only. Its result may hold tensors; they come on the CPU.

    Raises:
        ValueError, OSError: What `find` raises in the main process; in the others `ElsewhereError`, so that it is said
            once.
    """
    if accelerator.num_processes == 1:
        return find()
    outcome: list[Any] = [None, None]
    tensors: list[torch.Tensor] = []
    own_error = None
    if accelerator.is_main_process:
        try:
            outcome[0] = _without_tensors(find(), tensors)
        except (ValueError, OSError) as error:
            # its text alone is sent: not every error can be
            own_error, outcome[1] = error, str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise own_error or ElsewhereError(outcome[1])
    shapes = [[(tuple(tensor.shape), tensor.dtype) for tensor in tensors]]
    broadcast_object_list(shapes)
    if not accelerator.is_main_process:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes[0]]
    # one after the other, so that a device never holds more than one of them
    tensors = [broadcast(tensor.to(accelerator.device)).cpu() for tensor in tensors]
    return _with_tensors(outcome[0], tensors)


def on_every_process(accelerator: Accelerator, find: Callable[[], Result], in_turn: bool = False) -> Result:
    """What each process finds; if one cannot, none goes on.

    Args:
        accelerator: Whose processes these are.
        find: Runs in every process.
        in_turn: The others of a machine begin when its first process is done.

    Raises:
        ValueError, OSError: What `find` raises in the main process, or a ValueError there that says what it raised in
            another one; in the others `ElsewhereError`, so that it is said once.
    """
    if accelerator.num_processes == 1:
        return find()
    found, own_error = None, None
    with accelerator.local_main_process_first() if in_turn else contextlib.nullcontext():
        try:
            found = find()
        except (ValueError, OSError) as error:
            own_error = error
    errors = gather_object([None if own_error is None else str(own_error)])
    failed = {number: error for number, error in enumerate(errors) if error is not None}
    if not failed:
        return found
    number, error = next(iter(failed.items()))
    if not accelerator.is_main_process:
        raise ElsewhereError(error)
    raise own_error or ValueError(f"process {number} of {accelerator.num_processes}: {error}")


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor in a structure that is sent without its tensors."""

    index: int


def _without_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    def take_out(tensor: torch.Tensor) -> _Place:
        tensors.append(tensor)
        return _Place(len(tensors) - 1)

    return _replace(value, torch.Tensor, take_out)


def _with_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    return _replace(value, _Place, lambda place: tensors[place.index])


def _replace(value: Any, kind: type, replacement: Callable[[Any], Any]) -> Any:
    """A copy of nested containers and dataclasses in which what is of a kind is replaced."""
    if isinstance(value, kind):
        return replacement(value)
    if isinstance(value, dict):
        return {key: _replace(entry, kind, replacement) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replace(entry, kind, replacement) for entry in value)
    if dataclasses.is_dataclass(value):
        entries = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        return type(value)(**{name: _replace(entry, kind, replacement) for name, entry in entries.items()})
    return value
