"""ImageNet-64 as it is published: zips, pickled batches and .npz batches.

The two archives Imagenet64_train_part1.zip and Imagenet64_train_part2.zip hold train_data_batch_1 to 10, the
validation archive holds val_data. Each batch has "data", uint8 (images, 3 * size * size) with the red, green and blue
planes one after the other, and "labels", integers from 1 to 1000. The same files exist at 8, 16 and 32 pixels and as
.npz.
"""

import itertools
import math
import pathlib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .class_names import NUM_CLASSES, imagenet64_names
from .errors import DataError, naming_damage
from .npz_source import find_files
from .sources import ImageBlock, ImageSource, ImageStream, check_labels, check_split, label_blocks
from .stored_arrays import NpzArray, open_arrays, read_pickle, read_rows


_BATCH_NAME = re.compile(r"(?:train_data_batch_(?P<number>[1-9]|10)|val_data)(?:\.npz|\.pkl|\.pickle)?")
# its name, its pixels as rows, and its labels from 0
_Batch: TypeAlias = tuple[str, np.ndarray | NpzArray, np.ndarray]


class _BatchFile(NamedTuple):
    """One batch: a file, or an entry of a zip; 0 is the number of val_data."""

    number: int
    name: str  # what errors call it
    path: pathlib.Path
    entry: str | None
    num_bytes: int  # unpacked


class PublishedSource(ImageSource):
    """ImageNet-64 in any of its published forms: zips, batch files, or folders that hold them, or folders of those."""

    def __init__(self, inputs: Sequence[str | pathlib.Path] = (), split: str = "train") -> None:
        check_split(split, "ImageNet-64 has", "train", "validation")
        self._files = _find_batches(inputs, split)
        files = [
            {"file": file.path.name, **({"entry": file.entry} if file.entry else {}), "bytes": file.num_bytes}
            for file in self._files
        ]
        places = ", ".join(dict.fromkeys(str(file.path) for file in self._files))
        summary = f"{len(files)} batches of ImageNet-64 ({split}) from {places}"
        super().__init__({"kind": "imagenet64", "split": split, "files": files}, summary)
        missing = sorted(set(range(1, 11)) - {file.number for file in self._files})
        if split == "train" and missing:
            self.description["missing_batches"] = missing
            names = ", ".join(f"train_data_batch_{number}" for number in missing)
            self.warnings = (f"{len(missing)} of the 10 batches are missing: {names}. This is not all of ImageNet-64",)

    def open(self, work_folder: pathlib.Path) -> ImageStream:
        """Opens the first batch, which tells the image size; each batch in turn is copied to the work folder."""
        batches = _open_batches(self._files, work_folder)
        first = next(batches)
        _, data, labels = first
        size = math.isqrt(data.shape[1] // 3)
        # A batch is hardly more than its pixels, so its share of the bytes is its share of the images.
        num_bytes = sum(file.num_bytes for file in self._files)
        num_images = round(num_bytes * len(labels) / self._files[0].num_bytes)
        blocks = _blocks(itertools.chain([first], batches), size)
        return ImageStream(imagenet64_names(), (3, size, size), num_images, blocks)


def _blocks(batches: Iterable[_Batch], size: int) -> Generator[ImageBlock, None, None]:
    for name, data, labels in batches:
        if data.shape[1] != 3 * size * size:
            raise DataError(f"{name} has rows of {data.shape[1]} values instead of {3 * size * size} as the first")
        yield from label_blocks((rows.reshape(-1, 3, size, size) for rows in read_rows(data)), labels)


def _find_batches(inputs: Sequence[str | pathlib.Path], split: str) -> list[_BatchFile]:
    batches: dict[int, _BatchFile] = {}
    for path in find_files(inputs, "ImageNet-64 zips or batches", depth=2):
        entries: list[tuple[str | None, int]] = [(None, path.stat().st_size)]
        if path.suffix.lower() == ".zip":
            with naming_damage(str(path)), zipfile.ZipFile(path) as archive:
                entries = [(entry.filename, entry.file_size) for entry in archive.infolist()]
        for entry, num_bytes in entries:
            match = _BATCH_NAME.fullmatch(pathlib.PurePosixPath(entry or path.name).name)
            if not match or (match["number"] is None) != (split == "validation"):
                continue
            name = f"{path} entry {entry}" if entry else str(path)
            file = _BatchFile(int(match["number"] or 0), name, path, entry, num_bytes)
            if file.number in batches:
                raise DataError(f"{batches[file.number].name} and {file.name} are the same batch: give one of them")
            batches[file.number] = file
    if not batches:
        wanted = "train_data_batch_1 to 10" if split == "train" else "val_data"
        hint = "--split validation reads val_data, --source npz other .npz files"
        raise DataError(f"--input {' '.join(map(str, inputs))}: holds no {wanted} ({hint})")
    return [batches[number] for number in sorted(batches)]


def _open_batches(files: Iterable[_BatchFile], work_folder: pathlib.Path) -> Iterator[_Batch]:
    for file in files:
        # A nameless copy, gone when it is closed and no array of it is left: mapping a file that somebody shortens
        # would end this process. Pixels come before labels in it, and unpacking to the end checks the checksum.
        with tempfile.TemporaryFile(dir=work_folder) as copy:
            with (
                naming_damage(file.name),
                zipfile.ZipFile(file.path).open(file.entry) if file.entry else file.path.open("rb") as original,
            ):
                shutil.copyfileobj(original, copy, 1 << 20)
            copy.flush()
            yield _check_batch(file.name, copy)


def _check_batch(name: str, opened: Any) -> _Batch:
    content: dict[str, Any] = open_arrays(opened, name) if name.endswith(".npz") else read_pickle(opened, name)
    for key in ("data", "labels"):
        if key not in content:
            raise DataError(f'{name} has no "{key}" (--source npz reads other .npz files of images)')
    data, labels = content["data"], content["labels"]
    shape = data.shape if isinstance(data, np.ndarray | NpzArray) and data.dtype == np.uint8 else ()
    if len(shape) != 2 or 0 in shape or 3 * math.isqrt(shape[1] // 3) ** 2 != shape[1]:
        found = f"{getattr(data, 'dtype', type(data).__name__)} of shape {getattr(data, 'shape', None)}"
        raise DataError(f'{name} has "data" that is {found} instead of uint8 (images, 3 * size * size)')
    # of anything but integers numpy would ask where in memory they are, and believe what a pickle says
    if isinstance(labels, list | tuple) and all(type(label) is int for label in labels):
        labels = np.array(labels)
    if not isinstance(labels, np.ndarray | NpzArray):
        raise DataError(f'{name} has something in "labels", which must be a list of integers')
    return name, data, check_labels(labels, f'{name} "labels"', shape[0], 1, NUM_CLASSES)
