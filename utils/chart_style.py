"""What the charts of this package have in common: colours, axes, and how they are saved."""

from pathlib import Path
from typing import Any

from .atomic_write import atomic_file


# Of Okabe and Ito's colours, which the colour-blind can tell apart, those that stand out from white.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY_BLUE, BLACK = "#E69F00", "#56B4E9", "#333333"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY_BLUE, BLACK)

DPI = 100


def finish_axes(axes: Any, label: str, limits: tuple[float, float] | None, may_be_logarithmic: bool = True) -> None:
    """Label, grid and y-limits, some room around the least and greatest value; logarithmic if these are far apart."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_ylabel(label, fontsize=12)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if limits is None:
        return
    low, high = limits
    if may_be_logarithmic and low > 0 and high > 3 * low:
        ratio = high / low
        subs = (1, 1.5, 2, 3, 5, 7) if ratio < 10 else (1, 2, 5) if ratio < 1000 else (1,)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(low / ratio**0.05, high * ratio**0.08)
    else:
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - room, high + 1.5 * room)


def save_figure(figure: Any, file: Path) -> None:
    """Writes an image in the format that the file's ending names; the same figure makes the same bytes again."""
    with atomic_file(file) as writing:
        figure.savefig(writing, metadata={"Date": None} if file.suffix == ".svg" else None)
