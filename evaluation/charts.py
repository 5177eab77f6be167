"""The table of a sweep as charts: FID over the training, its minima, and what guidance and steps do to the metrics."""

import math
import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ..utils.chart_style import COLOURS, DPI, finish_axes, save_figure
from .metrics import METRICS
from .options import GRID_OPTIONS


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
"""An entry of the table: column -> value, where a metric that was not computed is missing or None."""

_MAIN = "fid"
_SETTINGS = {
    "guidance_scale": "guidance scale (1: none)",
    "num_inference_steps": "denoising steps",
    "step_size": "step size",
}
_MARKERS, _DASHES = "os^DvPX<>p*h", ("-", "--", ":", "-.")
# text in an SVG can be searched, the same rows make the same file, and names are no formulas
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "sweep", "text.parse_math": False}


def make_sweep_charts(rows: list[Row], folder: Path) -> list[Path]:
    """Makes those charts for which the rows have enough, each as PNG and SVG.

    ``fid_over_steps_<family>`` for each family with at least two steps: FID over the training step, a line for each
    sampler. ``fid_minima``, if these are more than one: the lowest FID of each family with each sampler.
    ``trade_offs``: of each family's best checkpoint the metrics over the guidance scale and the denoising steps.

    Args:
        rows: Entries with the columns ``model``, ``family``, ``step`` (optimizer steps or None), ``sampler`` (its
            title), ``num_images``, ``protocol``, the fields of `Sampler` and metrics. Those without a finite
            ``fid`` are passed over.
        folder: Where the charts go, by atomic writes.

    Returns:
        The PNG files, beside each of which lies the SVG of the same name.

    Raises:
        OSError: If a file cannot be written.
    """
    rows = [row for row in rows if _is_number(row.get(_MAIN))]
    if not rows:
        return []
    # importing it takes a second
    import matplotlib

    families = list(dict.fromkeys(row["family"] for row in rows))
    names = short_names(families)
    # a sampler looks the same in every chart
    looks = {sampler: _look(number) for number, sampler in enumerate(dict.fromkeys(row["sampler"] for row in rows))}
    figures: dict[str, Figure] = {}
    with matplotlib.rc_context(_STYLE):
        for family, slug in slugs(families).items():
            trained = [row for row in rows if row["family"] == family and row["step"] is not None]
            if len({row["step"] for row in trained}) > 1:
                figures[f"{_MAIN}_over_steps_{slug}"] = _plot_over_steps(trained, names[family], looks)
        minima = lowest(rows)
        if len(minima) > 1:
            figures[f"{_MAIN}_minima"] = _plot_minima(minima, rows, names, looks)
        lines = {family: trade_offs(rows, family) for family in families}
        if any(lines.values()):
            figures["trade_offs"] = _plot_trade_offs(
                {family: each for family, each in lines.items() if each}, rows, names
            )
        for name, figure in figures.items():
            for ending in ("svg", "png"):
                save_figure(figure, folder / f"{name}.{ending}")
    return [folder / f"{name}.png" for name in figures]


def lines_over_steps(rows: Iterable[Row]) -> dict[str, list[tuple[int, float]]]:
    """Sampler -> its steps in rising order, each with the lowest FID at it."""
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        line = lines.setdefault(row["sampler"], {})
        line[row["step"]] = min(row[_MAIN], line.get(row["step"], math.inf))
    return {sampler: sorted(line.items()) for sampler, line in lines.items()}


def lowest(rows: Iterable[Row]) -> dict[tuple[str, str], tuple[float, int | None]]:
    """(family, sampler) -> the lowest FID over the checkpoints, and the first step that has it."""
    minima: dict[tuple[str, str], tuple[float, int | None]] = {}
    for row in rows:
        found = minima.setdefault((row["family"], row["sampler"]), (row[_MAIN], row["step"]))
        if (row[_MAIN], row["step"] or 0) < (found[0], found[1] or 0):
            minima[row["family"], row["sampler"]] = (row[_MAIN], row["step"])
    return minima


def trade_offs(rows: list[Row], family: str) -> dict[str, dict[str, list[Row]]]:
    """Setting -> line -> rows of the family's best checkpoint, by rising setting, between which it alone changes.

    The best checkpoint is that with the lowest FID of those that have such lines, which have at least two rows.
    """
    checkpoints: dict[str, list[Row]] = {}
    for row in sorted((row for row in rows if row["family"] == family), key=lambda row: row[_MAIN]):
        checkpoints.setdefault(row["model"], []).append(row)
    for of_model in checkpoints.values():
        found = {setting: _lines(of_model, setting) for setting in _SETTINGS}
        if any(found.values()):
            return {setting: lines for setting, lines in found.items() if lines}
    return {}


def _lines(rows: list[Row], setting: str) -> dict[str, list[Row]]:
    groups: dict[tuple[str, ...], dict[float, Row]] = {}
    for row in rows:
        if row.get(setting) is not None:
            others = tuple(str(row.get(name)) for name in GRID_OPTIONS if name != setting and not _unguided(row, name))
            groups.setdefault(others, {}).setdefault(row[setting], row)
    if setting == "guidance_scale":
        # without guidance its interval does not matter: such a row begins the line of each interval
        for others in [key for key, line in groups.items() if max(line) <= 1]:
            same = [key for key in groups if key != others and (*key[:3], *key[4:]) == others]
            for key in same:
                groups[key] = groups[others] | groups[key]
    long = [sorted(line.items()) for line in groups.values() if len(line) > 1]
    # a line is called by its sampler without the setting that changes along it
    words = {"guidance_scale": (r"guidance [^ ,]+", "guided")}.get(setting, (r", (\d+ steps|step size \d+)", ""))
    return {re.sub(*words, line[-1][1]["sampler"]): [row for _, row in line] for line in long}


def _unguided(row: Row, name: str) -> bool:
    return name == "guidance_interval" and (row.get("guidance_scale") or 1) <= 1


def short_names(names: list[str]) -> dict[str, str]:
    """For each path or id its last parts, as many as no other has."""
    found = {}
    for name in names:
        parts = PurePath(name).parts
        tails = ["/".join(part.strip("/") for part in parts[-length:]) for length in range(1, len(parts) + 1)]
        others = [f"/{other}" for other in names if other != name]
        found[name] = (
            next((tail for tail in tails if not any(each.endswith(f"/{tail}") for each in others)), name) or name
        )
    return found


def slugs(names: list[str]) -> dict[str, str]:
    """For each path or id a part of a file name, of ASCII letters, digits and ``_.-``; all are different."""
    found: dict[str, str] = {}
    for name, tail in short_names(names).items():
        slug = base = re.sub(r"[^A-Za-z0-9_.-]+", "-", tail).strip("-.")[-80:] or "family"
        number = 2
        # some file systems do not tell capitals from small letters
        while slug.lower() in map(str.lower, found.values()):
            slug, number = f"{base}-{number}", number + 1
        found[name] = slug
    return found


def conditions(rows: list[Row]) -> str:
    """What the numbers hold for, such as ``clean protocol, 10,000 to 50,000 images``."""
    protocols = " and ".join(dict.fromkeys(str(row["protocol"]) for row in rows))
    counts = sorted({row["num_images"] for row in rows})
    numbers = " to ".join(f"{count:,}" for count in dict.fromkeys(counts[:1] + counts[-1:]))
    return f"{protocols} protocol, {numbers} images"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _figure(
    title: str, rows: list[Row], height: float, columns: int = 1, lines: int = 1
) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, height), dpi=DPI, layout="constrained")
    figure.suptitle(f"{title}\n{conditions(rows)}", fontsize=15)
    return figure, list(figure.subplots(lines, columns, squeeze=False).ravel())


def _look(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of a line; those of the first 84 numbers differ."""
    dashes = _DASHES[number // len(COLOURS) % len(_DASHES)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": _MARKERS[number % len(_MARKERS)], "linestyle": dashes}


def _legend(axes: "Axes", **options: Any) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9, **options)


def _plot_over_steps(rows: list[Row], family: str, looks: dict[str, dict[str, Any]]) -> "Figure":
    lines = lines_over_steps(rows)
    figure, (axes,) = _figure(f"{family}: {METRICS[_MAIN].label} over the training", rows, 6 + 0.12 * len(lines))
    values = [value for line in lines.values() for _, value in line]
    finish_axes(axes, METRICS[_MAIN].direction, (min(values), max(values)))
    for sampler, line in lines.items():
        step, value = min(line, key=lambda point: (point[1], point[0]))
        axes.plot(*zip(*line, strict=True), **looks[sampler], label=f"{sampler}: {value:.4g} at {step:,}")
        axes.plot(step, value, **looks[sampler] | {"linestyle": ""}, markersize=10, mec="white")
    axes.set_xlabel("training (optimizer steps)", fontsize=12)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _legend(axes, title=f"sampler: lowest {METRICS[_MAIN].label} at step", alignment="left")
    return figure


def _plot_minima(
    minima: dict[tuple[str, str], tuple[float, int | None]],
    rows: list[Row],
    names: dict[str, str],
    looks: dict[str, dict[str, Any]],
) -> "Figure":
    minima = {key: minima[key] for family in names for key in minima if key[0] == family}
    figure, (axes,) = _figure(f"Lowest {METRICS[_MAIN].label} by model and sampler", rows, 1.8 + 0.3 * len(minima))
    finish_axes(axes, "", None)
    axes.grid(visible=False)
    values = [value for value, _ in minima.values()]
    bars = axes.barh(range(len(minima)), values, color=[looks[sampler]["color"] for _, sampler in minima])
    told = [f"{value:.4g}" + ("" if step is None else f" at step {step:,}") for value, step in minima.values()]
    axes.bar_label(bars, told, padding=4)
    axes.set_yticks(range(len(minima)), [f"{names[family]}: {sampler}" for family, sampler in minima])
    axes.invert_yaxis()
    axes.set_xlim(min(0, 1.1 * min(values)), 1.25 * max(0, *values) or 1)
    axes.set_xlabel(METRICS[_MAIN].direction, fontsize=12)
    return figure


def _plot_trade_offs(
    found: dict[str, dict[str, dict[str, list[Row]]]], rows: list[Row], names: dict[str, str]
) -> "Figure":
    panels = []
    for family, settings in found.items():
        for setting, lines in settings.items():
            every = [row for line in lines.values() for row in line]
            has = {name for name in METRICS if all(_is_number(row.get(name)) for row in every)}
            panels += [(family, setting, _MAIN, lines)]
            if {"precision", "recall"} <= has:
                panels += [(family, "recall", "precision", lines)]
            elif "class_accuracy" in has:
                panels += [(family, setting, "class_accuracy", lines)]
    columns = min(2, len(panels))
    count = math.ceil(len(panels) / columns)
    figure, all_axes = _figure("What guidance and denoising steps change", rows, 1 + 4.5 * count, columns, count)
    looks: dict[str, dict[str, Any]] = {}
    for axes, (family, x, y, lines) in zip(all_axes, panels, strict=False):
        values = [row[y] for line in lines.values() for row in line]
        finish_axes(axes, METRICS[y].direction, (min(values), max(values)), may_be_logarithmic=y == _MAIN)
        for sampler, line in lines.items():
            look = looks.setdefault(sampler, _look(len(looks)))
            axes.plot([row[x] for row in line], [row[y] for row in line], **look, label=sampler)
        step = next(iter(lines.values()))[0]["step"]
        axes.set_xlabel(_SETTINGS.get(x, "recall, along the lines of the panel before"), fontsize=12)
        axes.set_title(
            names[family] + ("" if step is None else f", step {step:,}"), pad=14 * math.ceil(len(lines) / 2) + 8
        )
        _legend(axes)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    return figure
