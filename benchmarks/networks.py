"""The networks and pipelines that benchmarks measure: recipes with random weights, and small ones of them."""

from typing import Any

import torch

from imagenet64_diffusion import ClassConditionalPipeline, ClassConditionalUNet2DModel, EtaDDIMScheduler
from imagenet64_diffusion.schedulers.original_schedule import original_cosine_options
from imagenet64_diffusion.training.components import load_model_config


def recipe_config(recipe: str, small: bool = False) -> dict[str, Any]:
    """The options of a recipe's network, such as ``res_res`` or ``original/res_res``.

    Args:
        recipe: Its name, or a JSON file.
        small: Whether to take a sixteenth of the widths and half the resolution, with all its layers. The
            patches of self-attention are then 8x8: some maps have several, as at full size.
    """
    config = {key: value for key, value in load_model_config(recipe).items() if not key.startswith("_")}
    if small:
        config["stem_channels"] = max(config["stem_channels"] // 16, 4)
        config["block_out_channels"] = [max(width // 16, 4) for width in config["block_out_channels"]]
        config["time_embed_dim"] = config["class_embed_dim"] = 16
        config["sample_size"] = config["sample_size"] // 2
        config["attention_patch_size"] = 8
        config["num_class_embeds"] = 10
    return config


def make_unet(config: dict[str, Any], **options: Any) -> ClassConditionalUNet2DModel:
    """A network with the same random weights every time; a convolutional head, which begins at zero, too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = ClassConditionalUNet2DModel(**config, **options).eval()
        if unet.config.output_head_type == "conv":
            torch.nn.init.normal_(unet.head.conv.weight, std=0.02)
    return unet


def is_original(config: dict[str, Any]) -> bool:
    """Whether a network is the original's, which samples on its own schedule and guides the variance too."""
    return config["output_head_type"] == "original"


def make_scheduler(config: dict[str, Any]) -> EtaDDIMScheduler:
    """The scheduler that a network of this kind is trained and sampled with."""
    if is_original(config):
        return EtaDDIMScheduler(prediction_type="epsilon", **original_cosine_options(1000))
    return EtaDDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def make_pipeline(config: dict[str, Any]) -> ClassConditionalPipeline:
    """A pipeline with random weights, quiet."""
    pipeline = ClassConditionalPipeline(make_unet(config), make_scheduler(config), guide_variance=is_original(config))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
