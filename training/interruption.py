"""Signals that ask a run to stop, and how the ranks agree on the step after which they stop."""

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator


def leave_stopping_to_parent(worker: int) -> None:
    """Keeps a process that reads images alive when its process group is asked to stop: its parent still needs it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # a second one, as from a parent that cannot wait, has its usual effect
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


class StopRequest:
    """Inside, SIGTERM and SIGINT are noted instead of ending the process; all ranks stop after the same step."""

    def __init__(self, accelerator: Accelerator):
        self._noted, self._interrupted_at = 0, 0.0
        self._earlier: dict[signal.Signals, Any] = {}
        # on the host, so that no accelerator has to be waited for
        self._group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self._number = torch.tensor(0)
        self._exchange: Any = None

    def __enter__(self) -> "StopRequest":
        # only the main thread may set handlers; a run in another one, as in a notebook's server, goes without
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        # on an error the others may never answer
        if kind is None and self._exchange is not None:
            self._exchange.wait()

    def agreed(self) -> int:
        """The number of the signal after which all ranks stop now, or 0. Every rank asks at every step."""
        if self._group is None:
            return self._noted
        # the answer to what was told at the step before, which has long arrived: no rank waits for the others
        if self._exchange is not None:
            self._exchange.wait()
        answer = int(self._number)
        if not answer:
            self._number = torch.tensor(self._noted)
            group: Any = self._group
            highest = torch.distributed.ReduceOp.MAX
            self._exchange = torch.distributed.all_reduce(self._number, highest, group=group, async_op=True)
        return answer

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            # a launcher sends on what the terminal has sent to all its processes: within a second it is one Ctrl-C
            if self._noted == signal.SIGINT and now - self._interrupted_at > 1:
                raise KeyboardInterrupt
            self._interrupted_at = now
        self._noted = number
