"""Plots the network of a recipe from a forward pass.

Writes docs/images/architecture.png and .svg:

    python docs/draw_architecture.py --recipe res
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.models.unet_class_conditional import LAYER_TYPES, Conv2d, ConvTranspose2d, UpBlock
from imagenet64_diffusion.training.components import load_model_config
from imagenet64_diffusion.utils.chart_style import BLUE, DPI, GREEN, PURPLE, SKY_BLUE, VERMILION, save_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGES = Path(__file__).parent / "images"
_COLOURS = {
    "resnet": BLUE,
    "convnext": SKY_BLUE,
    "class_attention": VERMILION,
    "self_attention": PURPLE,
    "channel_attention": GREEN,
}
_GREY, _PALE, _INK, _LINE = "#777777", "#f4f4f4", "#222222", "#555555"
_TIME, _CLASS = "#000000", "#F0E442"
_STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "architecture"}

# in units of the axes, which are inches but for a factor
_LAYER_HEIGHT, _LAYER_GAP, _BLOCK_WIDTH, _HEADER, _ROW_GAP = 0.30, 0.06, 3.9, 0.36, 0.62


@dataclass(frozen=True)
class Step:
    """A layer or a convolution that the images went through.

    Attributes:
        block: The part of the network that it belongs to, by its name, such as ``down_blocks.0``.
        name: Its layer type, or what kind of convolution it is.
        in_channels: Channels of its input; likewise ``out_channels``.
        in_size: Height and width of its input; likewise ``out_size``.
        hears_time: Whether it has a projection of the time embedding.
        hears_class: Whether it has projections of the class embedding.
    """

    block: str
    name: str
    in_channels: int
    out_channels: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    hears_time: bool = False
    hears_class: bool = False


@dataclass(frozen=True)
class Architecture:
    """What a pass through a network was like.

    Attributes:
        steps: In the order in which they ran.
        skips: Block on the way up -> the block on the way down whose features it is given.
    """

    steps: tuple[Step, ...]
    skips: dict[str, str]

    def of(self, block: str) -> list[Step]:
        """The steps of one block."""
        return [step for step in self.steps if step.block == block]


def watch(unet: ClassConditionalUNet2DModel) -> Architecture:
    """What one image goes through in a network, found by running it.

    Args:
        unet: The network, on the CPU or on the device ``meta``, where it runs without numbers.
    """
    names = {module: name for name, module in unet.named_modules()}
    layer_names = {layer_class: name for name, layer_class in LAYER_TYPES.items()}
    steps: list[Step] = []
    given: dict[int, str] = {}  # id of a skip connection -> the block that gave it
    kept: list[torch.Tensor] = []  # a tensor that were freed could leave its id to another
    skips: dict[str, str] = {}

    def on_layer(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        block = ".".join(names[module].split(".")[:2]) if "blocks." in names[module] else names[module].split(".")[0]
        hears_time = getattr(module, "time_projection", None) is not None
        hears_class = any(getattr(module, part, None) is not None for part in ("class_projection", "query"))
        before, after = arguments[0].shape, output.shape
        name = layer_names.get(type(module)) or _convolution(module)
        steps.append(
            Step(block, name, before[1], after[1], tuple(before[2:]), tuple(after[2:]), hears_time, hears_class)
        )

    def on_down(module: nn.Module, arguments: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        kept.append(output[1])
        given[id(output[1])] = names[module]

    def on_up(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        skips[names[module]] = given[id(arguments[1])]

    hooks = [block.register_forward_hook(on_down) for block in unet.down_blocks]
    hooks += [block.register_forward_hook(on_up) for block in unet.modules() if isinstance(block, UpBlock)]
    layers = [module for module in unet.modules() if type(module) in layer_names]
    inside = {part for layer in layers for part in layer.modules() if part is not layer}
    convolutions = [part for part in unet.modules() if isinstance(part, (Conv2d, ConvTranspose2d))]
    hooks += [part.register_forward_hook(on_layer) for part in (*layers, *convolutions) if part not in inside]
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    try:
        with torch.no_grad():
            unet(torch.zeros(1, unet.config.in_channels, height, width, device=unet.device), 0)
    finally:
        for hook in hooks:
            hook.remove()
    return Architecture(tuple(steps), skips)


def _convolution(module: nn.Module) -> str:
    kernel = "x".join(map(str, module.kernel_size))
    stride = f", stride {module.stride[0]}" if module.stride[0] > 1 else ""
    return f"{kernel} {'transposed ' if isinstance(module, ConvTranspose2d) else ''}convolution{stride}"


def label(step: Step) -> str:
    """The label of a step, such as ``resnet  128 → 256``."""
    name = step.name.replace("_", " ")
    if step.in_channels == step.out_channels:
        return f"{name}  {step.out_channels}"
    return f"{name}  {step.in_channels} → {step.out_channels}"


def draw(architecture: Architecture, config: dict, title: str) -> "Figure":
    """The figure: down on the left, up on the right, what goes across between them.

    Args:
        architecture: What is shown.
        config: Of the network, for the embeddings.
        title: Above the figure.
    """
    from matplotlib.figure import Figure

    downs = [name for name in dict.fromkeys(step.block for step in architecture.steps) if name.startswith("down")]
    ups = {down: up for up, down in architecture.skips.items()}
    row_height = _height(len(architecture.of(downs[0])) - 1) + _ROW_GAP
    middle = architecture.of("mid_block")
    half = (len(middle) - 1) // 2
    top_height = max(_height(1), _height(len(architecture.of("head")))) + _ROW_GAP
    total = top_height + len(downs) * row_height + _height(half) + 2.6
    left, right, width = 0.3, 8.3, 12.5
    figure = Figure(figsize=(width, total * 0.96), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, total))
    axes.axis("off")

    axes.text(left, total - 0.4, title, fontsize=14, fontweight="bold", color=_INK)
    _draw_embeddings(axes, config, left, total - 0.87)
    top = total - 2.3

    # 1. the stem and the head, at the top
    head = architecture.of("head")
    stem = architecture.of("conv_in")
    bottom = top - top_height + _ROW_GAP
    # the stem stands at the lower edge of its row, next to what follows
    _draw_block(axes, left, bottom + _height(1), f"stem · {_size(stem[0])}", stem)
    _draw_block(axes, right, bottom + _height(len(head)), f"head · {_size(head[0])}", head)
    channels = config["in_channels"]
    for x, y, text, up in (
        (left + 1.95, bottom + _height(1), f"noisy image  {channels}", False),
        (right + 1.95, bottom + _height(len(head)), f"prediction  {channels}, variance  {channels}", True),
    ):
        ends = ((x, y + 0.4), (x, y))
        _draw_arrow(axes, *(reversed(ends) if up else ends))
        axes.text(x, y + 0.5, text, ha="center", va="bottom", color=_INK)
    above_left = above_right = bottom

    # 2. a row for each level
    for number, down in enumerate(downs, start=1):
        up = ups[down]
        *layers, halving = architecture.of(down)
        doubling, *up_layers = architecture.of(up)
        row_top = top - top_height - (number - 1) * row_height
        row_bottom = row_top - _height(len(layers))
        _draw_block(axes, left, row_top, f"{down.replace('_blocks.', ' ')} · {_size(layers[0])}", layers)
        _draw_block(axes, right, row_top, f"{up.replace('_blocks.', ' ')} · {_size(up_layers[0])}", up_layers)
        _draw_arrow(axes, (left + 1.95, above_left), (left + 1.95, row_top))
        _draw_arrow(axes, (right + 1.95, row_top), (right + 1.95, above_right))
        y = (row_top + row_bottom) / 2
        _draw_arrow(axes, (left + _BLOCK_WIDTH, y), (right, y))
        # the skip comes second in the concatenation
        text = f"skip  {layers[-1].out_channels}\njoins {doubling.out_channels} as {up_layers[0].in_channels}"
        axes.text((left + _BLOCK_WIDTH + right) / 2, y + 0.07, text, ha="center", va="bottom", color=_INK)
        # both toward the middle of the figure
        for x, side, step in ((left + 2.1, "left", halving), (right + 1.8, "right", doubling)):
            axes.text(x, row_bottom - _ROW_GAP / 2, label(step), ha=side, va="center", color=_LINE)
        above_left, above_right = row_bottom, row_bottom

    # 3. the middle, whose stacks stand side by side
    row_top = top - top_height - len(downs) * row_height
    row_bottom = row_top - _height(half)
    axes.add_patch(_box(left, row_bottom, right + _BLOCK_WIDTH - left, _height(half), _PALE, _LINE))
    axes.text(width / 2, row_top - 0.2, f"mid · {_size(middle[0])}", ha="center", va="center", fontweight="bold")
    for x, steps in ((left, middle[:half]), ((left + right) / 2, middle[half:-half]), (right, middle[-half:])):
        first = row_top - _HEADER - (half - len(steps)) / 2 * (_LAYER_HEIGHT + _LAYER_GAP)
        _draw_steps(axes, x, first, steps)
    between = row_top - _HEADER - (half * (_LAYER_HEIGHT + _LAYER_GAP) - _LAYER_GAP) / 2
    _draw_arrow(axes, (left + 3.8, between), ((left + right) / 2 + 0.1, between))
    _draw_arrow(axes, ((left + right) / 2 + 3.8, between), (right + 0.1, between))
    _draw_arrow(axes, (left + 1.95, above_left), (left + 1.95, row_top))
    _draw_arrow(axes, (right + 1.95, row_top), (right + 1.95, above_right))
    return figure


def _draw_embeddings(axes: "Axes", config: dict, left: float, y: float) -> None:
    """The way of timestep and class to the layers, which their dots stand for."""
    time, classes = config["time_embed_dim"], config["num_class_embeds"]
    encoding = config["time_embedding_type"].replace("_", " ")
    texts = [f"timestep → {encoding} encoding {time} → Linear, GELU, Linear → time embedding {time}: scales features"]
    if classes is not None:
        texts.append(
            f"class → table of {classes:,} rows and a null row of zeros → class embedding {config['class_embed_dim']}:"
            " shifts features, makes the matrix of class attention"
        )
    for number, (text, colour) in enumerate(zip(texts, (_TIME, _CLASS), strict=False)):
        axes.scatter([left + 0.1], [y - 0.33 * number], s=36, color=colour, edgecolors=_INK, linewidths=0.6)
        axes.text(left + 0.3, y - 0.33 * number, text, va="center", color=_INK)


def _draw_block(axes: "Axes", x: float, top: float, header: str, steps: list[Step]) -> None:
    height = _height(len(steps))
    axes.add_patch(_box(x, top - height, _BLOCK_WIDTH, height, _PALE, _LINE))
    axes.text(x + _BLOCK_WIDTH / 2, top - 0.2, header, ha="center", va="center", fontweight="bold", color=_INK)
    _draw_steps(axes, x, top - _HEADER, steps)


def _draw_steps(axes: "Axes", x: float, top: float, steps: list[Step]) -> None:
    for number, step in enumerate(steps):
        y = top - number * (_LAYER_HEIGHT + _LAYER_GAP) - _LAYER_HEIGHT
        axes.add_patch(_box(x + 0.1, y, _BLOCK_WIDTH - 0.2, _LAYER_HEIGHT, _COLOURS.get(step.name, _GREY), "none"))
        middle = y + _LAYER_HEIGHT / 2
        axes.text(x + 0.25, middle - 0.01, label(step), va="center", color="white", fontweight="bold")
        dots = [colour for colour, hears in ((_TIME, step.hears_time), (_CLASS, step.hears_class)) if hears]
        for place, colour in enumerate(dots):
            axes.scatter(
                [x + _BLOCK_WIDTH - 0.3 - 0.24 * (len(dots) - 1 - place)],
                [middle],
                s=36,
                color=colour,
                edgecolors="white",
                linewidths=0.8,
                zorder=3,
            )


def _draw_arrow(axes: "Axes", start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": _LINE, "shrinkA": 0, "shrinkB": 0})


def _box(x: float, y: float, width: float, height: float, colour: str, edge: str):
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.06", facecolor=colour, edgecolor=edge, linewidth=1
    )


def _height(steps: int) -> float:
    return _HEADER + steps * (_LAYER_HEIGHT + _LAYER_GAP) + 0.06


def _size(step: Step) -> str:
    return "x".join(map(str, step.in_size))


def draw_recipe(recipe: str) -> "Figure":
    """The figure of a recipe; ``res`` and so on, as for train_imagenet64.py."""
    import matplotlib as mpl

    config = {key: value for key, value in load_model_config(recipe).items() if not key.startswith("_")}
    with torch.device("meta"):
        unet = ClassConditionalUNet2DModel(**config)
    title = f"{recipe}: {sum(weight.numel() for weight in unet.parameters()) / 1e6:.1f} M parameters"
    with mpl.rc_context(_STYLE):
        return draw(watch(unet), dict(unet.config), title)


def main() -> None:
    """The command line."""
    import matplotlib as mpl

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="res", help="as for train_imagenet64.py (default: res)")
    parser.add_argument("--output", type=Path, default=IMAGES / "architecture", help="the files, without ending")
    options = parser.parse_args()
    figure = draw_recipe(options.recipe)
    with mpl.rc_context(_STYLE):
        for ending in (".png", ".svg"):
            save_figure(figure, options.output.with_suffix(ending))


if __name__ == "__main__":
    main()
