"""An evaluation of images as a folder: statistics of features with all that they depend on, and kept features.

``statistics.npz`` comes last, so a folder that has it is whole. Beside it may lie ``features.npy``,
``probabilities.npy``, ``labels.npy`` and ``indices.npy`` (which images the rows are), all of as many rows, and the
images themselves: ``images/`` (PNG) or ``images.npz`` (arr_0 uint8 (images, height, width, channels), arr_1 labels, as
the evaluator of guided-diffusion reads them; -1 is the null class, and models without classes have no arr_1).

Until then ``parts`` holds what has been extracted: ``{start}-{stop}.npz`` for each stretch of images, written
atomically. An image takes 4 bytes there for each feature and class probability: 12 kB with the Inception of ``clean``.
"""

import itertools
import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..pipelines.image_grid import to_image
from ..utils.atomic_write import atomic_file, atomic_folder
from .statistics import FeatureStatistics


STATISTICS_NAME = "statistics.npz"
PARTS_NAME = "parts"
_ROW_ARRAYS = ("features", "probabilities", "labels")
_PART = re.compile(r"(\d+)-(\d+)\.npz")


@dataclass
class Evaluation:
    """An evaluated set of images.

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
    features: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    labels: np.ndarray | None = None

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        """Opens the folder of an evaluation, or its ``statistics.npz`` alone, which may have another name and place.

        Raises:
            ValueError: If there is no whole one.
        """
        path = Path(path)
        folder, file = (path, path / STATISTICS_NAME) if path.is_dir() else (path.parent, path)
        if not file.is_file():
            unfinished = ", which is not finished" if (folder / PARTS_NAME).is_dir() else ""
            raise ValueError(
                f"{path} is not an evaluation{unfinished}: give a folder with {STATISTICS_NAME}, as"
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
        return cls(folder, statistics, statistics.header, **rows)

    @property
    def known_labels(self) -> np.ndarray | None:
        """The labels, if some are classes and those are the extractor's, by name where both have names; else None."""
        if self.labels is None or self.probabilities is None or (np.asarray(self.labels) < 0).all():
            return None
        protocol, images = self.header["protocol"], self.header["images"]
        ours, theirs = images.get("id2label"), protocol.get("id2label")
        if ours is None or theirs is None:
            same = protocol.get("num_classes") == images.get("num_classes") == self.probabilities.shape[1]
        else:
            same = ours == theirs
        return self.labels if same else None


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file by an atomic write."""
    with atomic_file(file) as writing:
        writing.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def evenly_spread(count: int, total: int) -> np.ndarray:
    """Indices of count of total things, from the first to the last, rising; int64 (min(count, total),)."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


def find_parts(folder: Path) -> list[tuple[int, int, Path]]:
    """The parts in a folder, (start, stop, file), in the order of their images."""
    matches = [(_PART.fullmatch(file.name), file) for file in folder.iterdir()]
    return sorted((int(match[1]), int(match[2]), file) for match, file in matches if match)


def missing_batches(parts: list[tuple[int, int, Path]], num_images: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of stretches of at most batch_size images that no part holds, in their order."""
    position = 0
    for start, stop in [*((start, stop) for start, stop, _ in parts), (num_images, num_images)]:
        while position < start:
            end = min(position + batch_size, start)
            yield position, end
            position = end
        position = max(position, stop)


def read_parts(folder: Path, *names: str) -> Iterator[dict[str, np.ndarray]]:
    """Those of the named arrays that each part has, in the order of the images, each of which comes once.

    Parts may overlap: when one rank alone is killed, the others may still write a last part while the next run has
    begun with batches of another size.

    Raises:
        ValueError: If an image is in no part.
    """
    position = 0
    for start, stop, file in find_parts(folder):
        if start > position:
            raise ValueError(f"{folder} has no part with image {position}: remove it and evaluate again")
        if stop > position:
            with np.load(file, allow_pickle=False) as arrays:
                yield {name: arrays[name][position - start :] for name in names if name in arrays.files}
            position = stop


def write_evaluation(
    folder: Path, header: Mapping[str, Any], num_images: int, num_rows: int, keep_images: str | None = None
) -> None:
    """Puts the parts of an evaluation together and removes them.

    Memory holds one part, and what the statistics need. While this runs the disk holds everything twice.

    Args:
        folder: Has the parts in ``parts``.
        header: See `Evaluation`.
        num_images: How many images the parts hold.
        num_rows: Keep the features of so many images, evenly spread; 0 keeps none.
        keep_images: ``"png"`` or ``"npz"``, if the parts have pixels to keep.

    Raises:
        ValueError: If images are missing.
        OSError: If something cannot be written. The parts stay, and this can be called again.
    """
    parts = folder / PARTS_NAME
    sizes = [part["features"].shape for part in read_parts(parts, "features")]
    if sum(count for count, _ in sizes) != num_images:
        raise ValueError(f"{parts} does not hold {num_images} images: remove it and evaluate again")
    if keep_images is not None:
        _write_images(folder, num_images, keep_images)
    statistics = FeatureStatistics(sizes[0][1])
    for part in read_parts(parts, "features"):
        statistics.update(part["features"])
    kept = evenly_spread(num_rows, num_images)
    for name in (*_ROW_ARRAYS, "indices"):
        # what a call that was killed here has written may be of another number of rows
        (folder / f"{name}.npy").unlink(missing_ok=True)
    for name in _ROW_ARRAYS if len(kept) else ():
        _write_rows(folder / f"{name}.npy", (part[name] for part in read_parts(parts, name) if part), kept)
    if len(kept):
        _write_rows(folder / "indices.npy", iter([np.arange(num_images)]), kept)
    statistics.save(folder / STATISTICS_NAME, header)
    shutil.rmtree(parts)


def _write_rows(file: Path, arrays: Iterator[np.ndarray], kept: np.ndarray) -> None:
    """Writes those rows of arrays, one after the other, whose numbers are kept; nothing if there are no arrays."""
    first = next(arrays, None)
    if first is None:
        return
    with atomic_file(file) as writing, writing.open("wb") as opened:
        _write_npy_header(opened, first.dtype, (len(kept), *first.shape[1:]))
        position = 0
        for array in itertools.chain([first], arrays):
            mine = kept[(kept >= position) & (kept < position + len(array))] - position
            # not by a memory map, with which a full disk ends the process without a word
            opened.write(array[mine].tobytes())
            position += len(array)


def _write_npy_header(file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _write_images(folder: Path, num_images: int, keep_images: str) -> None:
    parts = folder / PARTS_NAME
    images = (image for part in read_parts(parts, "pixels") for image in part["pixels"].transpose(0, 2, 3, 1))
    if keep_images == "png":
        digits = max(5, len(str(num_images)))
        with atomic_folder(folder / "images") as writing:
            for index, image in enumerate(images):
                to_image(image).save(writing / f"{index:0{digits}d}.png")
        return
    with atomic_file(folder / "images.npz") as writing, zipfile.ZipFile(writing, "w") as archive:
        # one image at a time, and so in no more memory than that
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            for index, image in enumerate(images):
                if index == 0:
                    _write_npy_header(member, image.dtype, (num_images, *image.shape))
                member.write(np.ascontiguousarray(image).data)
        labels = [part["labels"] for part in read_parts(parts, "labels") if part]
        if labels:
            with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.concatenate(labels), allow_pickle=False)
