"""Measurements as processes of their own, which may be stopped and killed, and what they leave behind."""

import os
import resource
import signal
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imagenet64_diffusion.evaluate_models import main
from imagenet64_diffusion.evaluation.measurement import Measurement
from tests.verbs.training_runs import _CONTEXT, Life


class EvaluationLife(Life):
    """A process in which ``imagenet64-evaluate`` runs, from its start to its end.

    Args:
        arguments: Its command line.
        log: Where its output goes.
        environment: Further environment variables.
        largest_file: How many bytes a file may have that it writes; as on a full disk, writing more fails.
    """

    def __init__(
        self,
        arguments: Iterable[Any],
        log: Path,
        environment: Mapping[str, str] | None = None,
        largest_file: int | None = None,
    ):
        self.log = log
        arguments = [str(argument) for argument in arguments]
        self._process = _CONTEXT.Process(target=_live, args=(arguments, log, dict(environment or {}), largest_file))
        self._process.start()


def _live(arguments: list[str], log: Path, environment: dict[str, str], largest_file: int | None) -> None:
    import torch

    os.setsid()
    # where the tests run in the background of a shell, they are started with interrupts ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment})
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(main(arguments))


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
