"""The device that an option names, and the best one where it names none."""

import torch


def find_device(name: str | torch.device) -> torch.device:
    """The device of that name, once it is known to be there.

    Raises:
        ValueError: If torch knows no such device, or this machine has none.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # what torch raises for unknown names, for devices that it was not built for, and for those that are not there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device is {name}, but must be one that torch has on this machine, such as cpu ({_first_line(error)})"
        ) from error
    return device


def best_device() -> str:
    """The name of the fastest device that this machine has: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
