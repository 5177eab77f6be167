"""Fixtures of the conversion's tests."""

from pathlib import Path

import pytest

from imagenet64_diffusion.conversion.converting import convert_files
from imagenet64_diffusion.tests.conversion.originals import model_file, params_file, write_small


@pytest.fixture
def small(tmp_path) -> list[Path]:
    """A small checkpoint in a folder of its own: the model's file and its JSON."""
    return write_small(tmp_path / "small")


@pytest.fixture(scope="session")
def converted_original(original_checkpoint, tmp_path_factory) -> Path:
    """The pipeline folder that one of the original's checkpoints was converted to."""
    recipe = original_checkpoint.recipe
    folder = tmp_path_factory.mktemp("originals") / recipe
    convert_files(model_file(recipe), params_file(recipe), folder, time_embedding="original_alternating")
    return folder
