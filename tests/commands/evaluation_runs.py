"""Evaluations as processes of their own, which may be stopped and killed, and what they leave behind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagenet64_diffusion.evaluate_models import main
from imagenet64_diffusion.evaluation.evaluation_folder import Evaluation
from imagenet64_diffusion.tests.commands.processes import CommandProcess, distributed, free_port
from imagenet64_diffusion.tests.components import make_pipeline


GREY_STEP = 1 / (4 * 255)


class EvaluationProcess(CommandProcess):
    """A process in which ``imagenet64-evaluate`` runs."""

    program = "evaluate_models"


class CountingProcess(EvaluationProcess):
    """Likewise, and at the end it writes how many bytes it has read."""

    program = "tests.commands.counting"


def to_arguments(command: str, **options: Any) -> list[str]:
    """The command line of a sub-command."""
    found = [command]
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        found += [f"--{name}", *map(str, values)]
    return found


def evaluate(command: str, **options: Any) -> int:
    """Runs a sub-command in this process and gives its exit code."""
    return main(to_arguments(command, **options))


def assert_same_numbers(folder: Path, other: Path, relative: float = 1e-5, most_steps: int = 3) -> None:
    """Two evaluations have the same statistics, and keep the same rows.

    Args:
        folder: With the features of all images.
        other: Likewise.
        relative: What they may differ by, beside the largest value.
        most_steps: How many pixels of grey 16x16 images may differ by one step of their eight bits, where
            batches of other sizes round otherwise: a mean of four pixels then differs by `GREY_STEP`, in
            three equal channels.
    """
    left, right = Evaluation.load(folder), Evaluation.load(other)
    count = left.statistics.count
    assert count == right.statistics.count == len(left.features) == len(right.features)
    differences = np.abs(left.features - right.features)
    rounding = relative * np.abs(right.features).max()
    steps = (differences > rounding).sum() / 3
    assert steps <= most_steps
    assert differences.max() <= rounding + (GREY_STEP if steps else 0)
    for one, two in (
        (left.statistics.mean, right.statistics.mean),
        (left.statistics.covariance, right.statistics.covariance),
    ):
        # a step changes a mean by its part, and a covariance by no more, since values are between 0 and 1
        allowed = relative * np.abs(two).max() + steps * GREY_STEP / count
        np.testing.assert_allclose(one, two, rtol=0, atol=allowed)
    np.testing.assert_array_equal(np.load(folder / "indices.npy"), np.load(other / "indices.npy"))


def together(
    arguments: list[str], processes: int, log: Path, kind: type[EvaluationProcess] = EvaluationProcess
) -> list[EvaluationProcess]:
    """The ranks of a run, as a launcher starts them."""
    if processes == 1:
        return [kind(arguments, log)]
    port = free_port()
    return [
        kind(arguments, log.with_name(f"{log.name}_{rank}"), distributed(rank, processes, port))
        for rank in range(processes)
    ]


def files(folder: Path) -> list[str]:
    """With hidden ones, and whatever lies beside the folder."""
    return sorted(str(path.relative_to(folder.parent)) for path in folder.parent.rglob("*") if path.is_file())


@pytest.fixture(name="run", scope="module")
def run_fixture(tmp_path_factory) -> Path:
    """What a training leaves: pipelines of two steps, with different weights."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    make_pipeline().save_pretrained(folder / "pipelines" / "step_0000010")
    make_pipeline(class_embed_dim=8).save_pretrained(folder / "pipelines" / "step_0000020")
    return folder


@pytest.fixture(name="model", scope="module")
def model_fixture(run) -> Path:
    """The first of them."""
    return run / "pipelines" / "step_0000010"


@pytest.fixture(name="reference", scope="module")
def reference_fixture(tmp_path_factory, prepared) -> Path:
    """An evaluation of the prepared images."""
    folder = tmp_path_factory.mktemp("reference") / "reference"
    assert evaluate("reference", source=prepared, output_dir=folder, protocol="pixels", device="cpu") == 0
    return folder


@pytest.fixture(name="classifier", scope="module")
def classifier_fixture(tmp_path_factory, prepared) -> Path:
    """A small network that knows the prepared images."""
    folder = tmp_path_factory.mktemp("classifier") / "classifier"
    assert evaluate("classifier", train_data_dir=prepared, output_dir=folder, batch_size=16, epochs=8) == 0
    return folder
