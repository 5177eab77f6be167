"""The table of a sweep as charts: FID over the training, its minima, and what guidance and steps do to the metrics."""

import collections
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ..utils.chart_style import BLUE, COLOURS, DPI, finish_axes, save_figure
from .metrics import METRICS
from .options import INTERVALS, SAMPLER_NAMES


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# an entry of the table: column -> value, without the metrics that were not computed
Row = dict[str, Any]
# title, columns of x and y, and lines by their names
Panel = tuple[str, str, str, Mapping[str, list[Row]]]

_SETTINGS = {
    "guidance_scale": "guidance scale (1: none)",
    "num_inference_steps": "denoising steps",
    "step_size": "step size",
}
_LABELS = {**_SETTINGS, "step": "training (optimizer steps)", "recall": "recall, along the same lines"}
# text in an SVG can be searched, the same rows make the same file, and names are no formulas
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "sweep", "text.parse_math": False}


def make_sweep_charts(rows: list[Row], folder: Path) -> list[Path]:
    """Makes the charts for which there are enough rows with a finite FID, as PNG and SVG, and returns the PNG files.

    ``fid_over_steps_<family>``: FID over the training, a line for each sampler; ``fid_minima``: the lowest FID of each
    family with each sampler; ``trade_offs``: metrics of each family's best checkpoint over guidance and steps.
    """
    rows = [row for row in rows if _has(row, "fid")]
    # importing it takes a second
    import matplotlib

    # line k looks the same in every chart, and the first 28 differ
    dashes = matplotlib.cycler(linestyle=["-", "--", ":", "-."])
    looks = dashes * matplotlib.cycler(color=COLOURS, marker=list("os^DvPX"))
    figures: dict[str, Figure] = {}
    panels: list[Panel] = []
    names = short_names([row["family"] for row in rows])
    with matplotlib.rc_context({**_STYLE, "axes.prop_cycle": looks}):
        for family, name in names.items():
            mine = [row for row in rows if row["family"] == family]
            panels += trade_offs(mine, name)
            trained = [row for row in mine if row["step"] is not None]
            if len({row["step"] for row in trained}) > 1:
                chart = f"fid_over_steps_{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-.')[-80:] or 'family'}"
                # some file systems do not tell capitals from small letters
                chart += f"-{len(figures) + 1}" if chart.lower() in map(str.lower, figures) else ""
                panel = ("sampler: lowest FID at step", "step", "fid", over_steps(trained))
                figures[chart] = _plot(f"{name}: FID over the training", trained, [panel])
        if len(best(rows, "family", "sampler")) > 1:
            figures["fid_minima"] = _plot_minima(rows, names)
        if panels:
            figures["trade_offs"] = _plot("What guidance and denoising steps change", rows, panels)
        for chart, figure in figures.items():
            for ending in ("svg", "png"):
                save_figure(figure, folder / f"{chart}.{ending}")
    return [folder / f"{chart}.png" for chart in figures]


def best(rows: Iterable[Row], *columns: str) -> dict[tuple[Any, ...], Row]:
    """Values of these columns -> the first row with the lowest FID that has them, by rising FID."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: (row["fid"], row["step"] or 0)):
        found.setdefault(tuple(row[column] for column in columns), row)
    return found


def over_steps(rows: list[Row]) -> dict[str, list[Row]]:
    """Each sampler with its lowest FID -> the row of the lowest FID at each of its steps, in their order."""
    lines = {}
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        line = list(best((row for row in rows if row["sampler"] == sampler), "step").values())
        name = f"{sampler}: {line[0]['fid']:.4g} at {line[0]['step']:,}"
        lines[name] = sorted(line, key=lambda row: row["step"])
    return lines


def trade_offs(rows: list[Row], family: str) -> list[Panel]:
    """Panels of the checkpoint with the lowest FID of those that have lines along which one setting alone changes."""
    for (model,), lowest in best(rows, "model").items():
        title = family if lowest["step"] is None else f"{family}, step {lowest['step']:,}"
        panels: list[Panel] = []
        for setting in _SETTINGS:
            lines = _lines([row for row in rows if row["model"] == model], setting)
            for x, y in ((setting, "fid"), ("recall", "precision"), (setting, "class_accuracy")):
                if lines and all(_has(row, x) and _has(row, y) for line in lines.values() for row in line):
                    panels.append((title, x, y, lines))
        if panels:
            return panels
    return []


def _has(row: Row, name: str) -> bool:
    return math.isfinite(row.get(name, math.nan))


def _interval(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in INTERVALS)


def _lines(rows: list[Row], setting: str) -> dict[str, list[Row]]:
    """Name of a line -> its rows, at least two, by rising setting."""
    intervals = {_interval(row) for row in rows if row["guidance_scale"] > 1}
    groups: dict[tuple[Any, ...], dict[float, Row]] = collections.defaultdict(dict)
    for row in (row for row in rows if row[setting] is not None):
        others = [row[name] for name in SAMPLER_NAMES if name not in (setting, *INTERVALS)]
        # without guidance its interval does not matter: such a row begins the line of each interval
        begins_all = setting == "guidance_scale" and row["guidance_scale"] <= 1
        for interval in intervals if begins_all else [_interval(row)]:
            key = (interval, *others)
            groups[key][row[setting]] = row
    lines = [[line[value] for value in sorted(line)] for line in groups.values() if len(line) > 1]
    # a line is called by its sampler without the setting that changes along it
    words = (r"guidance [^ ,]+", "guided") if setting == "guidance_scale" else (r", (\d+ steps|step size \d+)", "")
    return {re.sub(*words, line[-1]["sampler"]): line for line in lines}


def short_names(names: Iterable[str]) -> dict[str, str]:
    """For each path or id its last parts, as many as no other has."""
    parts = {name: PurePath(name).parts or (name,) for name in names}
    found = {}
    for name, mine in parts.items():
        length = 1
        while length < len(mine) and sum(other[-length:] == mine[-length:] for other in parts.values()) > 1:
            length += 1
        found[name] = "/".join(mine[-length:])
    return found


def _figure(title: str, rows: list[Row], height: float, count: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure for so many panels, whose title says what the numbers hold for."""
    from matplotlib.figure import Figure

    protocols = " and ".join(dict.fromkeys(row["protocol"] for row in rows))
    counts = sorted({row["num_images"] for row in rows})
    numbers = " to ".join(f"{number:,}" for number in dict.fromkeys((counts[0], counts[-1])))
    figure = Figure(figsize=(12, height), dpi=DPI, layout="constrained")
    figure.suptitle(f"{title}\n{protocols} protocol, {numbers} images", fontsize=15)
    places = (math.ceil(count / 2), min(2, count))
    return figure, [figure.add_subplot(*places, number + 1) for number in range(count)]


def _plot(title: str, rows: list[Row], panels: list[Panel]) -> "Figure":
    figure, all_axes = _figure(title, rows, 1.5 + 5 * math.ceil(len(panels) / 2), len(panels))
    for axes, (subtitle, x, y, lines) in zip(all_axes, panels, strict=True):
        values = [row[y] for line in lines.values() for row in line]
        finish_axes(axes, METRICS[y].direction, (min(values), max(values)), may_be_logarithmic=y == "fid")
        for name, line in lines.items():
            axes.plot([row[x] for row in line], [row[y] for row in line], label=name)
        axes.set_xlabel(_LABELS[x], fontsize=12)
        if x == "step":
            axes.xaxis.set_major_formatter("{x:,.0f}")
        legend = {"ncols": 2, "frameon": False, "fontsize": 9, "title": subtitle, "alignment": "left"}
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), **legend)
    return figure


def _plot_minima(rows: list[Row], names: Mapping[str, str]) -> "Figure":
    minima = best(rows, "family", "sampler").values()
    figure, (axes,) = _figure("Lowest FID by model and sampler", rows, 1.8 + 0.3 * len(minima))
    finish_axes(axes, "", None)
    axes.grid(visible=False)
    values = [row["fid"] for row in minima]
    bars = axes.barh(range(len(minima)), values, color=BLUE)
    steps = ["" if row["step"] is None else f" at step {row['step']:,}" for row in minima]
    axes.bar_label(bars, [f"{value:.4g}{step}" for value, step in zip(values, steps, strict=True)], padding=4)
    axes.set_yticks(range(len(minima)), [f"{names[row['family']]}: {row['sampler']}" for row in minima])
    axes.invert_yaxis()
    axes.set_xlim(min(0, 1.1 * min(values)), 1.25 * max(0, *values) or 1)
    axes.set_xlabel(METRICS["fid"].direction, fontsize=12)
    return figure
