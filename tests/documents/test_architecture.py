"""The figures of the network and of the code show what is there."""

import ast
import html
import re
import runpy

import torch

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.tests.documents.pages import ROOT, read_blocks
from imagenet64_diffusion.training.components import load_model_config


DRAWING = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))


def test_the_committed_image_is_of_the_network_as_it_is():
    """Every text in it: all layers with their channels, all sizes and all convolutions."""
    figure = DRAWING["draw_recipe"]("res")
    texts = [text.get_text() for text in figure.axes[0].texts if text.get_text()]
    with torch.device("meta"):
        unet = ClassConditionalUNet2DModel.from_config(load_model_config("res"))
    labels = [step.label() for step in DRAWING["watch"](unet)[0]]
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
