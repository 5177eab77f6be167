"""The networks that benchmarks measure: recipes with random weights, and diffusers' U-Net with as many operations."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
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
