"""The networks that benchmarks compare, with random weights, and the most that the machine can compute."""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from report import ratios_to
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from imagenet64_diffusion import ClassConditionalPipeline, ClassConditionalUNet2DModel, EtaDDIMScheduler
from imagenet64_diffusion.schedulers.original_schedule import original_cosine_options
from imagenet64_diffusion.training.components import load_model_config


OURS, STOCK = "ours", "stock diffusers"
COSINE = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "clip_sample": False}
TOLERANCE = 0.05  # relative difference of the operations of the two


def recipe_config(recipe: str, small: bool = False) -> dict[str, Any]:
    """The options of a recipe's network; small, with a sixteenth of the widths and half the resolution."""
    config = {key: value for key, value in load_model_config(recipe).items() if not key.startswith("_")}
    if small:
        config["stem_channels"] = max(config["stem_channels"] // 16, 4)
        config["block_out_channels"] = [max(width // 16, 4) for width in config["block_out_channels"]]
        config["sample_size"] //= 2
        # some maps have several patches, as at full size
        config |= {"time_embed_dim": 16, "class_embed_dim": 16, "attention_patch_size": 8, "num_class_embeds": 10}
    return config


def make_unet(kind: type, config: Mapping[str, Any]) -> Any:
    """A network with the same random weights every time, also in our convolutional head, which starts at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = kind(**config).eval()
        if config.get("output_head_type") == "conv":
            torch.nn.init.normal_(unet.head.conv.weight, std=0.02)
    return unet


def make_scheduler(config: Mapping[str, Any]) -> EtaDDIMScheduler:
    """The scheduler that a network of this kind, the original's or ours, is trained and sampled with."""
    if config["output_head_type"] == "original":
        return EtaDDIMScheduler(prediction_type="epsilon", **original_cosine_options(1000))
    return EtaDDIMScheduler(prediction_type="v_prediction", **COSINE)


def make_pipeline(config: Mapping[str, Any]) -> ClassConditionalPipeline:
    """A pipeline with random weights and no progress bar; the original's guides the variance too."""
    is_original = config["output_head_type"] == "original"
    pipeline = ClassConditionalPipeline(
        make_unet(ClassConditionalUNet2DModel, config), make_scheduler(config), guide_variance=is_original
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_inputs(config: Mapping[str, Any], batch_size: int, device: str) -> tuple[torch.Tensor, ...]:
    """Noise in the place of images and noise, (batch, channels, height, width), timesteps and labels, (batch,)."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, config["in_channels"], config["sample_size"], config["sample_size"])
    images, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    timesteps = torch.randint(1000, (batch_size,), generator=generator).to(device)
    return images, noise, timesteps, (torch.arange(batch_size) % config["num_class_embeds"]).to(device)


def count_flops(forward: Callable[[], torch.Tensor], backward: bool = False) -> int:
    """FLOPs of a call, two for a multiplication and an addition, and of the backward pass from its result."""
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
    """Options of the `UNet2DModel` that comes nearest to so many FLOPs, those of one of our networks for an image.

    It has the same resolutions, and self-attention if ours has it, below the full one.
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

    # FLOPs by width are a line in width and in layers, which four small networks determine
    small = np.array([1, 4]) * groups
    one, two = (
        np.polyfit(small, [network_flops(UNet2DModel, options(int(width), layers)) / width for width in small], 1)
        for layers in (1, 2)
    )
    widths = np.arange(1, 1 + 4 * config["block_out_channels"][-1] // groups) * groups
    errors = np.abs([np.polyval(one + layers * (two - one), widths) * widths / flops - 1 for layers in range(3)])
    layers, place = np.unravel_index(errors.argmin(), errors.shape)
    return options(int(widths[place]), int(layers) + 1)


Kernel = tuple[int, Callable[[], torch.Tensor]]  # FLOPs of a call, and the call


def kernels(
    config: Mapping[str, Any], device: str, dtype: torch.dtype, batch: int, small: bool, count: int = 4
) -> dict[str, Kernel]:
    """The kernels whose best rate is the ceiling: matrix and inner products, and a network's costliest convolutions.

    A matrix product alone is none: libraries differ in their instructions, and convolutions may be twice as fast.
    """
    found: dict[str, Kernel] = {}

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    for size in (64, 128) if small else (2048, 4096, 8192) if device.startswith("cuda") else (512, 1024, 2048):
        left, right = noise(size, size), noise(size, size)
        found[f"matrix product {size}"] = 2 * size**3, partial(torch.mm, left, right)
        if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            found[f"inner product {size}"] = 2 * size**3, partial(F.linear, left.to_mkldnn(), right.to_mkldnn())
    unet, forward = meta_forward(ClassConditionalUNet2DModel, config)
    convolutions = {}

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # each pixel of a transposed convolution's input, and of another one's output, meets the whole filter
        pixels = (inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output)[:, :1].numel()
        shape = tuple(inputs[0].shape[1:])
        convolutions[f"{layer} {shape}"] = 2 * layer.weight.numel() * pixels, shape, layer

    for layer in unet.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.register_forward_hook(note)
    forward()
    for flops, shape, layer in sorted(convolutions.values(), key=lambda each: -each[0])[:count]:
        convolve = F.conv_transpose2d if isinstance(layer, nn.ConvTranspose2d) else F.conv2d
        settings = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        for layout in (torch.contiguous_format, torch.channels_last):
            tensors = (noise(*sizes).to(memory_format=layout) for sizes in ((batch, *shape), layer.weight.shape))
            name = f"{layer}, batch {batch}, size {shape[1:]}, {layout}".replace("torch.", "")
            found[name] = batch * flops, partial(convolve, *tensors, **settings)
    return found


@torch.no_grad()
def compare(
    seconds: Mapping[str, list[float]], flops: Mapping[str, float], kernels: Mapping[str, Kernel], small: bool
) -> tuple[dict[str, dict[str, Any]], str]:
    """Columns with the ratios of the seconds of each round, and shares of the ceiling; and what the ceiling is."""
    rates = {}
    for name, (count, call) in kernels.items():
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        # the fastest call: other processes on the machine do not lower what it can do
        rates[name] = count / min(timer.blocked_autorange(min_run_time=0.01 if small else 0.5).times)
    best = max(rates, key=rates.__getitem__)
    shares = {name: 100 * flops[name] / statistics.median(each) / rates[best] for name, each in seconds.items()}
    columns = {"of the ceiling, %": shares, "relative time": ratios_to(OURS, seconds)}
    capability = torch.backends.cpu.get_cpu_capability()
    return columns, f"The ceiling is {rates[best] / 1e9:.4g} GFLOP/s ({best}, {capability})."
