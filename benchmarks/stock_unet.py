"""diffusers' own U-Net with as many operations as a recipe of ours, and its guided prediction."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from flops import count_flops


# How far the operations of the two may be apart.
TOLERANCE = 0.05


def matching_config(config: Mapping[str, Any], flops: float) -> dict[str, Any]:
    """Options of a `UNet2DModel` whose forward pass has as many FLOPs as one of ours.

    It has a level for each resolution that ours has, also the lowest. Its widths rise as ours do, by twos,
    and stay at the lowest level; where ours has self-attention it has its own, below the full resolution. Of
    one to three layers in a block, and of all widths that its GroupNorm can have, those are taken that come
    nearest.

    Args:
        config: Options of our network.
        flops: Of our forward pass for one image.
    """
    groups = next(size for size in (32, 8, 4) if size <= config["stem_channels"] // 2 or size == 4)
    # FLOPs are a polynomial in width (degree 2) and layers (degree 1), which six small networks determine
    widths = np.array([1, 2, 4]) * groups
    one, two = (
        np.polyfit(widths, [count_stock_flops(_options(config, int(width), layers, groups)) for width in widths], 2)
        for layers in (1, 2)
    )
    candidates = []
    for layers in (1, 2, 3):
        polynomial = one + (layers - 1) * (two - one)
        multiples = np.arange(1, 1 + 4 * config["block_out_channels"][-1] // groups)
        errors = np.abs(np.polyval(polynomial, multiples * groups) / flops - 1)
        best = int(errors.argmin())
        candidates.append((errors[best], _options(config, int(multiples[best]) * groups, layers, groups)))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _options(config: Mapping[str, Any], width: int, layers: int, groups: int) -> dict[str, Any]:
    levels = len(config["block_out_channels"]) + 1
    attends = "self_attention" in config["layer_types"]
    below = "Attn" if attends else ""
    return {
        "sample_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["in_channels"],
        "block_out_channels": tuple(width * 2 ** min(level, levels - 2) for level in range(levels)),
        "down_block_types": ("DownBlock2D", *[f"{below}DownBlock2D"] * (levels - 1)),
        "up_block_types": (*[f"{below}UpBlock2D"] * (levels - 1), "UpBlock2D"),
        "layers_per_block": layers,
        "attention_head_dim": min(64, width),
        "add_attention": attends,
        "norm_num_groups": groups,
        "num_class_embeds": config["num_class_embeds"] + 1,
    }


def count_stock_flops(options: Mapping[str, Any], backward: bool = False) -> float:
    """FLOPs of a pass of a `UNet2DModel` for one image."""
    with torch.device("meta"):
        unet = UNet2DModel(**options)
        sample = torch.empty(1, options["in_channels"], options["sample_size"], options["sample_size"])
        timestep = labels = torch.zeros(1, dtype=torch.long)
        return count_flops(lambda: unet(sample, timestep, labels).sample, backward)


def make_stock_unet(options: Mapping[str, Any]) -> UNet2DModel:
    """The network, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**options).eval()


def make_stock_scheduler() -> DDIMScheduler:
    """DDIM on the cosine schedule, for a network that predicts the noise."""
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample=False)


@torch.no_grad()
def guided_prediction(
    unet: UNet2DModel,
    sample: torch.Tensor,
    timestep: torch.Tensor | int,
    class_labels: torch.Tensor,
    guidance_scale: float,
) -> torch.Tensor:
    """The noise prediction of a guided step, with both branches in one batch as in diffusers' pipelines."""
    labels = torch.cat([torch.full_like(class_labels, unet.config.num_class_embeds - 1), class_labels])
    output = unet(torch.cat([sample] * 2).to(unet.dtype), timestep, labels, return_dict=False)[0]
    null, conditional = output.to(sample.dtype).chunk(2)
    return null + guidance_scale * (conditional - null)
