"""The course of a training run as a picture, drawn from its log."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..utils.chart_style import BLACK, BLUE, DPI, GREEN, ORANGE, PURPLE, VERMILION, finish_axes, save_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUARTERS = ("loss_quarter_1", "loss_quarter_2", "loss_quarter_3", "loss_quarter_4")
METRICS = ("step", "loss", *QUARTERS, "gradient_norm", "lr")

_WIDTH, _HEIGHT = 1200, 1000
_MAX_POINTS = 2000
_LOSS_COLOUR = BLUE
_QUARTER_COLOURS = (VERMILION, ORANGE, GREEN, BLUE)
_GRADIENT_COLOUR, _RATE_COLOUR = PURPLE, BLACK


def read_metrics(metrics_file: Path, max_entries: int = 20_000) -> dict[str, np.ndarray]:
    """The entries of a training log as columns.

    Args:
        metrics_file: A file with one JSON object a line, which has at least the ``step``. A line that is not
            one, such as the last one of a run that was killed, is passed over.
        max_entries: Of a longer log only so many lines are read, evenly spread up to the last one.

    Returns:
        For each of `METRICS` its values in the order of the lines, float64 (entries,), NaN where an entry has
        none; no entries if there is no such file.
    """
    rows = []
    lines = metrics_file.read_bytes().splitlines() if metrics_file.is_file() else []
    stride = max(1, math.ceil(len(lines) / max_entries))
    for line in lines[(len(lines) - 1) % stride :: stride]:
        try:
            entry = json.loads(line)
            rows.append([float(entry["step"]), *(_number(entry.get(name)) for name in METRICS[1:])])
        except (ValueError, TypeError, KeyError):
            continue
    columns = np.array(rows, dtype=np.float64).reshape(-1, len(METRICS)).T
    return dict(zip(METRICS, columns, strict=True))


def smooth(values: np.ndarray) -> np.ndarray:
    """An exponential average whose memory grows with the run.

    The k-th of the n finite values v_k moves the average by (v_k - average) / m_k, where m_k, the number of
    values that it remembers, is k / 5, but at least 1 and at most sqrt(n). So the first values, which are the
    largest, are soon forgotten, and the more values there are, the smoother is the average and the smaller
    its lag beside them.

    Args:
        values: float64 (entries,), of which those that are not finite leave the average as it was.

    Returns:
        The average after each entry, float64 (entries,), NaN before the first finite one.
    """
    finite = np.isfinite(values)
    longest = math.sqrt(finite.sum())
    average, averages = 0.0, []
    for number, value in enumerate(values[finite].tolist(), start=1):
        average += (value - average) / max(1.0, min(longest, number / 5))
        averages.append(average)
    # the place of the last finite value up to each entry, 0 before the first
    return np.array([np.nan, *averages])[finite.cumsum()]


def draw_loss_chart(metrics_file: Path, file: Path, title: str = "") -> None:
    """Draws the losses of a run, and below them the norm of its gradient and its learning rate.

    Args:
        metrics_file: The log, as `read_metrics` takes it. Where it is missing or has no entries, nothing is
            drawn and ``file`` stays as it is.
        file: The picture, a PNG of 1200x1000 pixels; it appears whole or not at all.
        title: What stands above.
    """
    metrics = read_metrics(metrics_file)
    if not len(metrics["step"]):
        return
    # loading it takes longer than drawing
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    loss, gradient_norm = smooth(metrics["loss"]), smooth(metrics["gradient_norm"])
    quarters = [smooth(metrics[name]) for name in QUARTERS]
    shown = _thinned(len(loss))
    step = metrics["step"][shown]
    # a single entry makes no line
    line = {"linewidth": 2, "solid_capstyle": "round", "marker": "o" if len(step) <= 30 else None}
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2, "frameon": False, "fontsize": 11}

    figure = Figure(figsize=(_WIDTH / DPI, _HEIGHT / DPI), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(hspace=0.04)
    loss_axes, quarter_axes, gradient_axes = figure.subplots(3, 1, sharex=True, height_ratios=(4, 4, 2))
    if title:
        figure.suptitle(title, fontsize=16)

    loss_axes.plot(step, metrics["loss"][shown], color=_LOSS_COLOUR, alpha=0.3, linewidth=1, label="as logged")
    loss_axes.plot(step, loss[shown], color=_LOSS_COLOUR, label="smoothed", **line)
    finish_axes(loss_axes, "loss", _limits([metrics["loss"], loss]))
    loss_axes.legend(ncols=2, **above)

    # an entry of the legend without a line, which says what the others are shares of
    quarter_axes.plot([], [], " ", label="timesteps from image (0 %) to noise (100 %):")
    for number, (values, colour) in enumerate(zip(quarters, _QUARTER_COLOURS, strict=True)):
        if np.isfinite(values).any():
            last = 100 if number == 3 else 25 * number + 24
            quarter_axes.plot(step, values[shown], color=colour, label=f"{25 * number}\N{EN DASH}{last} %", **line)
    finish_axes(quarter_axes, "smoothed loss by timestep", _limits(quarters))
    if len(quarter_axes.lines) > 1:
        quarter_axes.legend(ncols=5, **above)
    else:
        _say(quarter_axes, "the log has no losses by timestep")

    gradient_axes.plot(step, gradient_norm[shown], color=_GRADIENT_COLOUR, **line)
    finish_axes(gradient_axes, "gradient norm", _limits([gradient_norm]))
    gradient_axes.yaxis.label.set_color(_GRADIENT_COLOUR)
    rate_axes = gradient_axes.twinx()
    rate_axes.plot(
        step, metrics["lr"][shown], color=_RATE_COLOUR, linestyle="--", linewidth=1.5, marker=line["marker"]
    )
    rate_axes.set_ylabel("learning rate", color=_RATE_COLOUR, fontsize=12)
    rate_axes.set_ylim(bottom=0)
    rate_axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    rate_axes.spines["top"].set_visible(False)

    gradient_axes.set_xlabel("optimizer step", fontsize=12)
    gradient_axes.xaxis.set_major_locator(MaxNLocator(8, steps=(1, 2, 2.5, 5, 10), integer=True))
    gradient_axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    margin = 0.01 * np.ptp(step) or 1
    gradient_axes.set_xlim(step.min() - margin, step.max() + margin)
    figure.align_ylabels([loss_axes, quarter_axes, gradient_axes])
    save_figure(figure, file)


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan


def _thinned(count: int) -> np.ndarray:
    """Places of at most `_MAX_POINTS` of so many entries, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, _MAX_POINTS)).round().astype(np.int64))


def _limits(curves: list[np.ndarray]) -> tuple[float, float] | None:
    """Lower and upper end of an axis for these curves, or None if they have no finite value.

    The largest fiftieth of a curve may leave the picture, and what is above three times its ninth tenth:
    these are the first steps of a run, and otherwise accidents.
    """
    curves = [values[np.isfinite(values)] for values in curves]
    curves = [values for values in curves if len(values)]
    if not curves:
        return None
    highs = []
    for values in curves:
        ninth_tenth, high = np.percentile(values, [90, 98])
        highs.append(min(high, 3 * ninth_tenth) if ninth_tenth > 0 else high)
    return min(values.min() for values in curves), max(highs)


def _say(axes: "Axes", text: str) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=12, color="#555555")
