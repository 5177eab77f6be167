"""The networks that benchmarks compare, recipes with random weights and diffusers' U-Net with as many operations; and
the most that the machine can compute."""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from report import ratios_to, rounded
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from imagenet64_diffusion import ClassConditionalPipeline, ClassConditionalUNet2DModel, EtaDDIMScheduler
from imagenet64_diffusion.schedulers.original_schedule import original_cosine_options
from imagenet64_diffusion.training.components import load_model_config


OURS, STOCK = "ours", "stock diffusers"
TOLERANCE = 0.05  # relative difference of the operations of the two


def recipe_config(recipe: str, small: bool = False) -> dict[str, Any]:
    """The options of a recipe's network; small, with a sixteenth of the widths and half the resolution.

    Self-attention then has patches of 8x8, so that some maps have several, as at full size.
    """
    config = {key: value for key, value in load_model_config(recipe).items() if not key.startswith("_")}
    if small:
        config["stem_channels"] = max(config["stem_channels"] // 16, 4)
        config["block_out_channels"] = [max(width // 16, 4) for width in config["block_out_channels"]]
        config["sample_size"] //= 2
        config |= {"time_embed_dim": 16, "class_embed_dim": 16, "attention_patch_size": 8, "num_class_embeds": 10}
    return config


def make_unet(config: Mapping[str, Any]) -> ClassConditionalUNet2DModel:
    """A network with the same random weights every time, also in the convolutional head, which starts at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = ClassConditionalUNet2DModel(**config).eval()
        if unet.config.output_head_type == "conv":
            torch.nn.init.normal_(unet.head.conv.weight, std=0.02)
    return unet


def make_scheduler(config: Mapping[str, Any]) -> EtaDDIMScheduler:
    """The scheduler that a network of this kind, the original's or ours, is trained and sampled with."""
    if config["output_head_type"] == "original":
        return EtaDDIMScheduler(prediction_type="epsilon", **original_cosine_options(1000))
    options = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "clip_sample": False}
    return EtaDDIMScheduler(prediction_type="v_prediction", **options)


def make_pipeline(config: Mapping[str, Any]) -> ClassConditionalPipeline:
    """A pipeline with random weights and no progress bar; the original's guides the variance too."""
    is_original = config["output_head_type"] == "original"
    pipeline = ClassConditionalPipeline(make_unet(config), make_scheduler(config), guide_variance=is_original)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_stock_unet(config: Mapping[str, Any]) -> UNet2DModel:
    """diffusers' network, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**config).eval()


def make_stock_scheduler() -> DDIMScheduler:
    """DDIM on the cosine schedule, for a network that predicts the noise."""
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample=False)


def make_inputs(config: Mapping[str, Any], batch_size: int, device: str) -> tuple[torch.Tensor, ...]:
    """Noise in the place of images and noise, (batch, channels, height, width), timesteps and labels, (batch,)."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, config["in_channels"], config["sample_size"], config["sample_size"])
    images, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    timesteps = torch.randint(1000, (batch_size,), generator=generator).to(device)
    return images, noise, timesteps, (torch.arange(batch_size) % config["num_class_embeds"]).to(device)


# ------------------------------------------------------------------ operations


def count_flops(forward: Callable[[], torch.Tensor], backward: bool = False) -> int:
    """FLOPs of the convolutions and matrix products of a call, and of the backward pass from its result.

    A multiplication and an addition are two. Networks on the meta device count in no time.
    """
    counter = FlopCounterMode(display=False)
    # attention as plain matrix products: not all fused kernels can be counted
    with counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
        output = forward()
        if backward:
            output.float().square().mean().backward()
    return counter.get_total_flops()


def meta_forward(kind: type, config: Mapping[str, Any]) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """A network of a class on the meta device, and its forward pass of one image."""
    with torch.device("meta"):
        unet = kind(**config)
        sample = torch.empty(1, config["in_channels"], config["sample_size"], config["sample_size"])
        timestep = labels = torch.zeros(1, dtype=torch.long)
    return unet, lambda: unet(sample, timestep, labels).sample


def network_flops(kind: type, config: Mapping[str, Any], backward: bool = False) -> int:
    """FLOPs of a pass of one image."""
    return count_flops(meta_forward(kind, config)[1], backward)


def stock_config(config: Mapping[str, Any], flops: float) -> dict[str, Any]:
    """Options of a `UNet2DModel` whose forward pass of one image has so many FLOPs, as one of our networks.

    It has a level for each resolution of ours, also the lowest. Its widths double from level to level, as ours do, and
    stay the same at the last. If ours has self-attention, so has it, below the full resolution. Of one to three layers
    in a block and all widths that GroupNorm allows, it takes what comes nearest.
    """
    groups = next(size for size in (32, 8, 4) if size <= config["stem_channels"] // 2 or size == 4)
    levels = len(config["block_out_channels"]) + 1
    attends = "self_attention" in config["layer_types"]
    kind = "AttnDownBlock2D" if attends else "DownBlock2D"

    def options(width: int, layers: int) -> dict[str, Any]:
        return {
            "sample_size": config["sample_size"],
            "in_channels": config["in_channels"],
            "out_channels": config["in_channels"],
            "block_out_channels": tuple(width * 2 ** min(level, levels - 2) for level in range(levels)),
            "down_block_types": ("DownBlock2D", *[kind] * (levels - 1)),
            "up_block_types": (*[kind.replace("Down", "Up")] * (levels - 1), "UpBlock2D"),
            "layers_per_block": layers,
            "attention_head_dim": min(64, width),
            "add_attention": attends,
            "norm_num_groups": groups,
            "num_class_embeds": config["num_class_embeds"] + 1,
        }

    # FLOPs are a polynomial in width (degree 2) and layers (degree 1), which six small networks determine
    small = np.array([1, 2, 4]) * groups
    one, two = (
        np.polyfit(small, [network_flops(UNet2DModel, options(int(width), layers)) for width in small], 2)
        for layers in (1, 2)
    )
    widths = np.arange(1, 1 + 4 * config["block_out_channels"][-1] // groups) * groups
    errors = np.abs([np.polyval(one + layers * (two - one), widths) / flops - 1 for layers in range(3)])
    layers, place = np.unravel_index(errors.argmin(), errors.shape)
    return options(int(widths[place]), int(layers) + 1)


# ------------------------------------------------------------------ ceilings
# A matrix product alone is no ceiling: libraries differ in the instructions that they use, and convolutions may run at
# twice the rate of the best square product. So the ceiling is the best rate of square products, inner products by
# oneDNN, and the most expensive convolutions of the benchmarked network itself.


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
