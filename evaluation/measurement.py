"""A measured set of images, as a folder: statistics of its features with all that they depend on, and features.

``statistics.npz`` comes last, so a folder that has it is whole. Beside it may lie ``features.npy``,
``probabilities.npy``, ``labels.npy`` and ``indices.npy`` (which images the rows are), all of as many rows, and the
images themselves: ``images/`` (PNG) or ``images.npz`` (arr_0 uint8 (images, height, width, channels), arr_1 labels, as
the evaluator of guided-diffusion reads them; -1 is the null class, and models without classes have no arr_1).
"""

import contextlib
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..pipelines.image_grid import to_image
from ..utils.atomic_write import atomic_file, atomic_folder
from .extraction import read_parts
from .statistics import FeatureStatistics


STATISTICS_NAME = "statistics.npz"
PARTS_NAME = "parts"
_ROWS_NAME = "rows"
_ROW_ARRAYS = ("features", "probabilities", "labels")


@dataclass
class Measurement:
    """A measured set of images.

    Attributes:
        folder: Where it lies.
        statistics: Mean and covariance of the features of all images.
        header: ``protocol``: how features are made; ``images``: which images these are; ``kept``: what lies beside
            the statistics; ``versions``.
        features: float32 (rows, features) of some or all of the images, mapped from the disk; None if not kept.
        probabilities: float32 (rows, classes) of a classifier, likewise.
        labels: int64 (rows,) of the images, -1 for none, likewise.
    """

    folder: Path
    statistics: FeatureStatistics
    header: dict[str, Any]
    features: np.ndarray | None
    probabilities: np.ndarray | None
    labels: np.ndarray | None

    @classmethod
    def load(cls, path: str | Path) -> "Measurement":
        """Opens the folder of a measurement, or its ``statistics.npz`` alone, which may have another name and place.

        Raises:
            ValueError: If there is no whole one.
        """
        path = Path(path)
        folder, file = (path, path / STATISTICS_NAME) if path.is_dir() else (path.parent, path)
        if not file.is_file():
            unfinished = ", whose measuring has not ended" if (folder / PARTS_NAME).is_dir() else ""
            raise ValueError(
                f"{path} is not a measurement{unfinished}: give a folder with {STATISTICS_NAME}, as"
                " evaluate_models.py reference and model write it"
            )
        statistics = FeatureStatistics.load(file)
        if not all(isinstance(statistics.header.get(part), dict) for part in ("protocol", "images")):
            raise ValueError(f"{file} does not say by which protocol its features were made, and of which images")
        rows = {}
        for name in _ROW_ARRAYS:
            if file.name == STATISTICS_NAME and (folder / f"{name}.npy").is_file():
                rows[name] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        lengths = {name: len(array) for name, array in rows.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{folder} has arrays of different lengths: {lengths}")
        return cls(folder, statistics, statistics.header, **{name: rows.get(name) for name in _ROW_ARRAYS})


def evenly_spread(count: int, total: int) -> np.ndarray:
    """Indices of count of total things, from the first to the last, in rising order; of all if they are fewer.

    Returns:
        int64 (min(count, total),), all different.
    """
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


def write_measurement(
    folder: Path, header: Mapping[str, Any], num_images: int, num_rows: int, keep_images: str | None = None
) -> FeatureStatistics:
    """Puts the parts of a measurement together and removes them.

    Memory holds one part, and what the statistics need. While this runs the disk holds everything twice.

    Args:
        folder: Has the parts in ``parts``.
        header: See `Measurement`.
        num_images: How many images the parts hold.
        num_rows: Keep the features of so many images, evenly spread; 0 keeps none.
        keep_images: ``"png"`` or ``"npz"``, if the parts have pixels to keep.

    Returns:
        The statistics.

    Raises:
        ValueError: If images are missing.
        OSError: If something cannot be written. The parts stay, and this can be called again.
    """
    parts = folder / PARTS_NAME
    if keep_images is not None:
        _write_images(folder, num_images, keep_images)
    statistics: FeatureStatistics | None = None
    kept = evenly_spread(num_rows, num_images)
    position = 0
    with atomic_folder(folder / _ROWS_NAME) as writing, contextlib.ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        for part in read_parts(parts):
            if statistics is None:
                statistics = FeatureStatistics(part["features"].shape[1])
            statistics.update(part["features"])
            size = len(part["features"])
            mine = kept[(kept >= position) & (kept < position + size)] - position
            part["indices"] = np.arange(position, position + size)
            for name in (*_ROW_ARRAYS, "indices"):
                if name not in part or not len(kept):
                    continue
                rows = part[name][mine]
                if name not in files:
                    files[name] = stack.enter_context((writing / f"{name}.npy").open("wb"))
                    _write_npy_header(files[name], rows.dtype, (len(kept), *rows.shape[1:]))
                # not by a memory map, with which a full disk ends the process without a word
                files[name].write(rows.tobytes())
            position += size
        if statistics is None or position != num_images:
            raise ValueError(f"{parts} holds {position} images instead of {num_images}: remove it and measure again")
    for name in (*_ROW_ARRAYS, "indices"):
        # those of a call that was killed here and kept another number of rows
        (folder / f"{name}.npy").unlink(missing_ok=True)
    for file in (folder / _ROWS_NAME).iterdir():
        file.replace(folder / file.name)
    (folder / _ROWS_NAME).rmdir()
    statistics.save(folder / STATISTICS_NAME, header)
    remove_parts(folder)
    return statistics


def remove_parts(folder: Path) -> None:
    """Removes what only a measurement that has not ended needs."""
    if (folder / PARTS_NAME).is_dir():
        shutil.rmtree(folder / PARTS_NAME)


def _write_npy_header(file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _write_images(folder: Path, num_images: int, keep_images: str) -> None:
    parts = folder / PARTS_NAME
    if keep_images == "png":
        digits = max(5, len(str(num_images)))
        with atomic_folder(folder / "images") as writing:
            for index, image in enumerate(_pixels(parts)):
                to_image(image).save(writing / f"{index:0{digits}d}.png")
        return
    with atomic_file(folder / "images.npz") as writing, zipfile.ZipFile(writing, "w") as archive:
        shape = next(_pixels(parts)).shape
        # one image at a time, and so in no more memory than that
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            _write_npy_header(member, np.dtype(np.uint8), (num_images, *shape))
            for image in _pixels(parts):
                member.write(np.ascontiguousarray(image).data)
        labels = [part["labels"] for part in read_parts(parts) if "labels" in part]
        if labels:
            with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.concatenate(labels), allow_pickle=False)


def _pixels(parts: Path) -> Iterator[np.ndarray]:
    """uint8 (height, width, channels) of each image in turn."""
    for part in read_parts(parts):
        yield from part["pixels"].transpose(0, 2, 3, 1)
