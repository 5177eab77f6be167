"""ImageNet-64 as it is published: zips, pickled batches and .npz batches.

The two archives Imagenet64_train_part1.zip and Imagenet64_train_part2.zip hold train_data_batch_1 to 10, the
validation archive holds val_data. Each batch has "data", uint8 (images, 3 * size * size) with the red, green and blue
planes one after the other, and "labels", integers from 1 to 1000. The same files exist at 8, 16 and 32 pixels and as
.npz.
"""

import dataclasses
import math
import pathlib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .array_pickles import StoredArray, read_pickle
from .class_names import NUM_CLASSES, imagenet64_names
from .errors import DataError, naming_damage
from .npz_source import NpzArray, array_keys, find_files, open_array
from .sources import ImageBlock, ImageStream, check_labels


_BATCH_NAME = re.compile(r"(?:train_data_batch_(?P<number>[1-9]|10)|val_data)(?:\.npz|\.pkl|\.pickle)?")


@dataclasses.dataclass(frozen=True)
class _BatchFile:
    """One batch: a file, or an entry of a zip."""

    number: int  # 0: val_data
    path: pathlib.Path
    entry: str | None
    size: int  # bytes, unpacked

    @property
    def name(self) -> str:
        return str(self.path) if self.entry is None else f"{self.path} entry {self.entry}"


class _Batch(NamedTuple):
    """A batch whose outside has been checked; the labels are from 0."""

    file: _BatchFile
    data: StoredArray | NpzArray
    labels: np.ndarray


class PublishedSource:
    """ImageNet-64 in any of its published forms.

    Args:
        inputs: zips, batch files, or folders that hold them (directly or one folder down).
        split: "train" for train_data_batch_N, "validation" for val_data.

    Raises:
        DataError: an input does not exist, holds no such batch, is not a whole zip, or a batch is there twice.
    """

    def __init__(self, inputs: Sequence[str | pathlib.Path], split: str = "train") -> None:
        if split not in ("train", "validation"):
            raise DataError(f"--split {split}: ImageNet-64 has the splits train and validation")
        self._files = _find_batches(inputs, split)
        self.description: dict[str, Any] = {
            "kind": "imagenet64",
            "split": split,
            "files": [
                {"file": file.path.name, **({"entry": file.entry} if file.entry else {}), "bytes": file.size}
                for file in self._files
            ],
        }
        places = dict.fromkeys(str(file.path) for file in self._files)
        self.summary = f"{len(self._files)} batches of ImageNet-64 ({split}) from {', '.join(places)}"
        self.warnings: list[str] = []
        missing = sorted(set(range(1, 11)) - {file.number for file in self._files})
        if split == "train" and missing:
            self.description["missing_batches"] = missing
            self.warnings.append(
                f"{len(missing)} of the 10 batches are missing: "
                + ", ".join(f"train_data_batch_{number}" for number in missing)
                + ". The result will not be the whole of ImageNet-64"
            )

    def open(self, work_folder: pathlib.Path) -> ImageStream:
        """Starts reading: opens the first batch, which tells the size of the images.

        Args:
            work_folder: an existing folder, with room for one unpacked batch when the input is zipped.

        Raises:
            DataError: the first batch is not what a published batch is.
        """
        batches = self._batches(work_folder)
        first = next(batches)
        size = math.isqrt(first.data.shape[1] // 3)
        # A batch is hardly more than its pixels, so its share of the bytes is its share of the images.
        num_images = round(sum(file.size for file in self._files) * len(first.labels) / first.file.size)
        return ImageStream(imagenet64_names(), (3, size, size), num_images, _blocks(first, batches, size))

    def _batches(self, work_folder: pathlib.Path) -> Iterator[_Batch]:
        for file in self._files:
            # What a batch needs on the disk lives only until the next one is asked for.
            with tempfile.TemporaryDirectory(dir=work_folder, prefix="batch-") as folder:
                yield _open_batch(file, pathlib.Path(folder))


def _blocks(first: _Batch, others: Iterator[_Batch], size: int) -> Generator[ImageBlock, None, None]:
    batch: _Batch | None = first
    while batch is not None:
        if batch.data.shape[1] != first.data.shape[1]:
            raise DataError(
                f'{batch.file.name} has "data" rows of {batch.data.shape[1]} values, but {first.file.name} has '
                f"{first.data.shape[1]}: all batches must be of one resolution"
            )
        start = 0
        for rows in batch.data.read_rows(batch.file.name):
            yield ImageBlock(rows.reshape(-1, 3, size, size), batch.labels[start : start + len(rows)])
            start += len(rows)
        batch = next(others, None)


def _find_batches(inputs: Sequence[str | pathlib.Path], split: str) -> list[_BatchFile]:
    batches: dict[int, _BatchFile] = {}
    for path in find_files(inputs, "ImageNet-64 zips or batches", deep=True):
        for file in _batches_in_file(path):
            if (file.number == 0) != (split == "validation"):
                continue
            if file.number in batches:
                raise DataError(
                    f"{batches[file.number].name} and {file.name} are the same batch, which is there twice: give "
                    "--input the files of one of them"
                )
            batches[file.number] = file
    if not batches:
        wanted = "train_data_batch_1 to 10" if split == "train" else "val_data"
        raise DataError(
            f"--input {' '.join(map(str, inputs))}: holds no {wanted} (--split train reads train_data_batch_1 to 10, "
            "--split validation val_data, and --source npz other .npz files of images)"
        )
    return [batches[number] for number in sorted(batches)]


def _batches_in_file(path: pathlib.Path) -> Iterator[_BatchFile]:
    """Lists the batches in a zip, or the one that a file is."""
    if path.suffix.lower() != ".zip":
        if (match := _BATCH_NAME.fullmatch(path.name)) and not path.is_dir():
            yield _BatchFile(int(match["number"] or 0), path, None, path.stat().st_size)
        return
    with naming_damage(str(path)), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = pathlib.PurePosixPath(entry.filename)
            # macOS puts a hidden twin of every file under __MACOSX
            if (match := _BATCH_NAME.fullmatch(name.name)) and "__MACOSX" not in name.parts:
                yield _BatchFile(int(match["number"] or 0), path, entry.filename, entry.file_size)


def _open_batch(file: _BatchFile, folder: pathlib.Path) -> _Batch:
    path, name = file.path, file.name
    if file.entry is not None:
        # Unpacked first: pixels come before labels in it, and unpacking to the end checks the checksum.
        path = folder / "batch"
        with (
            naming_damage(name),
            zipfile.ZipFile(file.path) as archive,
            archive.open(file.entry) as packed,
            path.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    if (file.entry or file.path.name).endswith(".npz"):
        keys = array_keys(path, name)
        content: Any = {key: open_array(path, name, key) for key in ("data", "labels") if key in keys}
    else:
        content = read_pickle(path, name)
    if not isinstance(content, dict):
        raise DataError(f'{name} holds a {type(content).__name__} instead of a dict with "data" and "labels"')
    # Python 2 wrote the keys as bytes
    content = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    for key in ("data", "labels"):
        if key not in content:
            raise DataError(f'{name} has no "{key}" (--source npz reads other .npz files of images)')
    data = _check_data(name, content["data"])
    labels = _label_values(name, content["labels"])
    return _Batch(file, data, check_labels(labels, f'{name} "labels"', data.shape[0], 1, NUM_CLASSES))


def _check_data(name: str, data: Any) -> StoredArray | NpzArray:
    if not isinstance(data, StoredArray | NpzArray):
        raise DataError(f'{name} has a {type(data).__name__} as "data" instead of a uint8 array')
    num_images, row_width = data.shape if len(data.shape) == 2 else (0, 0)
    size = math.isqrt(row_width // 3)
    if data.dtype != np.uint8 or not num_images or not size or 3 * size * size != row_width or data.fortran_order:
        order = " in Fortran order" if data.fortran_order else ""
        raise DataError(
            f'{name} has "data" of type {data.dtype} and shape {data.shape}{order} instead of uint8 (images, '
            "3 * size * size), one image a row (12288 values for 64x64)"
        )
    return data


def _label_values(name: str, labels: Any) -> np.ndarray:
    if isinstance(labels, StoredArray | NpzArray):
        if labels.dtype is None or len(labels.shape) != 1:
            raise DataError(f'{name} has "labels" of shape {labels.shape} instead of a list of integers')
        return np.concatenate([np.empty(0, labels.dtype), *labels.read_rows(name)])
    # bool is a kind of int in Python, but no label
    if not isinstance(labels, list | tuple) or not all(type(label) is int for label in labels):
        raise DataError(f'{name} has something in "labels", which must be a list of integers')
    with naming_damage(f'{name} "labels"'):
        return np.array(labels, np.int64)
