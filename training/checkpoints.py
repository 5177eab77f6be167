"""Checkpoints of a training run: everything that the next step depends on.

Data order, noise, timesteps and drop-out are functions of seed and step, so there are no states of random generators
to keep. A checkpoint is a folder ``checkpoint-{step}`` with the network, the averaged weights, the optimizer's
moments, the history of the importance sampler, and ``training_state.json``, which says where the run stood and with
what options. Weights and optimizer have the names that accelerate gives them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..whole_files import replacing_folder


STATE_NAME = "training_state.json"
_WEIGHTS, _AVERAGED_WEIGHTS, _OPTIMIZER = "model.safetensors", "averaged_weights.safetensors", "optimizer.bin"
_CONFIG, _TIMESTEP_SAMPLER = "unet_config.json", "timestep_sampler.npz"
_FORMAT_VERSION = 1


@dataclass
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        folder: Where it lies.
        step: Optimizer steps taken.
        epoch: Epochs gone through.
        options: Options of the run by name; a converted checkpoint has those that the original's training implies.
        unet_config: Options of the network.
        weights: The network's state dict.
        averaged_weights: The moving average of the parameters in their order, with the number of its updates, or None.
        optimizer: The state dict of the optimizer.
        timestep_sampler: The state of the timestep sampler.
    """

    folder: Path
    step: int
    epoch: float
    options: dict[str, Any]
    unet_config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    averaged_weights: tuple[list[torch.Tensor], int] | None
    optimizer: dict[str, Any]
    timestep_sampler: dict[str, np.ndarray]


def save_checkpoint(
    folder: str | Path,
    *,
    unet: ClassConditionalUNet2DModel,
    optimizer: torch.optim.Optimizer,
    step: int,
    epoch: float,
    options: Mapping[str, Any],
    averaged_weights: tuple[list[torch.Tensor], int] | None = None,
    timestep_sampler: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes a checkpoint; the folder appears whole or not at all.

    Args:
        folder: Where to, ``checkpoint-{step}`` in the ``checkpoints`` folder of the run.
        unet: The network.
        optimizer: Its optimizer, over ``unet.parameters()``.
        step: Optimizer steps taken.
        epoch: Epochs gone through.
        options: Options of the run by name, as JSON values.
        averaged_weights: The moving average of ``unet.parameters()`` and the number of its updates.
        timestep_sampler: State of the timestep sampler.
    """
    with replacing_folder(folder) as writing:
        save_file({name: tensor.contiguous() for name, tensor in unet.state_dict().items()}, writing / _WEIGHTS)
        torch.save(optimizer.state_dict(), writing / _OPTIMIZER)
        if averaged_weights is not None:
            parameters, updates = averaged_weights
            tensors = {f"{index:05d}": tensor.contiguous() for index, tensor in enumerate(parameters)}
            save_file(tensors, writing / _AVERAGED_WEIGHTS, metadata={"updates": str(updates)})
        if timestep_sampler:
            np.savez(writing / _TIMESTEP_SAMPLER, **timestep_sampler)
        config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
        _write_json(writing / _CONFIG, config)
        state = {"format_version": _FORMAT_VERSION, "step": step, "epoch": epoch, "options": dict(options)}
        _write_json(writing / STATE_NAME, state)


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads a checkpoint, on the CPU. No code of the files is run.

    Raises:
        ValueError: If the folder is not a whole checkpoint.
    """
    folder = Path(folder)
    for name in (STATE_NAME, _CONFIG, _WEIGHTS, _OPTIMIZER):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a checkpoint: there is no {name}")
    state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    if state.get("format_version") != _FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format_version {state.get('format_version')}, but this version reads {_FORMAT_VERSION}"
        )
    averaged_weights = None
    if (folder / _AVERAGED_WEIGHTS).is_file():
        averaged_weights = _read_averaged_weights(folder / _AVERAGED_WEIGHTS)
    timestep_sampler = {}
    if (folder / _TIMESTEP_SAMPLER).is_file():
        with np.load(folder / _TIMESTEP_SAMPLER, allow_pickle=False) as arrays:
            timestep_sampler = dict(arrays)
    return Checkpoint(
        folder=folder,
        step=state["step"],
        epoch=state["epoch"],
        options=state["options"],
        unet_config=json.loads((folder / _CONFIG).read_text(encoding="utf-8")),
        weights=load_file(folder / _WEIGHTS),
        averaged_weights=averaged_weights,
        optimizer=torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True),
        timestep_sampler=timestep_sampler,
    )


def find_checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints in a folder, by step, the latest last."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal() and (path / STATE_NAME).is_file():
            found.append((int(number), path))
    return [path for _, path in sorted(found)]


def _read_averaged_weights(file: Path) -> tuple[list[torch.Tensor], int]:
    with safe_open(file, "pt") as content:
        return [content.get_tensor(name) for name in sorted(content.keys())], int(content.metadata()["updates"])


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
