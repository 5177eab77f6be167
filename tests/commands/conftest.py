"""Training runs that several tests share."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagenet64_diffusion.tests.commands.training_runs import EVERYTHING, TrainingRun


@pytest.fixture
def new_run(tmp_path, prepared) -> Callable[..., TrainingRun]:
    """Makes a run of a name; by default one in which everything that a checkpoint keeps has an effect."""

    def make(name: str = "run", data: Path = prepared, **changes: Any) -> TrainingRun:
        return TrainingRun(tmp_path / name, data, {**EVERYTHING, **changes})

    return make


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, prepared) -> TrainingRun:
    """The run that nothing happens to, with a tracker."""
    run = TrainingRun(tmp_path_factory.mktemp("undisturbed"), prepared, EVERYTHING)
    run.finish(report_to="tensorboard")
    return run


@pytest.fixture(scope="session")
def killed(tmp_path_factory, prepared) -> TrainingRun:
    """The same run, killed after step 12; to be copied."""
    run = TrainingRun(tmp_path_factory.mktemp("killed"), prepared, EVERYTHING)
    run.kill_when((run.checkpoints / "checkpoint-12").exists)
    return run


@pytest.fixture
def killed_run(killed, new_run) -> TrainingRun:
    """A copy of the run that was killed after step 12, with checkpoints of steps 6 and 12."""
    run = new_run("killed")
    shutil.copytree(killed.output_dir, run.output_dir)
    return run
