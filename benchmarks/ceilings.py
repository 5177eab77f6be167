"""The most that a machine can compute: the best rate of several kernels, so that no share of it exceeds 100 %.

A matrix product alone is no ceiling: libraries differ in the instructions that they use, and a network's convolutions
may run at twice the rate of the best square product. So the ceiling is the maximum over square products, inner
products by oneDNN, and the most expensive convolutions of the benchmarked network itself.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timing import rounded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer


Kernel = tuple[int, Callable[[], torch.Tensor]]  # FLOPs of a call, and the call


class _Convolutions(TorchDispatchMode):
    """Collects the convolutions that are called, with their FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[Any, ...], int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default and args[1].ndim == 4:  # of images
            sample, weight, _, *how = args
            # of a transposed convolution each input pixel, else each output pixel meets the whole filter
            pixels = sample if how[3] else output
            shape = (tuple(sample.shape[1:]), tuple(weight.shape), *(tuple(each) if isinstance(each, list) else each
                     for each in how))  # fmt: skip
            self.found[shape] = 2 * weight.numel() * pixels[:, :1].numel() // len(sample)
        return output


def network_convolutions(forward: Callable[[], Any], count: int = 4) -> list[tuple[Any, ...]]:
    """The different convolutions of a call with the most FLOPs, most first; networks on the meta device take no time.

    Returns:
        (channels, height, width), the weight's shape, and the other arguments of `torch.convolution`.
    """
    with _Convolutions() as mode, torch.no_grad():
        forward()
    return sorted(mode.found, key=mode.found.__getitem__, reverse=True)[:count]


def kernels(
    device: str, dtype: torch.dtype, convolutions: list[tuple[Any, ...]], batch: int, small: bool = False
) -> dict[str, Kernel]:
    """The kernels whose best rate is the ceiling, by their names.

    Args:
        device: Where.
        dtype: What they compute in.
        convolutions: Of the benchmarked network, see `network_convolutions`.
        batch: Images of each of these.
        small: For a smoke run.
    """
    found: dict[str, Kernel] = {}

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    sizes = (64, 128) if small else (2048, 4096, 8192) if device.startswith("cuda") else (512, 1024, 2048)
    for size in sizes:
        left, right = noise(size, size), noise(size, size)
        found[f"matrix product {size}"] = 2 * size**3, lambda left=left, right=right: left @ right
        if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            one, two = left.to_mkldnn(), right.to_mkldnn()
            found[f"inner product {size}"] = 2 * size**3, lambda one=one, two=two: F.linear(one, two)
    for shape in convolutions:
        (channels, height, width), filters, *how = shape
        weight = noise(*filters)
        for layout in (torch.contiguous_format, torch.channels_last):
            sample = noise(batch, channels, height, width).to(memory_format=layout)
            kernel = weight.to(memory_format=layout)

            def convolve(sample: torch.Tensor = sample, kernel: torch.Tensor = kernel, how: Any = how) -> torch.Tensor:
                return torch.convolution(sample, kernel, None, *how)

            pixels = (sample if how[3] else convolve())[:, :1].numel()
            words = f"{tuple(sample.shape)} with {filters}, stride {how[0][0]}, {str(layout).removeprefix('torch.')}"
            name = f"convolution{' transposed' if how[3] else ''} {words}"
            found[name] = 2 * weight.numel() * pixels, convolve
    return found


def best_rate(kernel: Kernel, small: bool = False) -> float:
    """FLOP/s of the fastest of some calls: another process on the machine does not lower what it can do."""
    flops, call = kernel
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    with torch.no_grad():
        call()
        return flops / min(timer.blocked_autorange(min_run_time=0.01 if small else 0.5).times)


def copy_rate(device: str, small: bool = False) -> float:
    """Bytes per second, read and written, of copying a tensor larger than any cache."""
    source = torch.ones((1 << 20) if small else (1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return best_rate((2 * source.nbytes, lambda: target.copy_(source)), small)


class Ceilings:
    """The ceilings of a run, measured at its begin and as often as `measure` is called; the largest is what counts.

    Args:
        device: Where.
        dtype: What the kernels compute in.
        convolutions: Of the benchmarked network, see `network_convolutions`.
        batch: Images of each of these.
        small: For a smoke run.
    """

    def __init__(
        self, device: str, dtype: torch.dtype, convolutions: list[tuple[Any, ...]], batch: int, small: bool = False
    ):
        self._arguments = device, dtype, convolutions, batch, small
        self.rates: dict[str, float] = {}
        self.copy = 0.0
        self.measure()

    def measure(self) -> None:
        """Measures once more."""
        device, *_, small = self._arguments
        for name, kernel in kernels(*self._arguments).items():
            self.rates[name] = max(self.rates.get(name, 0.0), best_rate(kernel, small))
        self.copy = max(self.copy, copy_rate(device, small))

    def share(self, flops: float, seconds: float) -> float:
        """The share of the operations that the machine could have done meanwhile."""
        return rounded(flops / seconds / max(self.rates.values()), 3)

    def figures(self) -> dict[str, Any]:
        """As JSON values; ``gflops`` is the ceiling, and ``kernel`` what reached it."""
        return {
            "gflops": rounded(max(self.rates.values()) / 1e9),
            "kernel": max(self.rates, key=self.rates.__getitem__),
            "kernels_gflops": {name: rounded(rate / 1e9) for name, rate in self.rates.items()},
            "copy_gbytes_per_second": rounded(self.copy / 1e9),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        }
