"""What the ranks of one run do together, so that none waits for another that has failed."""

import contextlib
import datetime
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .command_line import OtherRankError


Result = TypeVar("Result")


@contextlib.contextmanager
def distributed_state(cpu: bool) -> Iterator[PartialState]:
    """The ranks that accelerate has started; on the CPU where that is asked for."""
    # one rank may have the last batch of an hour while the others wait for it
    state = PartialState(cpu=cpu, timeout=datetime.timedelta(days=7))
    yield state
    # not on an error, of which the others may not know yet
    if state.num_processes > 1:
        state.destroy_process_group()


def on_main_process(accelerator: Accelerator | PartialState, find: Callable[[], Result]) -> Result:
    """What the main process finds, given to every process: picklable, its tensors on the CPU."""
    if accelerator.num_processes == 1:
        # the others of the launch, if there are any, have work of their own, and take no part
        return find()
    found = on_every_process(accelerator, lambda: find() if accelerator.is_main_process else None)
    # on a GPU this takes as much memory for a moment, which is less than the training of what a checkpoint holds
    return broadcast_object_list([found])[0]


def on_every_process(
    accelerator: Accelerator | PartialState, find: Callable[[], Result], in_turn: bool = False
) -> Result:
    """What each process finds, a machine's first one before the others if ``in_turn``; if one raises, all do."""
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
        raise OtherRankError(message)  # so that it is said once
    raise own_error or ValueError(f"process {number} of {accelerator.num_processes}: {message}")
