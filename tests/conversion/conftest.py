"""Fixtures of the conversion's tests."""

from pathlib import Path

import pytest

from imagenet64_diffusion.tests.conversion.originals import write_small


@pytest.fixture
def small(tmp_path) -> list[Path]:
    """A small checkpoint in a folder of its own: the model's file and its JSON."""
    return write_small(tmp_path / "small")
