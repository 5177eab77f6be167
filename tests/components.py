"""Small real components that several tests share."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from imagenet64_diffusion import ClassConditionalPipeline, ClassConditionalUNet2DModel, EtaDDIMScheduler


FIXTURES = Path(__file__).parent / "fixtures"
RECIPES = ("res", "res_conv", "res_large", "res_res", "res_res_atn")

TINY_UNET = {
    "sample_size": 16,
    "in_channels": 1,
    "stem_channels": 8,
    "block_out_channels": (8, 16),
    "num_class_embeds": 3,
    "time_embed_dim": 16,
    "class_embed_dim": 16,
}


def make_unet(**options) -> ClassConditionalUNet2DModel:
    """A tiny network with the same random weights every time; its zero-initialised head is random too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = ClassConditionalUNet2DModel(**{**TINY_UNET, **options}).eval()
        if unet.config.output_head_type == "conv":
            torch.nn.init.normal_(unet.head.conv.weight, std=0.3)
    return unet


def make_pipeline(**options) -> ClassConditionalPipeline:
    """A tiny pipeline; options go to the network."""
    unet = make_unet(**options)
    scheduler = EtaDDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)
    id2label = {0: "tabby, tabby cat", 1: "goldfish", 2: "crane"} if unet.config.num_class_embeds else None
    pipeline = ClassConditionalPipeline(unet, scheduler, id2label)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(*seeds: int) -> list[torch.Generator]:
    """One generator for each seed."""
    return list(map(seeded_one, seeds))


def seeded_one(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generate_two(pipeline: ClassConditionalPipeline) -> torch.Tensor:
    """Two guided images of a tiny pipeline, always the same ones."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        [0, "goldfish"], generator=seeded(0, 1), num_inference_steps=3, guidance_scale=2.0, output_type="pt"
    ).images


class OriginalCheckpoint:
    """A checkpoint that the original program wrote, and what that program computed with it."""

    def __init__(self, recipe: str):
        self.recipe = recipe
        folder = FIXTURES / "original" / recipe
        self.params = json.loads((folder / "model_params_3e_2s.json").read_text())
        self.state_dict = torch.load(folder / "model_3e_2s.pkl", weights_only=True)
        self.expected = load_file(folder / "expected.safetensors")

    def labels(self, prefix: str) -> torch.Tensor:
        """Class labels in our convention, where the null class is the number of classes."""
        is_null = self.expected[f"{prefix}.is_null"] > 0
        return torch.where(is_null, self.params["num_classes"], self.expected[f"{prefix}.class_label"])
