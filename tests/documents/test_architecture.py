"""The figures of the network and of the code show what is there."""

import ast
import html
import itertools
import re
import runpy

import pytest
import torch

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.tests.components import RECIPES
from imagenet64_diffusion.tests.documents.pages import ROOT, read_blocks
from imagenet64_diffusion.training.components import load_model_config


DRAWING = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))


def make(recipe: str) -> ClassConditionalUNet2DModel:
    with torch.device("meta"):
        return ClassConditionalUNet2DModel.from_config(load_model_config(recipe))


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_was_watched_is_what_the_config_says(recipe):
    """Levels, layers, channels, sizes and skips, from the config alone: level i halves i times, widths as listed."""
    unet = make(recipe)
    config, (steps, skips) = unet.config, DRAWING["watch"](unet)
    layers = list(config.layer_types)
    widths = [config.stem_channels, *config.block_out_channels]
    levels = len(config.block_out_channels)
    size = config.sample_size

    def seen(block: str) -> list[tuple]:
        return [(name, *widths, size[0]) for place, name, *widths, size, _, _ in steps if place == block]

    def stack(before: int, after: int, size: int) -> list[tuple]:
        return [(name, after if place else before, after, size) for place, name in enumerate(layers)]

    assert seen("conv_in") == [("7x7 convolution", 3, widths[0], size)]
    for level, (before, after) in enumerate(itertools.pairwise(widths)):
        here = size >> level
        halving = ("3x3 convolution, stride 2", after, after, here)
        assert seen(f"down_blocks.{level}") == [*stack(before, after, here), halving]
        up = f"up_blocks.{levels - 1 - level}"
        doubling = ("4x4 transposed convolution, stride 2", after, after, here // 2)
        assert seen(up) == [doubling, *stack(2 * after, before, here)]
        assert skips[up] == f"down_blocks.{level}"
    lowest = size >> levels
    middle = stack(widths[-1], widths[-1], lowest)
    assert seen("mid_block") == [*middle, ("channel_attention", widths[-1], widths[-1], lowest), *middle]
    assert seen("head") == [*stack(widths[0], widths[0], size), ("3x3 convolution", widths[0], 6, size)]
    for step in steps:
        assert step.time == (step.name in ("resnet", "convnext"))
        assert step.class_ == (step.name in ("resnet", "convnext", "class_attention"))


def test_the_committed_image_is_of_the_network_as_it_is():
    """Every text in it: all layers with their channels, all sizes and all convolutions."""
    figure = DRAWING["draw_recipe"]("res")
    texts = [text.get_text() for text in figure.axes[0].texts if text.get_text()]
    labels = [step.label() for step in DRAWING["watch"](make("res"))[0]]
    assert all(texts.count(label) == labels.count(label) for label in labels)
    svg = (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")
    # a text of two lines is written as two
    committed = [html.unescape(text) for text in re.findall(r"<text[^>]*>(.*?)</text>", svg)]
    assert sorted(committed) == sorted(line for text in texts for line in text.split("\n"))


def test_the_figure_of_the_code_has_the_arrows_of_the_imports():
    """Which folders import which; utils, configs and pretrained may be imported everywhere."""
    (figure,) = [block for block in read_blocks(ROOT / "docs" / "architecture.md") if block.kind == "figure"]
    drawn = set(re.findall(r"(\w+) --> (\w+)", figure.text))
    folders = {name for arrow in drawn for name in arrow} - {"commands"}
    imported = set()
    for file in [*ROOT.glob("[!_]*.py"), *(file for folder in folders for file in (ROOT / folder).glob("*.py"))]:
        origin = file.parent.name if file.parent != ROOT else "commands"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level != 1:
                target = (node.module or "").removeprefix("imagenet64_diffusion.").split(".")[0]
                if target in folders - {origin}:
                    imported.add((origin, target))
    assert drawn == imported
