"""Products of float32 numbers in float32, whatever a program has allowed for the sake of speed."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Keeps float32 from being rounded to TF32 or bfloat16, and algorithms from being chosen by their speed.

    torch has these settings twice: ``torch.set_float32_matmul_precision`` and ``allow_tf32``, and since 2.9
    ``fp32_precision`` for each backend and operation, which has the last word. Where a program has set both,
    reading the former ones raises. So they are read only once the latter say what is wanted here. Afterwards
    every setting is what it was, and follows the same other setting if it did.
    """
    with contextlib.ExitStack() as stack:

        def change(place: Any, name: str, value: Any) -> None:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)

        change(torch.backends.cudnn, "benchmark", False)
        change(torch.backends.cudnn, "deterministic", True)
        if hasattr(torch.backends, "fp32_precision"):
            # these two are followed by the others, which without them show what they have of their own
            whole: tuple[Any, ...] = (torch.backends, torch.backends.cudnn)
            for place in whole:
                change(place, "fp32_precision", "none")
            backends: Any = torch.backends
            for place in (backends.cuda.matmul, backends.mkldnn.matmul):
                change(place, "fp32_precision", "ieee")
            torch.backends.fp32_precision = "ieee"
            for backend in (torch.backends.cudnn, torch.backends.mkldnn):
                for place in (backend.conv, backend.rnn):
                    # one that follows is left alone, since there is no word for the default of cuDNN's
                    if place.fp32_precision != "ieee":
                        change(place, "fp32_precision", "ieee")
        else:
            change(torch.backends.cudnn, "allow_tf32", False)
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        yield
