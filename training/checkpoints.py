"""Checkpoints of a training run, folders ``checkpoint-{step}``: everything that the next step depends on.

There are no states of random generators to keep: all randomness is a function of the seed and the step.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..utils.atomic_write import atomic_folder, settle_folder
from ..utils.file_digest import file_digest


STATE_NAME = "training_state.json"
_WEIGHTS, _AVERAGED_WEIGHTS, _OPTIMIZER = "model.safetensors", "averaged_weights.safetensors", "optimizer.bin"
_CONFIG, _SCHEDULER_CONFIG, _TIMESTEP_SAMPLER = "unet_config.json", "scheduler_config.json", "timestep_sampler.npz"
_FORMAT_VERSION = 2


class DamagedCheckpointError(ValueError):
    """A checkpoint's folder is not as it was written."""


@dataclass
class Progress:
    """Where a run stood. What a converted checkpoint cannot know is None."""

    step: int  # optimizer steps taken
    epoch: float
    images_seen: int | None = None  # place in the endless order of images
    num_processes: int | None = None  # ranks that shared a batch
    images_per_step: int | None = None  # over all ranks and accumulated passes
    dataset: str | None = None  # fingerprint of the images
    began_from: str | None = None  # a checkpoint, a pretrained model, or nothing
    lr_scheduler_step: int | None = None  # fewer than steps where fp16 skipped some
    gradient_scaler: dict[str, Any] | None = None  # of fp16
    metrics: list[list[float]] | None = None  # sums since the last entry of the log, a row for each rank


@dataclass
class Checkpoint:
    """What a checkpoint folder holds."""

    folder: Path
    progress: Progress
    options: dict[str, Any]  # by name; a converted checkpoint has those that the original's training implies
    unet_config: dict[str, Any]
    scheduler_config: dict[str, Any]  # of the scheduler that holds the noise schedule
    weights: dict[str, torch.Tensor]
    averaged_weights: tuple[list[torch.Tensor], int] | None  # EMA of the parameters, and the number of its updates
    optimizer: dict[str, Any]
    timestep_sampler: dict[str, np.ndarray]  # state of the objective, if it has any


def save_checkpoint(
    folder: str | Path,
    *,
    unet: ModelMixin,
    scheduler: SchedulerMixin,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    options: Mapping[str, Any],
    averaged_weights: tuple[list[torch.Tensor], int] | None = None,
    timestep_sampler: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes a checkpoint atomically; the options must be JSON values."""
    with write_errors(folder, "; the checkpoints before it are as they were"), atomic_folder(folder) as writing:
        save_file({name: tensor.contiguous() for name, tensor in unet.state_dict().items()}, writing / _WEIGHTS)
        torch.save(optimizer.state_dict(), writing / _OPTIMIZER)
        if averaged_weights is not None:
            parameters, updates = averaged_weights
            tensors = {f"{index:05d}": tensor.contiguous() for index, tensor in enumerate(parameters)}
            save_file(tensors, writing / _AVERAGED_WEIGHTS, {"updates": str(updates)})
        if timestep_sampler:
            np.savez(writing / _TIMESTEP_SAMPLER, **cast(dict[str, Any], timestep_sampler))
        for name, configured in ((_CONFIG, unet), (_SCHEDULER_CONFIG, scheduler)):
            config = {key: value for key, value in configured.config.items() if not key.startswith("_")}
            config["_class_name"] = type(configured).__name__
            (writing / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        written = sorted(writing.iterdir())
        files = {file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)} for file in written}
        state = {"format_version": _FORMAT_VERSION, **dataclasses.asdict(progress)}
        state |= {"options": dict(options), "files": files}
        state["sha256"] = _sha256_of_state(state)
        (writing / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def write_errors(path: str | Path, remark: str = "") -> Iterator[None]:
    """Errors of writing, also those of torch and safetensors, become an OSError that names the path."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"could not write {path} ({reason}){remark}") from error


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads a checkpoint, on the CPU; `DamagedCheckpointError` names the file that is not as it was written."""
    folder = Path(folder)
    try:
        state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        version, digest = state["format_version"], state.pop("sha256", None)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{folder} is not a whole checkpoint: no readable {STATE_NAME}") from error
    is_whole = digest == _sha256_of_state(state)
    # the first version had no digest
    if version != _FORMAT_VERSION and (is_whole or digest is None):
        raise ValueError(f"{folder} has format_version {version}, but this version reads {_FORMAT_VERSION}")
    files: dict[str, Any] = state["files"] if is_whole else {}
    for name in (_CONFIG, _SCHEDULER_CONFIG, _WEIGHTS, _OPTIMIZER, *files):
        file = folder / name
        if name not in files or not file.is_file() or file_digest(file) != files[name]["sha256"]:
            changed = name if is_whole else STATE_NAME
            raise DamagedCheckpointError(f"{folder} is not a whole checkpoint: {changed} is missing or has changed")
    averaged_weights, timestep_sampler = None, dict[str, np.ndarray]()
    if _AVERAGED_WEIGHTS in state["files"]:
        with safe_open(folder / _AVERAGED_WEIGHTS, "pt") as content:
            tensors = [content.get_tensor(name) for name in sorted(content.keys())]
            averaged_weights = tensors, int(content.metadata()["updates"])
    if _TIMESTEP_SAMPLER in state["files"]:
        with np.load(folder / _TIMESTEP_SAMPLER, allow_pickle=False) as arrays:
            timestep_sampler = dict(arrays)
    return Checkpoint(
        folder=folder,
        progress=Progress(**{field.name: state.get(field.name) for field in dataclasses.fields(Progress)}),
        options=state["options"],
        unet_config=json.loads((folder / _CONFIG).read_text(encoding="utf-8")),
        scheduler_config=json.loads((folder / _SCHEDULER_CONFIG).read_text(encoding="utf-8")),
        weights=load_file(folder / _WEIGHTS),
        averaged_weights=averaged_weights,
        optimizer=torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True),
        timestep_sampler=timestep_sampler,
    )


def find_checkpoints(folder: str | Path) -> list[Path]:
    """The folders of checkpoints in a folder, the latest last; their contents have not been checked."""
    numbers = {path: path.name.removeprefix("checkpoint-") for path in Path(folder).glob("checkpoint-*")}
    found = [path for path, number in numbers.items() if number.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(numbers[path]))


def remove_old_checkpoints(folder: str | Path, limit: int) -> None:
    """Removes all but the latest ``limit`` checkpoints, and what killed processes left half written."""
    settle_folder(folder)
    for old in find_checkpoints(folder)[:-limit]:
        # renamed first, so that it is never half there under its name
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.writing")))


def _sha256_of_state(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
