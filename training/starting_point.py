"""Where a run begins: at a checkpoint of its own, at somebody's, at a pretrained pipeline, or at nothing."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..pipelines.loading import load_pipeline
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..utils.distributed import on_every_process, on_main_process
from .checkpoints import Checkpoint, DamagedCheckpointError, find_checkpoints, load_checkpoint
from .options import TrainOptions


CHECKPOINTS_NAME = "checkpoints"

# What a run trains where neither the options nor the weights that it begins with say it.
_DEFAULTS = {"prediction_type": "v_prediction", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


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
    name = options.pretrained_model_name_or_path
    if name is None:
        return StartingPoint()
    pretrained = on_every_process(
        accelerator,
        lambda: load_pipeline(name, dtype=torch.float32),
        # one process of each machine downloads what is not in its cache
        in_turn=True,
    )
    return StartingPoint(pretrained=pretrained, began_from=name)


def resolve_options(options: TrainOptions, start: StartingPoint) -> TrainOptions:
    """The options with what the starting point says where they are silent."""
    known: dict[str, Any] = dict(_DEFAULTS)
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
