"""What a machine can do at most, measured beside what is compared with it: multiply matrices, move memory."""

import time
from typing import Any

import torch
from timing import rounded, seconds_of


def matrix_product_rate(device: str, dtype: torch.dtype, small: bool = False) -> float:
    """The largest FLOP/s of a few square matrix products, with the threads that torch has now."""
    sizes = (64, 128) if small else (2048, 4096, 8192) if device.startswith("cuda") else (512, 1024, 2048)
    rates = []
    for size in sizes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        torch.mm(left, right, out=out)
        begin, seconds = time.perf_counter(), []
        # the best of a stretch: another process on the machine does not lower what it can do
        while len(seconds) < 3 or time.perf_counter() - begin < (0.01 if small else 0.5):
            seconds.append(seconds_of(lambda left=left, right=right, out=out: torch.mm(left, right, out=out), device))
            if time.perf_counter() - begin > 5:
                break
        rates.append(2 * size**3 / min(seconds))
    return max(rates)


def copy_rate(device: str, small: bool = False) -> float:
    """Bytes per second, read and written, of copying a tensor larger than any cache."""
    source = torch.ones((1 << 20) if small else (1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)
    seconds = [seconds_of(lambda: target.copy_(source), device) for _ in range(5)]
    return 2 * source.nbytes / min(seconds)


class Ceilings:
    """The ceilings of a run, measured at its begin and at its end; the larger of both is what counts.

    Args:
        device: Where.
        dtype: Of the matrices.
        small: For a smoke run.
    """

    def __init__(self, device: str, dtype: torch.dtype, small: bool = False):
        self._arguments = device, dtype, small
        self.matrix_product: list[float] = []
        self.copy: list[float] = []
        self.measure()

    def measure(self) -> None:
        """Measures once more."""
        device, dtype, small = self._arguments
        self.matrix_product.append(matrix_product_rate(device, dtype, small))
        self.copy.append(copy_rate(device, small))

    def share(self, flops: float, seconds: float) -> float:
        """The share of the matrix products that the machine could have done meanwhile."""
        return rounded(flops / seconds / max(self.matrix_product), 3)

    def figures(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "matrix_product_gflops": [rounded(rate / 1e9) for rate in self.matrix_product],
            "copy_gbytes_per_second": [rounded(rate / 1e9) for rate in self.copy],
        }
