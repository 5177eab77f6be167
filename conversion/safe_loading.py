"""A checkpoint's weights and optimizer, compared with what the network needs before a tensor is made of them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .pickle_reader import CheckpointFile, StateDict, StoredTensor


# What wraps a module puts its name before those of the weights.
_PREFIXES = ("module.", "_orig_mod.")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def load_weights(file: str | Path, shapes: Mapping[str, tuple[int, ...]], params_name: str) -> dict[str, torch.Tensor]:
    """Loads a state dict of the original that has exactly the weights of a network.

    Args:
        file: The ``model_*.pkl`` file, in either format of torch.save.
        shapes: Name -> shape of every weight.
        params_name: What errors call the JSON file that the shapes come from.

    Returns:
        Name -> tensor in the order of ``shapes``, without prefixes. The tensors lie in the file, which must stay as it
        is while they are used.

    Raises:
        CheckpointError: If the file is of another kind, damaged, unsafe, or holds other weights.
    """
    name, opened = Path(file).name, CheckpointFile(Path(file))
    described = opened.value
    if type(described) is not StateDict:
        raise CheckpointError(f"{name} holds a {type(described).__name__}, but must hold a state dict")
    if set(described) == {"state", "param_groups"}:
        raise CheckpointError(f"{name} holds an optimizer's state, but must hold a model's: give it as the optimizer")
    for key, value in described.items():
        if type(key) is not str or not isinstance(value, StoredTensor):
            raise CheckpointError(
                f"{name} holds {key!r:.80}, a {type(value).__name__}, but must hold tensors by their names alone: save"
                " model.state_dict()"
            )
    found: dict[str, StoredTensor] = dict(described)
    while prefix := next((prefix for prefix in _PREFIXES if found and all(n.startswith(prefix) for n in found)), None):
        found = {key.removeprefix(prefix): value for key, value in found.items()}
    problems = [
        f"{names[0]:.80}{f' and {len(names) - 1} more weights' if names[1:] else ''} {what}"
        for names, what in (
            ([key for key in shapes if key not in found], "missing"),
            ([key for key in found if key not in shapes], "unknown"),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{name} does not belong to {params_name}, or is not whole: {', '.join(problems)}")
    for key, shape in shapes.items():
        if found[key].shape != shape:
            raise CheckpointError(
                f"{name} does not belong to {params_name}: {key} has shape {found[key].shape}, but must have {shape}"
            )
    _check_unshared(list(found.values()), name)
    return {key: _load(opened, found[key], f"{name}: {key}") for key in shapes}


def load_optimizer(file: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Loads the state of the original's AdamW over the weights of a network.

    Args:
        file: The ``optim_*.pkl`` file, in either format of torch.save.
        shapes: Name -> shape of every weight in the order of the original's parameters.

    Returns:
        The state dict of the optimizer; its only group has ``lr``, ``betas``, ``eps`` and ``weight_decay``.

    Raises:
        CheckpointError: If the file is of another kind, damaged, unsafe, or of another network's optimizer.
    """
    name, opened = Path(file).name, CheckpointFile(Path(file))
    match opened.value:
        case {"state": StateDict() as state, "param_groups": [StateDict() as group]} if len(opened.value) == 2:
            pass
        case _:
            raise CheckpointError(
                f"{name} does not hold an optimizer's state, an AdamW's with one group of parameters: give the"
                " optim_*.pkl file"
            )
    if group.get("params") != list(range(len(shapes))):
        raise CheckpointError(f"{name} is the optimizer of another network: the model has {len(shapes)} parameters")
    if group.get("amsgrad"):
        raise CheckpointError(f"{name}: amsgrad is on, but the original's AdamW has it off")
    try:
        hyperparameters = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        torch.optim.AdamW([torch.zeros(1)], **hyperparameters)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: the hyper-parameters of its group are not AdamW's ({error})") from error
    expected = list(shapes.items())
    _check_unshared([v for entry in state.values() if type(entry) is StateDict for v in entry.values()], name)
    entries: dict[int, dict[str, Any]] = {}
    for index, entry in state.items():
        what = f"{name}: parameter {index!r:.80}"
        if type(index) is not int or index >= len(expected):
            raise CheckpointError(f"{what} does not exist, there are {len(expected)}")
        if type(entry) is not StateDict or set(entry) != {"step", *_MOMENTS}:
            raise CheckpointError(f"{what} must have step, exp_avg and exp_avg_sq")
        weight, shape = expected[index]
        for kind in _MOMENTS:
            if not isinstance(entry[kind], StoredTensor) or entry[kind].shape != shape:
                found = getattr(entry[kind], "shape", type(entry[kind]).__name__)
                raise CheckpointError(
                    f"{name} is the optimizer of another network: {kind} of parameter {index} is {found}, but {weight}"
                    f" has shape {shape}"
                )
        moments = {kind: _load(opened, entry[kind], f"{name}: {kind} of parameter {index}") for kind in _MOMENTS}
        if moments["exp_avg_sq"].min() < 0:
            raise CheckpointError(f"{name}: exp_avg_sq of parameter {index} is negative, but is a mean of squares")
        entries[index] = {"step": _load_step(opened, entry["step"], what), **moments}
    return {"state": entries, "param_groups": [{**hyperparameters, "params": group["params"]}]}


def _load_step(opened: CheckpointFile, step: Any, what: str) -> float:
    if isinstance(step, StoredTensor) and step.shape == ():
        step = opened.tensor(step).item()
    if type(step) not in (int, float) or not 1 <= step < math.inf:
        raise CheckpointError(f"{what}: its step must be a number of at least 1, but is not")
    return float(step)


def _check_unshared(values: list[Any], name: str) -> None:
    """Sees to it that tensors do not share elements: a small file could describe a network of any size so."""
    tensors = [value for value in values if isinstance(value, StoredTensor)]
    stored = sum({id(tensor.storage): tensor.storage.length for tensor in tensors}.values())
    described = sum(math.prod(tensor.shape) for tensor in tensors)
    if described > stored:
        raise CheckpointError(
            f"{name} describes {described:,} numbers and stores {stored:,}: its tensors share memory, which those of"
            " the original do not"
        )


def _load(opened: CheckpointFile, stored: StoredTensor, what: str) -> torch.Tensor:
    tensor = opened.tensor(stored)
    # fifty times as fast as isfinite().all(); NaN passes into both
    lowest, highest = torch.aminmax(tensor)
    if not bool(torch.isfinite(lowest) & torch.isfinite(highest)):
        kind = "NaN" if bool(torch.isnan(lowest)) else "infinite numbers"
        raise CheckpointError(
            f"{what} holds {kind}, but must be finite: the training had failed, take another checkpoint"
        )
    return tensor
