"""Fixtures that several tests share."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest

from imagenet64_diffusion.prepare_imagenet64 import PrepareOptions, prepare
from imagenet64_diffusion.tests.components import RECIPES, OriginalCheckpoint


# These fork processes from a server, which takes as long to start as many of them to run: one worker runs them all.
FORKING = {"benchmarks", "commands", "page"}
FORKING |= {"test_devices", "test_extending", "test_full_float32", "test_wheel", "test_without_package"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups by files, because pytest 9.2 and xdist's --dist loadgroup do not go together."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0])
            return "forking" if FORKING & {file.parent.name, file.stem} else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session", params=RECIPES)
def original_checkpoint(request) -> OriginalCheckpoint:
    return OriginalCheckpoint(request.param)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A prepared dataset of 96 grey 16x16 images of three classes, which differ in brightness."""
    folder = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 3
    pixels = rng.integers(0, 60, (96, 16, 16)) + 80 * labels[:, None, None]
    images = [PIL.Image.fromarray(image.astype(np.uint8)) for image in pixels]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "grey", "light"])}
    )
    datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features).save_to_disk(
        folder / "images"
    )
    return prepare(
        PrepareOptions(
            source="dataset",
            input=[str(folder / "images")],
            output_dir=str(folder / "data"),
            resolution=16,
            color_mode="grayscale",
        )
    )
