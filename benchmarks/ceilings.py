"""The most that a machine can compute: the best rate of several kernels.

A matrix product alone is no ceiling: libraries differ in the instructions that they use, and a network's convolutions
may run at twice the rate of the best square product. So the ceiling is the maximum over square products, inner
products by oneDNN, and the most expensive convolutions of the benchmarked network itself.
"""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from networks import OURS, meta_forward
from timing import ratios_to, rounded
from torch import nn
from torch.utils.benchmark import Timer

from imagenet64_diffusion import ClassConditionalUNet2DModel


Kernel = tuple[int, Callable[[], torch.Tensor]]  # FLOPs of a call, and the call


def network_convolutions(config: Mapping[str, Any], count: int) -> list[tuple[int, tuple[int, ...], nn.Module]]:
    """FLOPs for one image, input shape and layer of the most expensive of a network's different convolutions."""
    unet, forward = meta_forward(ClassConditionalUNet2DModel, config)
    found = {}

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # each pixel of a transposed convolution's input, and of another one's output, meets the whole filter
        pixels = (inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output)[:, :1].numel()
        shape = tuple(inputs[0].shape[1:])
        found[f"{layer} {shape}"] = 2 * layer.weight.numel() * pixels, shape, layer

    for layer in unet.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.register_forward_hook(note)
    forward()
    return sorted(found.values(), key=lambda each: each[0], reverse=True)[:count]


def kernels(
    config: Mapping[str, Any], device: str, dtype: torch.dtype, batch: int, small: bool, count: int = 4
) -> dict[str, Kernel]:
    """The kernels whose best rate is the ceiling: products, and ``count`` convolutions in two memory formats."""
    found: dict[str, Kernel] = {}

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    for size in (64, 128) if small else (2048, 4096, 8192) if device.startswith("cuda") else (512, 1024, 2048):
        left, right = noise(size, size), noise(size, size)
        found[f"matrix product {size}"] = 2 * size**3, partial(torch.mm, left, right)
        if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            found[f"inner product {size}"] = 2 * size**3, partial(F.linear, left.to_mkldnn(), right.to_mkldnn())
    for flops, shape, layer in network_convolutions(config, count):
        convolve = F.conv_transpose2d if isinstance(layer, nn.ConvTranspose2d) else F.conv2d
        settings = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        for layout in (torch.contiguous_format, torch.channels_last):
            tensors = (noise(*sizes).to(memory_format=layout) for sizes in ((batch, *shape), layer.weight.shape))
            name = f"{layer}, batch {batch}, size {shape[1:]}, {layout}".replace("torch.", "")
            found[name] = batch * flops, partial(convolve, *tensors, **settings)
    return found


def best_rate(kernel: Kernel, small: bool) -> float:
    """FLOP/s of the fastest of some calls: other processes on the machine do not lower what it can do."""
    flops, call = kernel
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    with torch.no_grad():
        return flops / min(timer.blocked_autorange(min_run_time=0.01 if small else 0.5).times)


class Ceilings:
    """The ceilings of a run, measured at its beginning and end; the largest counts. Arguments as for `kernels`."""

    def __init__(self, config: Mapping[str, Any], device: str, dtype: torch.dtype, batch: int, small: bool):
        self._measured = config, device, dtype, batch, small
        self.rates: dict[str, float] = {}
        self._measure()

    def _measure(self) -> None:
        for name, kernel in kernels(*self._measured).items():
            self.rates[name] = max(self.rates.get(name, 0.0), best_rate(kernel, self._measured[-1]))

    def compare(self, seconds: Mapping[str, list[float]], flops: Mapping[str, float]) -> dict[str, Any]:
        """Ratios of the seconds of each round, and shares of the ceiling, as JSON values."""
        self._measure()
        best = max(self.rates, key=self.rates.__getitem__)
        shares = {name: flops[name] / statistics.median(each) / self.rates[best] for name, each in seconds.items()}
        return {
            "ratio_to_ours": ratios_to(OURS, seconds),
            "share_of_ceiling": {name: rounded(share, 3) for name, share in shares.items()},
            "ceilings": {
                "gflops": rounded(self.rates[best] / 1e9),
                "kernel": best,
                "kernels_gflops": {name: rounded(rate / 1e9) for name, rate in self.rates.items()},
                "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            },
        }
