"""Plots the network of a recipe from a forward pass, into docs/images/architecture.png and .svg."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import nn

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.models.unet_class_conditional import LAYER_TYPES, UpBlock
from imagenet64_diffusion.training.components import load_model_config
from imagenet64_diffusion.utils.chart_style import BLUE, DPI, GREEN, PURPLE, SKY_BLUE, VERMILION, save_figure


COLOURS = {"resnet": BLUE, "convnext": SKY_BLUE, "class_attention": VERMILION, "self_attention": PURPLE}
COLOURS["channel_attention"] = GREEN
GREY, PALE, INK, LINE, TIME, CLASS = "#777777", "#f4f4f4", "#222222", "#555555", "#000000", "#F0E442"
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "architecture"}
# in inches: left edges of the two columns, width of the figure, of a block, height of a layer, and what is around them
LEFT, RIGHT, WIDTH, BLOCK, LAYER, GAP, HEADER, ROW_GAP = 0.3, 8.3, 12.5, 3.9, 0.30, 0.06, 0.36, 0.62


class Step(NamedTuple):
    """A layer or a convolution, in which part of the network, and whether it projects an embedding."""

    block: str
    name: str
    in_channels: int
    out_channels: int
    in_size: tuple[int, ...]
    time: bool
    class_: bool

    def label(self) -> str:
        """Such as ``resnet  128 → 256``."""
        widths = dict.fromkeys((self.in_channels, self.out_channels))
        return f"{self.name.replace('_', ' ')}  {' → '.join(map(str, widths))}"


def watch(unet: ClassConditionalUNet2DModel) -> tuple[list[Step], dict[str, str]]:
    """The steps of an image through a network, and block on the way up -> block whose features it gets."""
    names = {module: name for name, module in unet.named_modules()}
    layer_names = {layer_class: name for name, layer_class in LAYER_TYPES.items()}
    steps: list[Step] = []
    skips: dict[str, str] = {}
    given: list[tuple[torch.Tensor, str]] = []  # skip connections and the blocks that gave them

    def on_step(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        block = ".".join(names[module].split(".")[: 2 if "blocks." in names[module] else 1])
        name = layer_names.get(type(module))
        if name is None:
            kind = "transposed convolution" if isinstance(module, nn.ConvTranspose2d) else "convolution"
            name = f"{'x'.join(map(str, module.kernel_size))} {kind}"
            name += f", stride {module.stride[0]}" if module.stride[0] > 1 else ""
        time, *classes = (
            getattr(module, part, None) is not None for part in ("time_projection", "class_projection", "query")
        )
        channels, *size = arguments[0].shape[1:]
        steps.append(Step(block, name, channels, output.shape[1], tuple(size), time, any(classes)))

    def on_up(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        skips[names[module]] = next(name for tensor, name in given if tensor is arguments[1])

    layers = [module for module in unet.modules() if type(module) in layer_names]
    inside = {part for layer in layers for part in layer.modules() if part is not layer}
    for module in unet.modules():
        if module in unet.down_blocks:
            module.register_forward_hook(lambda block, _, output: given.append((output[1], names[block])))
        elif isinstance(module, UpBlock):
            module.register_forward_hook(on_up)
        elif module not in inside and (module in layers or isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))):
            module.register_forward_hook(on_step)
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    with torch.no_grad():
        unet(torch.zeros(1, unet.config.in_channels, height, width, device=unet.device), 0)
    return steps, skips


def draw(steps: list[Step], skips: dict[str, str], config: dict[str, Any], title: str) -> Figure:
    """The figure: down on the left, up on the right, skip connections between them."""
    blocks: dict[str, list[Step]] = {}
    for step in steps:
        blocks.setdefault(step.block, []).append(step)
    downs = [name for name in blocks if name.startswith("down")]
    ups = {down: up for up, down in skips.items()}
    stem, head, middle = blocks["conv_in"], blocks["head"], blocks["mid_block"]
    half = (len(middle) - 1) // 2
    row = height_of(len(blocks[downs[0]]) - 1) + ROW_GAP
    total = height_of(len(head)) + ROW_GAP + len(downs) * row + height_of(half) + 2.6
    figure = Figure(figsize=(WIDTH, total * 0.96), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, total))
    axes.axis("off")

    def text(x: float, y: float, words: str, **options: Any) -> None:
        axes.text(x, y, words, **{"color": INK, "va": "center", **options})

    text(LEFT, total - 0.35, title, fontsize=14, fontweight="bold")
    encoding, time = config["time_embedding_type"].replace("_", " "), config["time_embed_dim"]
    lines = {
        TIME: f"timestep → {encoding} encoding {time} → Linear, GELU, Linear → time embedding {time}: scales features"
    }
    if config["num_class_embeds"] is not None:
        table = f"class → table of {config['num_class_embeds']:,} rows and a null row of zeros"
        use = "shifts features, makes the matrix of class attention"
        lines[CLASS] = f"{table} → class embedding {config['class_embed_dim']}: {use}"
    for number, (colour, line) in enumerate(lines.items()):
        axes.scatter([LEFT + 0.1], [total - 0.87 - 0.33 * number], s=36, color=colour, edgecolors=INK, linewidths=0.6)
        text(LEFT + 0.3, total - 0.87 - 0.33 * number, line)

    # 1. the stem and the head, which end at the same height
    bottom = total - 2.3 - height_of(len(head))
    channels = config["in_channels"]
    outputs = f"prediction  {channels}, variance  {channels}"
    for x, name, own, words in ((LEFT, "stem", stem, f"noisy image  {channels}"), (RIGHT, "head", head, outputs)):
        top, middle_x = bottom + height_of(len(own)), x + BLOCK / 2
        draw_block(axes, x, top, name, own)
        draw_arrow(axes, *((middle_x, top + 0.4), (middle_x, top))[:: 1 if own is stem else -1])
        text(middle_x, top + 0.5, words, ha="center", va="bottom")
    # 2. a row for each level
    for down in downs:
        *layers, halving = blocks[down]
        doubling, *up_layers = blocks[ups[down]]
        top = bottom - ROW_GAP
        draw_block(axes, LEFT, top, down.replace("_blocks.", " "), layers)
        draw_block(axes, RIGHT, top, ups[down].replace("_blocks.", " "), up_layers)
        draw_vertical_arrows(axes, bottom, top)
        bottom = top - height_of(len(layers))
        y = (top + bottom) / 2
        draw_arrow(axes, (LEFT + BLOCK, y), (RIGHT, y))
        # the skip connection comes second in the concatenation
        words = f"skip  {layers[-1].out_channels}\njoins {doubling.out_channels} as {up_layers[0].in_channels}"
        text((LEFT + BLOCK + RIGHT) / 2, y + 0.07, words, ha="center", va="bottom")
        for x, side, step in ((LEFT + 2.1, "left", halving), (RIGHT + 1.8, "right", doubling)):
            text(x, bottom - ROW_GAP / 2, step.label(), ha=side, color=LINE)
    # 3. the middle, whose stacks stand side by side
    top = bottom - ROW_GAP
    draw_box(axes, LEFT, top - height_of(half), RIGHT + BLOCK - LEFT, height_of(half), PALE, LINE)
    text(WIDTH / 2, top - 0.2, f"mid · {size_of(middle)}", ha="center", fontweight="bold")
    centre = (LEFT + RIGHT) / 2
    for x, own in ((LEFT, middle[:half]), (centre, middle[half:-half]), (RIGHT, middle[-half:])):
        draw_steps(axes, x, top - HEADER - (half - len(own)) / 2 * (LAYER + GAP), own)
    y = top - HEADER - (half * (LAYER + GAP) - GAP) / 2
    for x, end in ((LEFT, centre), (centre, RIGHT)):
        draw_arrow(axes, (x + BLOCK - 0.1, y), (end + 0.1, y))
    draw_vertical_arrows(axes, bottom, top)
    return figure


def draw_block(axes: Axes, x: float, top: float, name: str, steps: list[Step]) -> None:
    draw_box(axes, x, top - height_of(len(steps)), BLOCK, height_of(len(steps)), PALE, LINE)
    header = {"ha": "center", "va": "center", "fontweight": "bold", "color": INK}
    axes.text(x + BLOCK / 2, top - 0.2, f"{name} · {size_of(steps)}", **header)
    draw_steps(axes, x, top - HEADER, steps)


def draw_steps(axes: Axes, x: float, top: float, steps: list[Step]) -> None:
    for number, step in enumerate(steps):
        y = top - number * (LAYER + GAP) - LAYER / 2
        draw_box(axes, x + 0.1, y - LAYER / 2, BLOCK - 0.2, LAYER, COLOURS.get(step.name, GREY), "none")
        axes.text(x + 0.25, y - 0.01, step.label(), va="center", color="white", fontweight="bold")
        dots = [colour for colour, hears in ((CLASS, step.class_), (TIME, step.time)) if hears]
        places = [x + BLOCK - 0.3 - 0.24 * place for place in range(len(dots))]
        axes.scatter(places, [y] * len(dots), s=36, color=dots, edgecolors="white", linewidths=0.8, zorder=3)


def draw_vertical_arrows(axes: Axes, above: float, below: float) -> None:
    draw_arrow(axes, (LEFT + BLOCK / 2, above), (LEFT + BLOCK / 2, below))
    draw_arrow(axes, (RIGHT + BLOCK / 2, below), (RIGHT + BLOCK / 2, above))


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": LINE, "shrinkA": 0, "shrinkB": 0})


def draw_box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, edge: str) -> None:
    style = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": colour, "edgecolor": edge}
    axes.add_patch(FancyBboxPatch((x, y), width, height, **style))


def height_of(steps: int) -> float:
    return HEADER + steps * (LAYER + GAP) + 0.06


def size_of(steps: list[Step]) -> str:
    return "x".join(map(str, steps[0].in_size))


def draw_recipe(recipe: str) -> Figure:
    """The figure of a recipe, named as for train_imagenet64.py."""
    config = {key: value for key, value in load_model_config(recipe).items() if not key.startswith("_")}
    with torch.device("meta"):
        unet = ClassConditionalUNet2DModel(**config)
    title = f"{recipe}: {unet.num_parameters() / 1e6:.1f} M parameters"
    return draw(*watch(unet), dict(unet.config), title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="res", help="as for train_imagenet64.py (default: res)")
    output = Path(__file__).parent / "images" / "architecture"
    parser.add_argument("--output", type=Path, default=output, help="the files, without ending")
    options = parser.parse_args()
    mpl.rcParams.update(STYLE)
    for ending in (".png", ".svg"):
        save_figure(draw_recipe(options.recipe), options.output.with_suffix(ending))


if __name__ == "__main__":
    main()
