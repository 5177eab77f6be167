"""What the processes of one run do together, so that none waits for another that has failed."""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object

from .command_line import OtherRankError


Result = TypeVar("Result")


def on_main_process(accelerator: Accelerator | PartialState, find: Callable[[], Result]) -> Result:
    """What the main process finds, given to every process.

    Args:
        accelerator: Whose processes these are.
        find: Runs in the main process only. Its result may hold tensors; they come on the CPU.

    Raises:
        ValueError, OSError: What `find` raises in the main process; in the others `OtherRankError`, so that it is said
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
        raise own_error or OtherRankError(outcome[1])
    shapes = [[(tuple(tensor.shape), tensor.dtype) for tensor in tensors]]
    broadcast_object_list(shapes)
    if not accelerator.is_main_process:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes[0]]
    # one after the other, so that a device never holds more than one of them
    tensors = [broadcast(tensor.to(accelerator.device)).cpu() for tensor in tensors]
    return _with_tensors(outcome[0], tensors)


def on_every_process(
    accelerator: Accelerator | PartialState, find: Callable[[], Result], in_turn: bool = False
) -> Result:
    """What each process finds; if one cannot, none goes on.

    Args:
        accelerator: Whose processes these are.
        find: Runs in every process.
        in_turn: The others of a machine begin when its first process is done.

    Raises:
        ValueError, OSError: What `find` raises in the main process, or a ValueError there that says what it raised in
            another one; in the others `OtherRankError`, so that it is said once.
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
    failed = {number: message for number, message in enumerate(errors) if message is not None}
    if not failed:
        return cast(Result, found)
    number, message = next(iter(failed.items()))
    if not accelerator.is_main_process:
        raise OtherRankError(message)
    raise own_error or ValueError(f"process {number} of {accelerator.num_processes}: {message}")


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
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        return type(value)(**{name: _replace(entry, kind, replacement) for name, entry in entries.items()})
    return value
