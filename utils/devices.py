"""The device that an option names, the best one where it names none, and the memory of a run on a CPU."""

import ctypes
import sys
from typing import Any

import torch


def find_device(name: str | torch.device) -> torch.device:
    """The device of that name; ValueError if torch knows none, or this machine has none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # what torch raises for unknown names, for devices that it was not built for, and for those that are not there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"device is {name}, but must be one that torch has on this machine, such as cpu ({reason})"
        ) from error
    return device


def best_device() -> str:
    """The name of the fastest device that this machine has: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def keep_freed_memory() -> bool:
    """Has glibc keep freed memory for the next step; whether there is a glibc that does.

    Else the system takes each large block back, and clears its pages when they come again: a tenth of the time of the
    demo's training steps. The setting is the whole process's, so command lines choose it and no class does.
    """
    library: Any = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of mallopt(3): no block of its own for a large request; give nothing
    # back at the top; and ask for 64 MiB at a time
    options = ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20))
    return all(library.mallopt(option, value) == 1 for option, value in options)
