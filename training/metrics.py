"""The log of a run: sums on the device between two entries, the file of entries, and the chart made from it."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..utils.atomic_write import atomic_file
from ..utils.chart_style import BLACK, BLUE, DPI, GREEN, ORANGE, PURPLE, VERMILION, finish_axes, save_figure
from .objectives import TrainingObjective


METRICS_NAME = "metrics.jsonl"
NUM_QUARTERS = 4  # equal parts of the noise levels, the first one nearest to the image
QUARTERS = tuple(f"loss_quarter_{number}" for number in range(1, NUM_QUARTERS + 1))
METRICS = ("step", "loss", *QUARTERS, "gradient_norm", "lr")


class MetricsWindow:
    """Means since the last entry of the log, summed on the device so that no step waits for the host."""

    def __init__(self, accelerator: Accelerator, objective: TrainingObjective):
        self._accelerator, self._objective = accelerator, objective
        self.clear()

    def clear(self) -> None:
        # steps, updates, loss, gradient norm, then losses and images of each quarter
        self._sums = torch.zeros(4 + 2 * NUM_QUARTERS, device=self._accelerator.device)
        self._kept: list[tuple[int, Tensor, Tensor]] = []
        self._begin = time.perf_counter()

    def add(self, step: int, loss: Tensor, gradient_norm: Tensor | None, losses: Tensor, levels: Tensor) -> None:
        """Takes in a step; the gradient norm is None where fp16 skipped the update, the last two are (images,)."""
        one, zero = torch.ones_like(loss), torch.zeros_like(loss)
        updates, norm = (zero, zero) if gradient_norm is None else (one, gradient_norm)
        self._sums[:4] += torch.stack([one, updates, loss, norm])
        quarters = (self._objective.quantiles(levels) * NUM_QUARTERS).long().clamp(max=NUM_QUARTERS - 1)
        self._sums[4 : 4 + NUM_QUARTERS].index_add_(0, quarters, losses)
        self._sums[4 + NUM_QUARTERS :].index_add_(0, quarters, torch.ones_like(losses))
        self._kept.append((step, losses, levels))

    def means(self) -> dict[str, float | None]:
        """The means over all ranks, None for a quarter without images; FloatingPointError if not finite."""
        sums = self._accelerator.reduce(self._sums, reduction="sum")
        steps, updates, loss, gradient_norm, *quarters = sums.tolist()
        if not steps:
            return {}
        if not math.isfinite(loss + gradient_norm):
            own = [(step, levels[~losses.isfinite()].tolist()) for step, losses, levels in self._kept]
            found = sorted({(step, level) for step, levels in gather_object(own) for level in levels})
            if not found:
                raise FloatingPointError(f"the gradient is not finite up to step {self._kept[-1][0]}")
            first = found[0][0]
            shown = ", ".join([f"{level:g}" for step, level in found if step == first][:10])
            raise FloatingPointError(f"the loss is not finite at step {first}, {self._objective.level_name} {shown}")
        totals = (loss, *quarters[:NUM_QUARTERS], gradient_norm)
        counts = (steps, *quarters[NUM_QUARTERS:], updates)
        means = zip(("loss", *QUARTERS, "gradient_norm"), totals, counts, strict=True)
        return {name: total / count if count else None for name, total, count in means}

    def steps_per_second(self) -> float:
        return len(self._kept) / (time.perf_counter() - self._begin)

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
        num_processes = self._accelerator.num_processes
        if len(rows) == num_processes:
            row = torch.tensor(rows[self._accelerator.process_index])
        else:
            row = torch.tensor(rows).sum(0) / num_processes
            # every rank counts every step, but only its own images
            row[:4] *= num_processes / len(rows)
        self._sums += row.to(self._sums)


def _read_entries(file: Path) -> dict[str, dict[str, Any]]:
    """The entries of a log by their lines, without what a power cut has left at the end."""
    entries = {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if file.is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            entry = json.loads(line)
            entries[line] = {**entry, "step": float(entry["step"])}
    return entries


def remove_entries_after(output_dir: Path, step: int) -> None:
    """Removes what an earlier run wrote of the steps that are to come."""
    file = output_dir / METRICS_NAME
    if file.is_file():
        kept = [line for line, entry in _read_entries(file).items() if line.endswith("\n") and entry["step"] <= step]
        with atomic_file(file) as writing:
            writing.write_text("".join(kept), encoding="utf-8")


def read_metrics(metrics_file: Path) -> dict[str, np.ndarray]:
    """The entries of a log: for each of `METRICS` float64 (entries,), NaN where an entry has none."""
    entries = _read_entries(metrics_file).values()
    return {name: np.array([entry.get(name) for entry in entries], dtype=np.float64) for name in METRICS}


def smooth(values: np.ndarray) -> np.ndarray:
    """An exponential average whose memory grows with the run: the large losses at its start are soon forgotten.

    The k-th of the n finite values moves it by (value - average) / m, where m is k / 5, but from 1 to sqrt(n).
    """
    finite = np.isfinite(values)
    averages, average, longest = [np.nan], 0.0, math.sqrt(finite.sum())
    for number, value in enumerate(values[finite].tolist(), start=1):
        average += (value - average) / max(1.0, min(longest, number / 5))
        averages.append(average)
    # the place of the last finite value up to each entry, 0 before the first
    return np.array(averages)[finite.cumsum()]


def draw_loss_chart(output_dir: Path) -> None:
    """Plots losses, gradient norm and learning rate to ``loss_chart.png``, if the log has entries."""
    metrics = read_metrics(output_dir / METRICS_NAME)
    if not len(metrics["step"]):
        return
    # loading it takes long
    from matplotlib.figure import Figure

    shares = [f"{25 * number}\N{EN DASH}{25 * number + 25} %" for number in range(NUM_QUARTERS)]
    panels = {
        "loss": [("as logged", metrics["loss"], ORANGE), ("smoothed", smooth(metrics["loss"]), BLUE)],
        "smoothed loss, noise levels\nfrom image to noise": [
            (share, smooth(metrics[name]), colour)
            for share, name, colour in zip(shares, QUARTERS, (VERMILION, ORANGE, GREEN, BLUE), strict=True)
        ],
        "gradient norm": [("", smooth(metrics["gradient_norm"]), PURPLE)],
        "learning rate": [("", metrics["lr"], BLACK)],
    }
    figure = Figure(figsize=(1200 / DPI, 1000 / DPI), dpi=DPI)
    figure.suptitle(output_dir.name, fontsize=16)
    all_axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=(4, 4, 2, 2))
    # margins that are found by a layout take as long as the rest of the chart
    figure.subplots_adjust(left=0.12, right=0.98, bottom=0.06, top=0.93, hspace=0.26)
    # a single entry makes no line
    marker = "o" if len(metrics["step"]) <= 30 else None
    for axes, (label, curves) in zip(all_axes, panels.items(), strict=True):
        drawn = [(name, values, colour, values[np.isfinite(values)]) for name, values, colour in curves]
        drawn = [curve for curve in drawn if len(curve[3])]
        for name, values, colour, _ in drawn:
            axes.plot(metrics["step"], values, color=colour, label=name, linewidth=1.5, marker=marker)
        # the first steps of a run may leave the chart
        ends = [(float(finite.min()), float(np.percentile(finite, 98))) for *_, finite in drawn]
        finish_axes(axes, label, (min(low for low, _ in ends), max(high for _, high in ends)) if ends else None)
        if len(drawn) > 1:
            axes.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=11)
    all_axes[-1].set_xlabel("optimizer step", fontsize=12)
    figure.align_ylabels(all_axes)
    save_figure(figure, output_dir / "loss_chart.png")
