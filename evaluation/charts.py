"""The table of a sweep as charts: FID over the training, its minima, and what guidance and steps do to it."""

import math
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.chart_style import COLOURS, DPI, finish_axes, save_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Row = dict[str, Any]
"""An entry of the table: column -> value, where a metric that was not computed is missing or None."""

_WIDTH = 1200
_FID = "FID (lower is better)"
_MARKERS = "os^DvPX<>p*h"
_DASHES = ("-", "--", ":", "-.")
_HATCHES = ("", "///", "...", "xxx")
# text in an SVG can be searched and copied, and the same rows make the same file; names are no formulas
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sweep",
    "text.parse_math": False,
    # otherwise small bold figures get thin strokes and look like those of another font
    "text.hinting": "force_autohint",
    "hatch.linewidth": 0.8,
}


def draw_sweep_charts(rows: list[Row], folder: Path) -> list[Path]:
    """Draws those charts for which the rows have enough, each as PNG (1200 pixels wide) and SVG.

    ``fid_over_steps_<family>`` for each family with at least two steps: FID over the training step, a line
    for each sampler. ``fid_minima``, if these are more than one: the lowest FID of each family with each sampler.
    ``trade_offs``: of each family's best checkpoint FID over the guidance scale and over the denoising steps,
    and precision against recall or else class accuracy.

    Args:
        rows: Entries with the columns ``model``, ``family``, ``step`` (optimizer steps or None), ``sampler``
            (its title), ``num_images``, ``protocol``, the fields of `Sampler` and metrics. Those without a finite
            ``fid`` are passed over.
        folder: Where the charts go. Each appears whole or not at all and takes the place of an older one.

    Returns:
        The PNG files, beside each of which lies the SVG of the same name.

    Raises:
        OSError: If a file cannot be written.
    """
    rows = with_fid(rows)
    if not rows:
        return []
    # loading it takes longer than drawing
    import matplotlib

    families = list(dict.fromkeys(row["family"] for row in rows))
    names = short_names(families)
    # a sampler looks the same in every chart
    looks = {sampler: number for number, sampler in enumerate(dict.fromkeys(row["sampler"] for row in rows))}
    files = []
    with matplotlib.rc_context(_STYLE):
        for family, slug in slugs(families).items():
            of_family = [row for row in rows if row["family"] == family and row["step"] is not None]
            if len({row["step"] for row in of_family}) > 1:
                figure = _draw_fid_over_steps(of_family, names[family], looks)
                files.append(_save(figure, folder / f"fid_over_steps_{slug}"))
        minima = fid_minima(rows)
        if sum(map(len, minima.values())) > 1:
            files.append(_save(_draw_minima(minima, rows, names, looks), folder / "fid_minima"))
        trade_offs = find_trade_offs(rows)
        if trade_offs:
            files.append(_save(_draw_trade_offs(trade_offs, names), folder / "trade_offs"))
    return files


# What is drawn


def with_fid(rows: Iterable[Row]) -> list[Row]:
    """The rows whose ``fid`` is a finite number."""
    return [row for row in rows if _is_number(row.get("fid"))]


def fid_over_steps(rows: Iterable[Row]) -> dict[str, tuple[list[int], list[float]]]:
    """The lines of one family: sampler -> its steps in rising order, and the FID at each.

    Where there are several for one step, it is the lowest.

    Args:
        rows: Rows with a step and a FID.
    """
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        line = lines.setdefault(row["sampler"], {})
        line[row["step"]] = min(row["fid"], line.get(row["step"], math.inf))
    return {sampler: (sorted(line), [line[step] for step in sorted(line)]) for sampler, line in lines.items()}


def fid_minima(rows: Iterable[Row]) -> dict[str, dict[str, tuple[float, int | None]]]:
    """Family -> sampler -> the lowest FID over the checkpoints, and the first step that has it.

    Args:
        rows: Rows with a FID.
    """
    minima: dict[str, dict[str, tuple[float, int | None]]] = {}
    for row in rows:
        of_family = minima.setdefault(row["family"], {})
        fid, step = of_family.get(row["sampler"], (math.inf, None))
        if (row["fid"], row["step"] or 0) < (fid, step or 0):
            of_family[row["sampler"]] = (row["fid"], row["step"])
    return minima


@dataclass(frozen=True)
class Panel:
    """Measurements between which one setting of the sampler changes.

    Attributes:
        x: Column along the x-axis: the setting, or ``recall``.
        y: Column along the y-axis: ``fid``, ``precision`` or ``class_accuracy``.
        setting: ``guidance_scale``, ``num_inference_steps`` or ``step_size``.
        lines: Of each line what its other settings are, as far as they differ from the other lines', and its
            points (x, y, setting), at least two, by rising setting.
    """

    x: str
    y: str
    setting: str
    lines: dict[str, list[tuple[float, float, float]]]


@dataclass(frozen=True)
class TradeOffs:
    """What the settings of the sampler change in one checkpoint.

    Attributes:
        family: The training that it comes from.
        rows: Its measurements.
        panels: At least one.
    """

    family: str
    rows: list[Row]
    panels: list[Panel]

    @property
    def best_fid(self) -> float:
        """Its lowest FID."""
        return min(row["fid"] for row in self.rows)


def find_trade_offs(rows: Iterable[Row]) -> list[TradeOffs]:
    """For each family the best checkpoint of those under which guidance or steps were changed.

    Args:
        rows: Rows with a FID.

    Returns:
        Trade-offs of the families that have any. The best checkpoint is that with the lowest FID.
    """
    checkpoints: dict[str, list[Row]] = {}
    for row in rows:
        checkpoints.setdefault(row["model"], []).append(row)
    found: dict[str, TradeOffs] = {}
    for measured in checkpoints.values():
        panels = make_panels(measured)
        if panels:
            trade_offs = TradeOffs(measured[0]["family"], measured, panels)
            best = found.setdefault(trade_offs.family, trade_offs)
            if trade_offs.best_fid < best.best_fid:
                found[trade_offs.family] = trade_offs
    return list(found.values())


def make_panels(rows: list[Row]) -> list[Panel]:
    """The panels of one checkpoint, of which those without a line of two points are left out.

    Args:
        rows: Its rows with a FID.
    """
    candidates = [(name, "fid", name) for name in ("guidance_scale", "num_inference_steps", "step_size")]
    # how diverse and how faithful images are is first of all a matter of guidance, then of the steps
    candidates += [("recall", "precision", setting) for _, _, setting in candidates]
    candidates += [(setting, "class_accuracy", setting) for _, _, setting in candidates[:3]]
    panels: list[Panel] = []
    for x, y, setting in candidates:
        if y == "fid" or all(panel.y == "fid" for panel in panels):
            lines = _lines(rows, x, y, setting)
            if lines:
                panels.append(Panel(x, y, setting, lines))
    return panels


def settings_of(row: Row) -> dict[str, Any]:
    """The sampler of a row, with equal values for what draws equally.

    Guidance by 1 is none and has no interval; where no number of steps is given, it is 100.
    """
    settings = {name: row.get(name) for name in ("scheduler", "num_inference_steps", "step_size", "clip_sample")}
    if not settings["step_size"]:
        settings |= {"num_inference_steps": settings["num_inference_steps"] or 100, "step_size": None}
    scale = 1.0 if row.get("guidance_scale") is None else float(row["guidance_scale"])
    interval = row.get("guidance_interval")
    ends = (0.0, 1.0)
    if scale > 1 and interval:
        begin, end = interval.split() if isinstance(interval, str) else interval
        ends = (float(begin), float(end))
    return settings | {"guidance_scale": scale, "guidance_interval": ends, "eta": float(row.get("eta") or 0.0)}


def _lines(rows: list[Row], x: str, y: str, setting: str) -> dict[str, list[tuple[float, float, float]]]:
    """Lines along a setting; see `Panel`."""
    found: dict[tuple[tuple[str, Any], ...], dict[float, Row]] = {}
    unguided = []
    for row in with_fid(rows):
        settings = settings_of(row)
        value = settings.pop(setting)
        # the row lacks the metric, or says the steps in the other way
        if value is None or not all(name == setting or _is_number(row.get(name)) for name in (x, y)):
            continue
        if setting == "guidance_scale" and value <= 1:
            unguided.append((settings, value, row))
        else:
            _add(found.setdefault(tuple(settings.items()), {}), value, row)
    for settings, value, row in unguided:
        # without guidance its interval does not matter: the row is the beginning of a line for each
        same = [key for key in found if dict(key) | {"guidance_interval": (0.0, 1.0)} == settings]
        for key in same or [tuple(settings.items())]:
            _add(found.setdefault(key, {}), value, row)

    long = {key: line for key, line in found.items() if len(line) > 1}
    labels = _differences([dict(key) for key in long])
    return {
        label: [(value if x == setting else line[value][x], line[value][y], value) for value in sorted(line)]
        for label, line in zip(labels, long.values(), strict=True)
    }


def _add(line: dict[float, Row], value: float, row: Row) -> None:
    if value not in line or row["fid"] < line[value]["fid"]:
        line[value] = row


def _differences(samplers: list[dict[str, Any]]) -> list[str]:
    """For each sampler the words in which it differs from the others."""
    words = [_words(settings) for settings in samplers]
    differing = [name for name in (words[0] if words else ()) if len({each[name] for each in words}) > 1]
    return [", ".join(each[name] for name in differing if each[name]) for each in words]


def _words(settings: dict[str, Any]) -> dict[str, str]:
    """Settings as words; one that is missing, because it is an axis, has none."""
    words = {"scheduler": (settings["scheduler"] or "own scheduler").removesuffix("Scheduler")}
    if settings.get("step_size"):
        words["steps"] = f"step size {settings['step_size']}"
    else:
        steps = settings.get("num_inference_steps")
        words["steps"] = f"{steps} steps" if steps else ""
    scale, (begin, end) = settings.get("guidance_scale"), settings["guidance_interval"]
    words["guidance"] = "" if scale is None else f"guidance {scale:g}" if scale != 1 else "no guidance"
    words["interval"] = f"guided in [{begin:g}, {end:g}]" if (begin, end) != (0, 1) else ""
    if scale is None and not words["interval"]:
        words["interval"] = "guided throughout"
    words["eta"] = f"eta {settings['eta']:g}"
    words["clip_sample"] = {None: "clipping as the model says", True: "clipped", False: "not clipped"}[
        settings["clip_sample"]
    ]
    return words


def _in_common(rows: list[Row]) -> str:
    """The words that all samplers of these rows have."""
    words = [_words(settings_of(row)) for row in rows]
    shared = {name: word for name, word in words[0].items() if all(each[name] == word for each in words)}
    # what nobody asked for is not worth saying
    defaults = ("own scheduler", "no guidance", "clipping as the model says")
    return ", ".join(word for word in shared.values() if word and word not in defaults)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


# What it is called


def conditions(rows: list[Row]) -> str:
    """What the numbers hold for, such as ``clean protocol, 10,000 to 50,000 images``."""
    protocols = list(dict.fromkeys(str(row["protocol"]) for row in rows if row.get("protocol")))
    counts = sorted({row["num_images"] for row in rows if row.get("num_images")})
    parts = []
    if protocols:
        parts.append(f"{' and '.join(protocols)} protocol{'s' if len(protocols) > 1 else ''}")
    if counts:
        parts.append(f"{' to '.join(f'{count:,}' for count in dict.fromkeys((counts[0], counts[-1])))} images")
    return ", ".join(parts)


def short_names(names: list[str], limit: int = 28) -> dict[str, str]:
    """For each path or id its last parts, as many as no other has, without the middle where that is too long.

    Args:
        names: Different ones.
        limit: Characters to keep, if the names differ in these; otherwise more.
    """
    tails = _tails(names)
    longest = max(map(len, tails.values()), default=0)
    for length in range(limit, longest + 1):
        short = {name: _cut(tail, length) for name, tail in tails.items()}
        if len(set(short.values())) == len(names):
            return short
    return tails


def slugs(names: list[str]) -> dict[str, str]:
    """For each path or id a part of a file name, of ASCII letters, digits and ``_.-``; all are different."""
    found: dict[str, str] = {}
    for name, tail in _tails(names).items():
        slug = base = re.sub(r"[^A-Za-z0-9_.-]+", "-", tail).strip("-.")[-80:] or "family"
        number = 2
        # some file systems do not tell capitals from small letters
        while slug.lower() in map(str.lower, found.values()):
            slug, number = f"{base}-{number}", number + 1
        found[name] = slug
    return found


def _tails(names: list[str]) -> dict[str, str]:
    """The last parts of each path, as many as no other path ends with."""

    def tail(name: str, length: int) -> str:
        parts = PurePath(name).parts
        return "/".join(part.strip("/") for part in parts[-length:]) or name

    found = {}
    for name in names:
        others = [other for other in names if other != name]
        lengths = range(1, len(PurePath(name).parts) + 1)
        unique = (n for n in lengths if all(tail(name, n) != tail(other, n) for other in others))
        length = next(unique, None)
        found[name] = tail(name, length) if length else name
    return found


def _cut(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    end = length // 2
    return f"{text[: length - end - 1]}\N{HORIZONTAL ELLIPSIS}{text[-end:]}"


def _format(value: float) -> str:
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.2f}" if size >= 1 else f"{value:.4f}"


# How it is drawn


def _draw_fid_over_steps(rows: list[Row], family: str, looks: dict[str, int]) -> "Figure":
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    lines = fid_over_steps(rows)
    lowest = {sampler: min(zip(fids, steps, strict=True)) for sampler, (steps, fids) in lines.items()}
    labels = {sampler: _wrap(f"{sampler}: {_format(fid)} at {step:,}", 66) for sampler, (fid, step) in lowest.items()}
    columns, legend_lines = _legend_size(labels.values(), _WIDTH - 80)
    # the more lines, the more room between them
    height = 580 + 12 * len(lines) + _LEGEND_LINE * (legend_lines + 1)
    figure = _figure(height, f"{family}: FID over the training", conditions(rows))
    axes = figure.subplots()
    every = [fid for _, fids in lines.values() for fid in fids]
    finish_axes(axes, _FID, (min(every), max(every)))
    # below the lines is the place for the values of their minima
    bottom, top = axes.get_ylim()
    logarithmic = axes.get_yscale() == "log"
    axes.set_ylim(bottom=bottom * (bottom / top) ** 0.12 if logarithmic else bottom - 0.12 * (top - bottom))

    # not more markers than can be told apart; where they sit differs from line to line
    crowd = max(1, math.ceil(max(len(steps) for steps, _ in lines.values()) * len(lines) / 160))
    for number, (sampler, (steps, fids)) in enumerate(lines.items()):
        look = _look(looks[sampler])
        every_nth = (number % min(crowd, len(steps)), crowd)
        axes.plot(steps, fids, **look, linewidth=1.8, markersize=5, markevery=every_nth, label=labels[sampler])
        axes.plot(lowest[sampler][1], lowest[sampler][0], **look | {"linestyle": ""}, markersize=10, mec="white")
    axes.set_xlabel("training (optimizer steps)", fontsize=12)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=(1, 2, 2.5, 5, 10), integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend(ncols=columns, title="sampler: lowest FID at step", alignment="left", **_ABOVE)
    _mark_minima(axes, lines, lowest, looks)
    return figure


def _mark_minima(
    axes: "Axes",
    lines: dict[str, tuple[list[int], list[float]]],
    lowest: dict[str, tuple[float, int]],
    looks: dict[str, int],
) -> None:
    """Writes the lowest value of each line near its point; of many lines only the lowest of all.

    The legend has every value, also one that finds no place.
    """
    figure = axes.figure
    # places in pixels are known only then
    figure.draw_without_rendering()
    curves = []
    for steps, fids in lines.values():
        corners = axes.transData.transform(np.column_stack([steps, fids]))
        distances = np.concatenate([[0], np.hypot(*np.diff(corners, axis=0).T).cumsum()])
        # closer than a letter is wide
        along = np.linspace(0, distances[-1], max(2, int(distances[-1] / 5)))
        curves.append(np.column_stack([np.interp(along, distances, corners[:, k]) for k in (0, 1)]))
    points, sizes = [], []
    best = lowest if len(lowest) <= _MOST_VALUES else dict([min(lowest.items(), key=lambda line: line[1])])
    for fid, step in best.values():
        text = axes.text(step, fid, _format(fid), **_VALUE)
        box = text.get_window_extent()
        text.remove()
        points.append(axes.transData.transform((step, fid)))
        sizes.append((box.width + 4, box.height + 2))
    frame = axes.get_window_extent().extents
    moves = place_labels(np.array(points), np.array(sizes), np.concatenate(curves), frame)
    for (sampler, (fid, step)), size, move in zip(best.items(), np.array(sizes), moves, strict=True):
        if move is None:
            continue
        colour = COLOURS[looks[sampler] % len(COLOURS)]
        far = (np.abs(move) > size / 2 + 20).any()
        text = axes.annotate(
            _format(fid),
            (step, fid),
            # in points, since an SVG has other pixels
            xytext=np.array(move) * 72 / figure.dpi,
            textcoords="offset points",
            ha="center",
            va="center",
            color=colour,
            bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 4}
            if far
            else None,
            **_VALUE,
        )
        # it is no reason to lay the picture out anew
        text.set_in_layout(False)


_VALUE = {"fontsize": 11, "fontweight": "bold"}
_MOST_VALUES = 5


def place_labels(
    points: np.ndarray, sizes: np.ndarray, ink: np.ndarray, frame: tuple[float, float, float, float]
) -> list[tuple[float, float] | None]:
    """Finds a place for a label near each point.

    A label covers no other, no point and no line from another to its point, and little of the ink. The lowest
    point chooses first, then the highest, and so on inwards, since these have room on one side.

    Args:
        points: (labels, 2), pixels to the right and upwards.
        sizes: Width and height of each label, (labels, 2), pixels.
        ink: What is better not covered, (places, 2), pixels.
        frame: Left, lower, right and upper edge of the room, pixels.

    Returns:
        From each point to the middle of its label, pixels to the right and upwards; None without a place.
    """
    angles = np.deg2rad([270, 240, 300, 210, 330, 180, 0, 150, 30, 120, 60, 90])
    directions = np.column_stack([np.cos(angles), np.sin(angles)])
    left_lower, right_upper = np.array(frame[:2]), np.array(frame[2:])
    boxes = [(point - 6, point + 6) for point in points]
    leads = np.empty((0, 2))
    moves: list[tuple[float, float] | None] = [None] * len(points)
    upwards = np.argsort(points[:, 1], kind="stable").tolist()
    order = [upwards.pop(-(turn % 2)) for turn in range(len(points))]
    for number in order:
        point, half = points[number], sizes[number] / 2
        best = math.inf
        for distance in (8, 14, 26, 40, 60, 85, 115, 150):
            for move in directions * (distance + half):
                low, high = point + move - half, point + move + half
                lead = point + np.linspace(0, 1, 30)[:, None] * move
                if (low < left_lower).any() or (high > right_upper).any() or _inside(leads, low, high).any():
                    continue
                if any((low < b).all() and (a < high).all() for a, b in boxes):
                    continue
                # the first boxes are the points, the own one among them
                if any(_inside(lead, a, b).any() for a, b in boxes[len(points) :]):
                    continue
                cost = 12 * _inside(ink, low, high).sum() + 2 * distance
                if cost < best:
                    best, moves[number], placed, leading = cost, (float(move[0]), float(move[1])), (low, high), lead
        if moves[number] is not None:
            boxes.append(placed)
            leads = np.concatenate([leads, leading])
    return moves


def _inside(places: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.all((places > low) & (places < high), axis=1)


def _draw_minima(
    minima: dict[str, dict[str, tuple[float, int | None]]],
    rows: list[Row],
    names: dict[str, str],
    looks: dict[str, int],
) -> "Figure":
    samplers = sorted({sampler for of_family in minima.values() for sampler in of_family}, key=looks.__getitem__)
    several_steps = len({row["step"] for row in rows}) > 1
    what = "lowest FID over the checkpoints" if several_steps else "FID"
    # what all bars share stands in the title; many samplers are named beside each bar, few of them above
    one_family = len(minima) == 1
    beside = one_family or len(samplers) > len(COLOURS)
    above = not beside and len(samplers) > 1
    if one_family:
        title = f"{names[next(iter(minima))]}: {what}"
    elif len(samplers) == 1:
        title = f"{samplers[0]}: {what}"
    else:
        title = f"{what[0].upper()}{what[1:]} by model and sampler"

    # one unit of the vertical axis is a bar
    places: list[tuple[float, str, str]] = []
    ticks: dict[float, str] = {}
    end = 0.0
    for family, of_family in minima.items():
        begin = end = end + (1.4 if beside and not one_family else 0.5 if above else 0)
        for sampler in sorted(of_family, key=looks.__getitem__):
            places.append((end, family, sampler))
            if beside:
                ticks[end] = _wrap(sampler, 48)
            end += 1
        if not beside:
            ticks[(begin + end - 1) / 2] = names[family]

    # pixels that the names leave
    room = _WIDTH - 60 - 8 * max(len(line) for label in ticks.values() for line in label.splitlines())
    columns, legend_lines = _legend_size([_wrap(sampler, 66) for sampler in samplers], room - 20)
    bar = max(24, 18 * max(label.count("\n") + 1 for label in ticks.values()) if beside else 0)
    figure = _figure(145 + bar * end + (_LEGEND_LINE * legend_lines if above else 0), title, conditions(rows))
    axes = figure.subplots()
    finish_axes(axes, "", None)
    # the values are written
    axes.grid(visible=False)
    for number, (place, family, sampler) in enumerate(places):
        fid, step = minima[family][sampler]
        look = looks[sampler]
        axes.barh(
            place,
            fid,
            height=0.84,
            color=COLOURS[look % len(COLOURS)],
            hatch=_HATCHES[look // len(COLOURS) % len(_HATCHES)],
            edgecolor="white",
            linewidth=0,
            label=None if sampler in {other for _, _, other in places[:number]} else _wrap(sampler, 66),
        )
        best = len(minima[family]) > 1 and fid == min(minima[family].values())[0]
        value = axes.annotate(
            _format(fid),
            (max(fid, 0), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=11,
            fontweight="bold" if best else "normal",
        )
        if several_steps and step is not None:
            axes.annotate(
                f"at step {step:,}",
                (1, 0.5),
                xycoords=value,
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color="#555555",
            )
        if beside and not one_family and (number == 0 or places[number - 1][1] != family):
            axes.text(0, place - 0.95, f" {names[family]}", va="center", fontsize=12, fontweight="bold")
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=11)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(end - 0.4, -0.6)
    fids = [fid for of_family in minima.values() for fid, _ in of_family.values()]
    # the values need some room behind the longest bar
    values = 200 if several_steps else 75
    axes.set_xlim(min(0, 1.1 * min(fids)), max(0, *fids) * room / (room - values) or 1)
    axes.set_xlabel(_FID, fontsize=12)
    if above:
        axes.legend(ncols=columns, **_ABOVE)
    return figure


def _draw_trade_offs(trade_offs: list[TradeOffs], names: dict[str, str]) -> "Figure":
    # lines with the same settings look the same in all panels
    looks: dict[str, int] = {}
    for of_family in trade_offs:
        for panel in of_family.panels:
            for label in panel.lines:
                looks.setdefault(label, len(looks))
    most = max(len(of_family.panels) for of_family in trade_offs)
    side_by_side = min(len(trade_offs), 3 // most or 1)
    nrows, ncols = _panel_grid(most)
    legend_lines = max(
        _panel_legend(panel, ncols * side_by_side)[1] for of_family in trade_offs for panel in of_family.panels
    )
    height = 70 + nrows * (300 + _LEGEND_LINE * legend_lines)
    rows = [row for of_family in trade_offs for row in of_family.rows]
    tall = math.ceil(len(trade_offs) / side_by_side)
    figure = _figure(60 + tall * height, "What guidance and denoising steps change", conditions(rows))
    parts = figure.subfigures(tall, side_by_side, squeeze=False).ravel()
    for part, of_family in zip(parts, trade_offs, strict=False):
        step = of_family.rows[0]["step"]
        name = names[of_family.family]
        checkpoint = name if step is None else f"{name}, step\N{NO-BREAK SPACE}{step:,}"
        common = _in_common(of_family.rows)
        part.suptitle(_wrap(f"{checkpoint} ({common})" if common else checkpoint, 120 // side_by_side), fontsize=13)
        _draw_panels(part, of_family.panels, ncols, side_by_side, looks)
    return figure


def _draw_panels(part: "SubFigure", panels: list[Panel], ncols: int, side_by_side: int, looks: dict[str, int]) -> None:
    fids = [y for panel in panels if panel.y == "fid" for points in panel.lines.values() for _, y, _ in points]
    grid = part.subplots(math.ceil(len(panels) / ncols), ncols, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, panel in zip(grid, panels, strict=False):
        ys = [y for points in panel.lines.values() for _, y, _ in points]
        if panel.y == "fid":
            # the same axis in all panels
            finish_axes(axes, _FID, (min(fids), max(fids)))
        else:
            finish_axes(axes, _AXIS_LABELS[panel.y], (min(ys), max(ys)), may_be_logarithmic=False)
        axes.set_xlabel(_AXIS_LABELS[panel.x], fontsize=12)
        for label, points in panel.lines.items():
            x, y, _ = zip(*points, strict=True)
            axes.plot(x, y, **_look(looks[label]), linewidth=1.8, markersize=6, label=label)
        if panel.x == "recall":
            _write_settings(axes, panel)
        else:
            _set_x_ticks(axes, panel)
        if len(panel.lines) > 1:
            columns, _ = _panel_legend(panel, ncols * side_by_side)
            axes.legend(ncols=columns, **_ABOVE)


_AXIS_LABELS = {
    "guidance_scale": "guidance scale (1: none)",
    "num_inference_steps": "denoising steps",
    "step_size": "step size (timesteps, 1 takes all)",
    "recall": "recall (0 to 1)",
    "precision": "precision (0 to 1)",
    "class_accuracy": "class accuracy (0 to 1)",
}


def _set_x_ticks(axes: "Axes", panel: Panel) -> None:
    """Ticks at what was measured, as far as there is room for them."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    values = sorted({x for points in panel.lines.values() for x, _, _ in points})
    places = np.array(values, dtype=np.float64)
    if panel.x != "guidance_scale":
        axes.set_xscale("log")
        places = np.log(places)
    kept: list[int] = []
    for number, place in enumerate(places):
        if not kept or place - places[kept[-1]] >= 0.09 * np.ptp(places):
            kept.append(number)
    axes.set_xticks([values[number] for number in kept])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _write_settings(axes: "Axes", panel: Panel) -> None:
    """Says which setting the points have, along that line which has most room above it."""
    points = max(panel.lines.values(), key=lambda points: sum(x + y for x, y, _ in points) / len(points))
    for x, y, setting in points:
        axes.annotate(f"{setting:g}", (x, y), xytext=(6, 5), textcoords="offset points", fontsize=10)
    name = {"guidance_scale": "guidance scale", "num_inference_steps": "denoising steps", "step_size": "step size"}
    axes.set_xlabel(f"{_AXIS_LABELS[panel.x]}\nnumbers in the picture: {name[panel.setting]}", fontsize=12)
    axes.margins(x=0.1)


def _panel_grid(count: int) -> tuple[int, int]:
    """Rows and columns for so many panels."""
    columns = 2 if count == 4 else min(count, 3)
    return math.ceil(count / columns), columns


def _panel_legend(panel: Panel, ncols: int) -> tuple[int, int]:
    return _legend_size(panel.lines, _WIDTH // ncols - 90) if len(panel.lines) > 1 else (1, 0)


_LEGEND_LINE = 21
_ABOVE = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "borderaxespad": 0.2,
    "frameon": False,
    "fontsize": 10,
    "handlelength": 2.6,
    "columnspacing": 1.5,
}


def _figure(height: float, title: str, subtitle: str) -> "Figure":
    """A figure with a title, 1200 pixels wide and so many high."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH / DPI, height / DPI), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    figure.suptitle(f"{title}\n{subtitle}" if subtitle else title, fontsize=15)
    return figure


def _look(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of a line; those of the first 84 numbers differ."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number // len(COLOURS) % len(_DASHES)],
    }


def _legend_size(labels: Iterable[str], width: float) -> tuple[int, int]:
    """Columns of a legend in so many pixels, and how many lines of text it has."""
    labels = list(labels)
    widest = max(len(line) for label in labels for line in label.splitlines() or [""])
    columns = max(1, min(len(labels), int(width / (7.4 * widest + 62))))
    lines = max(label.count("\n") + 1 for label in labels)
    return columns, math.ceil(len(labels) / columns) * lines


def _wrap(text: str, length: int) -> str:
    return "\n".join(textwrap.wrap(text, length, break_on_hyphens=False)) or text


def _save(figure: "Figure", stem: Path) -> Path:
    """Writes a figure as SVG and PNG, and returns the latter."""
    # a dot in the name begins no ending
    for ending in ("svg", "png"):
        file = stem.with_name(f"{stem.name}.{ending}")
        save_figure(figure, file)
    return file
