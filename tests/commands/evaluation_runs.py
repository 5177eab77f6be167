"""Evaluations of tiny models, in this process or as ranks that may be stopped and killed, and what they leave."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagenet64_diffusion import evaluate_models
from imagenet64_diffusion.evaluation.evaluating import Evaluation
from imagenet64_diffusion.tests.commands.processes import CommandProcess, distributed, free_port
from imagenet64_diffusion.tests.components import make_pipeline


GREY_STEP = 1 / (4 * 255)
PIXELS = {"protocol": "pixels", "device": "cpu"}


def main(arguments: Sequence[str]) -> int:
    """The command, which writes at its end how many bytes it has read."""
    code = evaluate_models.main(arguments)
    print(Path("/proc/self/io").read_text().split()[1], flush=True)
    return code


def to_arguments(command: str, **options: Any) -> list[str]:
    """The command line of a sub-command."""
    found = [command]
    for name, value in options.items():
        found += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return found


def evaluate(command: str, **options: Any) -> int:
    """Runs a sub-command in this process and gives its exit code."""
    return evaluate_models.main(to_arguments(command, **options))


def start(log: Path, command: str, *, ranks: int = 1, largest_file: int | None = None, **options: Any) -> list[Any]:
    """Starts a sub-command in processes, as a launcher starts the ranks of a run."""
    port, program = free_port(), options.pop("program", "evaluate_models")
    environments = [distributed(rank, ranks, port) if ranks > 1 else None for rank in range(ranks)]
    arguments = to_arguments(command, **options)
    return [
        CommandProcess(arguments, Path(f"{log}_{rank}"), environment, largest_file, program=program)
        for rank, environment in enumerate(environments)
    ]


def error_of(process: CommandProcess) -> str:
    """The one line that begins with error."""
    (line,) = (line for line in process.errors() if line.startswith("error"))
    return line


def assert_same_numbers(folder: Path, other: Path, rounding: float = 1e-5, most_steps: int = 3) -> None:
    """Two evaluations that keep the features of all images, all between 0 and 1, have the same statistics and rows.

    Where batches of other sizes round otherwise, ``most_steps`` pixels of grey 16x16 images may differ by one step of
    their eight bits: a mean of four pixels then differs by `GREY_STEP`, in three equal channels.
    """
    left, right = Evaluation.load(folder), Evaluation.load(other)
    count = left.statistics.count
    assert count == right.statistics.count == len(left.features) == len(right.features)
    differences = np.abs(left.features - right.features)
    steps = (differences > rounding).sum() / 3
    assert steps <= most_steps
    assert differences.max() <= rounding + (GREY_STEP if steps else 0)
    # a step changes a mean by its part, and a covariance by no more
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=rounding + steps * GREY_STEP / count)
    close(left.statistics.mean, right.statistics.mean)
    close(left.statistics.covariance, right.statistics.covariance)
    np.testing.assert_array_equal(np.load(folder / "indices.npy"), np.load(other / "indices.npy"))


def files(folder: Path) -> list[str]:
    """The names of all files below a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(name="run", scope="module")
def run_fixture(tmp_path_factory) -> Path:
    """What a training leaves: pipelines of two steps, with different weights."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    make_pipeline().save_pretrained(folder / "pipelines" / "step_0000010")
    make_pipeline(class_embed_dim=8).save_pretrained(folder / "pipelines" / "step_0000020")
    return folder


@pytest.fixture(name="model", scope="module")
def model_fixture(run) -> Path:
    return run / "pipelines" / "step_0000010"


@pytest.fixture(name="reference", scope="module")
def reference_fixture(tmp_path_factory, prepared) -> Path:
    """An evaluation of the prepared images."""
    folder = tmp_path_factory.mktemp("reference") / "reference"
    assert evaluate("reference", source=prepared, output_dir=folder, **PIXELS) == 0
    return folder
