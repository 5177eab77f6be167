"""Small batches of the shape in which ImageNet-64 is published."""

import pathlib
import pickle
import zipfile
from collections.abc import Callable

import numpy as np
import pytest


Batch = tuple[np.ndarray, list[int]]


@pytest.fixture
def make_batches() -> Callable[..., list[Batch]]:
    """Makes batches whose images are all different and whose labels go through 1 to 1000."""

    def make(num_batches: int = 10, num_images: int = 103, size: int = 8) -> list[Batch]:
        generator = np.random.default_rng(size)
        batches = []
        for index in range(num_batches):
            pixels = generator.integers(0, 256, (num_images, 3 * size * size), dtype=np.uint8)
            labels = [(index * num_images + image) % 1000 + 1 for image in range(num_images)]
            batches.append((pixels, labels))
        return batches

    return make


@pytest.fixture
def write_zips() -> Callable[..., list[pathlib.Path]]:
    """Writes ten batches the way they are published, as two zips of five pickles."""

    def write(folder: pathlib.Path, batches: list[Batch], protocol: int = 3) -> list[pathlib.Path]:
        paths = [folder / "Imagenet64_train_part1.zip", folder / "Imagenet64_train_part2.zip"]
        for part, path in enumerate(paths):
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for index in range(5 * part, min(5 * part + 5, len(batches))):
                    pixels, labels = batches[index]
                    content = {"data": pixels, "labels": labels, "mean": pixels.mean(0)}
                    archive.writestr(f"train_data_batch_{index + 1}", pickle.dumps(content, protocol))
        return paths

    return write
