"""The log of a run: sums on the device between two entries, the file of entries, and the chart made from it."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..utils.atomic_write import atomic_file
from ..utils.chart_style import BLACK, BLUE, DPI, GREEN, ORANGE, PURPLE, VERMILION, finish_axes, save_figure
from .checkpoints import names_what_failed


METRICS_NAME, CHART_NAME = "metrics.jsonl", "loss_chart.png"
# The timesteps are told apart in so many equal parts, the first one nearest to the image.
NUM_QUARTERS = 4
QUARTERS = tuple(f"loss_quarter_{number}" for number in range(1, NUM_QUARTERS + 1))
METRICS = ("step", "loss", *QUARTERS, "gradient_norm", "lr")
_MAX_POINTS = 2000


class MetricsWindow:
    """Means since the last entry of the log, summed on the device so that no step waits for the host.

    Args:
        accelerator: Whose ranks share the run.
        num_train_timesteps: T, of which the quarters are made.
    """

    def __init__(self, accelerator: Accelerator, num_train_timesteps: int):
        self._accelerator = accelerator
        self._num_train_timesteps = num_train_timesteps
        self.clear()

    def clear(self) -> None:
        """Begins a new window."""
        # steps, updates, loss, gradient norm, then losses and images of each quarter
        self._sums = torch.zeros(4 + 2 * NUM_QUARTERS, device=self._accelerator.device)
        self._kept: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._begin = time.perf_counter()
        self._timed_steps = 0

    def add(
        self,
        step: int,
        loss: torch.Tensor,
        gradient_norm: torch.Tensor | None,
        losses: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> None:
        """Takes in a step.

        Args:
            step: Its number.
            loss: What was minimised, ().
            gradient_norm: Before clipping, (); None where fp16 skipped the update.
            losses: Unweighted, of this rank's images, (images,).
            timesteps: int64 (images,).
        """
        quarters = timesteps * NUM_QUARTERS // self._num_train_timesteps
        first = torch.stack([torch.ones_like(loss), torch.full_like(loss, gradient_norm is not None), loss])
        self._sums[:3] += first
        if gradient_norm is not None:
            self._sums[3] += gradient_norm
        self._sums[4 : 4 + NUM_QUARTERS].index_add_(0, quarters, losses)
        self._sums[4 + NUM_QUARTERS :].index_add_(0, quarters, torch.ones_like(losses))
        self._kept.append((step, losses, timesteps))
        self._timed_steps += 1

    def means(self) -> dict[str, float | None]:
        """The means over all ranks; None for a quarter without timesteps, empty before the first step.

        Raises:
            FloatingPointError: If one of them is not finite; it names the step and its timesteps.
        """
        sums = self._accelerator.reduce(self._sums, reduction="sum").tolist()
        steps, updates, loss, gradient_norm = sums[:4]
        if not steps:
            return {}
        if not math.isfinite(loss) or not math.isfinite(gradient_norm):
            self._raise_non_finite()
        by_quarter = zip(QUARTERS, sums[4 : 4 + NUM_QUARTERS], sums[4 + NUM_QUARTERS :], strict=True)
        return {
            "loss": loss / steps,
            **{name: total / images if images else None for name, total, images in by_quarter},
            "gradient_norm": gradient_norm / updates if updates else None,
        }

    def steps_per_second(self) -> float:
        """Since the window began, or was resumed."""
        return self._timed_steps / (time.perf_counter() - self._begin)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not time spent training."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def state(self) -> list[list[float]]:
        """The sums of every rank, for a checkpoint."""
        return self._accelerator.gather(self._sums[None]).tolist()

    def load_state(self, rows: list[list[float]]) -> None:
        """Resumes from what `state` gave, also with another number of ranks."""
        if len(rows) == self._accelerator.num_processes:
            row = torch.tensor(rows[self._accelerator.process_index])
        else:
            row = torch.tensor(rows).sum(0) / self._accelerator.num_processes
            # every rank counts every step, but only its own images
            row[:4] *= self._accelerator.num_processes / len(rows)
        self._sums += row.to(self._sums)

    def _raise_non_finite(self) -> None:
        bad: dict[int, list[int]] = {}
        for step, losses, timesteps in self._kept:
            is_bad = ~losses.isfinite()
            if is_bad.any():
                bad.setdefault(step, []).extend(timesteps[is_bad].tolist())
        found: dict[int, list[int]] = {}
        for steps in gather_object([bad]):
            for step, of_step in steps.items():
                found.setdefault(step, []).extend(of_step)
        if found:
            step = min(found)
            numbers = sorted(set(found[step]))
            shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
            raise FloatingPointError(f"the loss is not finite at step {step}, timesteps {shown}")
        first, last = self._kept[0][0], self._kept[-1][0]
        raise FloatingPointError(f"the gradient is not finite between steps {first} and {last}")


class MetricsFile:
    """``metrics.jsonl``: one JSON object for each entry of the log.

    Args:
        output_dir: The folder of the run.
    """

    def __init__(self, output_dir: Path):
        self.path = output_dir / METRICS_NAME

    def forget_after(self, step: int) -> None:
        """Removes what an earlier run wrote of the steps that are to come, and what is no entry.

        A machine that lost its power may leave anything at the end of a file.
        """
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
            if len(kept) < len(lines):
                with atomic_file(self.path) as writing:
                    writing.write_text("".join(kept), encoding="utf-8")

    def append(self, values: dict[str, Any]) -> None:
        """Adds an entry; raises an OSError that names the file if it cannot be written."""
        with names_what_failed(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def _step_of(line: str) -> float:
    """The step of an entry; infinity for a line that is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has held, in GiB: on a GPU that of its tensors, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def read_metrics(metrics_file: Path, max_entries: int = 20_000) -> dict[str, np.ndarray]:
    """The entries of a log as columns.

    Args:
        metrics_file: `MetricsFile.path`. A line that is no entry is passed over.
        max_entries: Of a longer log only so many lines are read, evenly spread up to the last one.

    Returns:
        For each of `METRICS` float64 (entries,), NaN where an entry has none; empty if there is no such file.
    """
    lines = metrics_file.read_text(encoding="utf-8", errors="replace").splitlines() if metrics_file.is_file() else []
    stride = max(1, math.ceil(len(lines) / max_entries))
    entries = [json.loads(line) for line in lines[(len(lines) - 1) % stride :: stride] if _step_of(line) < math.inf]
    rows = [[entry.get(name) for name in METRICS] for entry in entries]
    # None becomes NaN
    return dict(zip(METRICS, np.array(rows, dtype=np.float64).reshape(-1, len(METRICS)).T, strict=True))


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
    """Plots the losses of a run, and below them the norm of its gradient and its learning rate.

    Args:
        metrics_file: The log. Where it is missing or has no entries, ``file`` stays as it is.
        file: A PNG of 1200x1000 pixels.
        title: What stands above.
    """
    metrics = read_metrics(metrics_file)
    if not len(metrics["step"]):
        return
    # loading it takes long
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    loss, gradient_norm = smooth(metrics["loss"]), smooth(metrics["gradient_norm"])
    quarters = [smooth(metrics[name]) for name in QUARTERS]
    shown = _thinned(len(loss))
    step = metrics["step"][shown]
    # a single entry makes no line
    line = {"linewidth": 2, "solid_capstyle": "round", "marker": "o" if len(step) <= 30 else None}
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2, "frameon": False, "fontsize": 11}

    figure = Figure(figsize=(1200 / DPI, 1000 / DPI), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(hspace=0.04)
    loss_axes, quarter_axes, gradient_axes = figure.subplots(3, 1, sharex=True, height_ratios=(4, 4, 2))
    if title:
        figure.suptitle(title, fontsize=16)

    loss_axes.plot(step, metrics["loss"][shown], color=BLUE, alpha=0.3, linewidth=1, label="as logged")
    loss_axes.plot(step, loss[shown], color=BLUE, label="smoothed", **line)
    finish_axes(loss_axes, "loss", _limits([metrics["loss"], loss]))
    loss_axes.legend(ncols=2, **above)

    # an entry of the legend without a line, which says what the others are shares of
    quarter_axes.plot([], [], " ", label="timesteps from image (0 %) to noise (100 %):")
    for number, (values, colour) in enumerate(zip(quarters, (VERMILION, ORANGE, GREEN, BLUE), strict=True)):
        if np.isfinite(values).any():
            last = 100 if number == 3 else 25 * number + 24
            quarter_axes.plot(step, values[shown], color=colour, label=f"{25 * number}\N{EN DASH}{last} %", **line)
    finish_axes(quarter_axes, "smoothed loss by timestep", _limits(quarters))
    quarter_axes.legend(ncols=5, **above)

    gradient_axes.plot(step, gradient_norm[shown], color=PURPLE, **line)
    finish_axes(gradient_axes, "gradient norm", _limits([gradient_norm]))
    gradient_axes.yaxis.label.set_color(PURPLE)
    rate_axes = gradient_axes.twinx()
    rate_axes.plot(step, metrics["lr"][shown], color=BLACK, linestyle="--", linewidth=1.5, marker=line["marker"])
    rate_axes.set_ylabel("learning rate", color=BLACK, fontsize=12)
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


def _thinned(count: int) -> np.ndarray:
    """Places of at most `_MAX_POINTS` of so many entries, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, _MAX_POINTS)).round().astype(np.int64))


def _limits(curves: list[np.ndarray]) -> tuple[float, float] | None:
    """Lower and upper end of an axis for these curves, or None if they have no finite value.

    The largest fiftieth of a curve may leave the chart, and what is above three times its ninth tenth:
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
