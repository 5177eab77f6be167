"""Small batches of the shape in which ImageNet-64 is published, and reading any source."""

import pathlib
import pickle
import tempfile
import zipfile

import numpy as np
import pytest

from imagenet64_diffusion.data.errors import DataError
from imagenet64_diffusion.data.sources import ImageSource, ImageStream


Batch = tuple[np.ndarray, list[int]]


def make_batches(num_batches: int = 10, num_images: int = 103, size: int = 8) -> list[Batch]:
    """Batches whose images are all different and whose labels go through 1 to 1000."""
    pixels = np.random.default_rng(size).integers(0, 256, (num_batches, num_images, 3 * size * size), dtype=np.uint8)
    starts = range(0, num_batches * num_images, num_images)
    return [
        (rows, [image % 1000 + 1 for image in range(start, start + num_images)])
        for rows, start in zip(pixels, starts, strict=True)
    ]


def write_zips(folder: pathlib.Path, batches: list[Batch], protocol: int = 3) -> list[pathlib.Path]:
    """Writes ten batches the way they are published, as two zips of five pickles."""
    paths = [folder / "Imagenet64_train_part1.zip", folder / "Imagenet64_train_part2.zip"]
    for part, path in enumerate(paths):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for number, (pixels, labels) in enumerate(batches[5 * part : 5 * part + 5], start=5 * part + 1):
                content = {"data": pixels, "labels": labels, "mean": pixels.mean(0)}
                archive.writestr(f"train_data_batch_{number}", pickle.dumps(content, protocol))
    return paths


def read_all(source: ImageSource, work_folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray, ImageStream]:
    """All pixels and labels of a source."""
    work_folder.mkdir(exist_ok=True)
    stream = source.open(work_folder)
    blocks = list(stream.blocks)
    pixels, labels = (np.concatenate([block[item] for block in blocks]) for item in (0, 1))
    assert (pixels.dtype, labels.dtype, pixels.shape[1:]) == (np.uint8, np.int64, stream.image_size)
    # only an estimate for zips, but the progress bar should not be far off
    assert abs(stream.num_images - len(pixels)) <= 0.05 * len(pixels) + 1
    return pixels, labels, stream


def refused(message: str, make, *arguments, **options) -> None:
    """Sees to it that a source refuses what it is given, or what it reads then."""
    with tempfile.TemporaryDirectory() as work_folder, pytest.raises(DataError, match=message):
        list(make(*arguments, **options).open(pathlib.Path(work_folder)).blocks)
