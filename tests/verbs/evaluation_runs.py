"""Measurements as processes of their own, which may be stopped and killed, and what they leave behind."""

from pathlib import Path
from typing import Any

import numpy as np

from imagenet64_diffusion.evaluate_models import main
from imagenet64_diffusion.evaluation.measurement import Measurement
from tests.verbs.training_runs import Life


class EvaluationLife(Life):
    """A process in which ``imagenet64-evaluate`` runs."""

    program = "evaluate_models"


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


def assert_same_numbers(folder: Path, other: Path, relative: float = 1e-5) -> None:
    """Two measurements have the same statistics, and keep the same rows."""
    left, right = Measurement.load(folder), Measurement.load(other)
    assert left.statistics.count == right.statistics.count
    for one, two in (
        (left.statistics.mean, right.statistics.mean),
        (left.statistics.covariance, right.statistics.covariance),
        (left.features, right.features),
    ):
        np.testing.assert_allclose(one, two, rtol=0, atol=relative * np.abs(two).max())
    np.testing.assert_array_equal(np.load(folder / "indices.npy"), np.load(other / "indices.npy"))
