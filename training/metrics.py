"""What a run says of its course: sums on the device between two entries of the log, and the file of entries."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..utils.atomic_write import atomic_file


METRICS_NAME = "metrics.jsonl"
# The timesteps are told apart in so many equal parts, the first one nearest to the image.
NUM_QUARTERS = 4
_QUARTERS = tuple(f"loss_quarter_{number}" for number in range(1, NUM_QUARTERS + 1))


class MetricsWindow:
    """Means since the last entry of the log, summed on the device so that no step waits for the host.

    Args:
        accelerator: Whose processes share the run.
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
            losses: Unweighted, of this process's images, (images,).
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

    def is_empty(self) -> bool:
        """Whether no step has been taken in."""
        return not self._kept

    def means(self) -> dict[str, float | None]:
        """The means over all processes; None for a quarter of which no timestep was drawn.

        Raises:
            FloatingPointError: If one of them is not finite; it names the step and its timesteps.
        """
        sums = self._accelerator.reduce(self._sums, reduction="sum").tolist()
        steps, updates, loss, gradient_norm = sums[:4]
        if not math.isfinite(loss) or not math.isfinite(gradient_norm):
            self._raise_non_finite()
        by_quarter = zip(_QUARTERS, sums[4 : 4 + NUM_QUARTERS], sums[4 + NUM_QUARTERS :], strict=True)
        return {
            "loss": loss / steps,
            **{name: total / images if images else None for name, total, images in by_quarter},
            "gradient_norm": gradient_norm / updates if updates else None,
        }

    def steps_per_second(self) -> float:
        """Since the window began, or was taken up from a checkpoint."""
        return self._timed_steps / (time.perf_counter() - self._begin)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not time spent training."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def state(self) -> list[list[float]]:
        """The sums of every process, for a checkpoint."""
        return self._accelerator.gather(self._sums[None]).tolist()

    def load_state(self, rows: list[list[float]]) -> None:
        """Takes up what `state` gave, also with another number of processes."""
        if len(rows) == self._accelerator.num_processes:
            row = torch.tensor(rows[self._accelerator.process_index])
        else:
            row = torch.tensor(rows).sum(0) / self._accelerator.num_processes
            # every process counts every step, but only its own images
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
        """Takes out what an earlier run wrote of the steps that are to come, and what is no entry.

        A machine that lost its power may leave anything at the end of a file.
        """
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
            if len(kept) < len(lines):
                with atomic_file(self.path) as writing:
                    writing.write_text("".join(kept), encoding="utf-8")

    def append(self, values: dict[str, Any]) -> None:
        """Adds an entry.

        Raises:
            OSError: If it cannot be written, as on a full disk.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise OSError(f"could not write {self.path} ({error.strerror})") from error


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
