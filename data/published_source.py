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
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, cast

import numpy as np

from .class_names import NUM_CLASSES, imagenet64_names
from .errors import DataError
from .npz_arrays import array_keys, open_array, read_blocks, zip_errors
from .published_pickles import FileRange, StoredArray, read_pickle
from .sources import ImageBlock, ImageStream


TRAIN_BATCHES = range(1, 11)

_BATCH_NAME = re.compile(r"(?:train_data_batch_(?P<number>\d+)|val_data)(?P<suffix>\.npz|\.pkl|\.pickle)?")


@dataclasses.dataclass(frozen=True)
class _BatchFile:
    """One batch: a file, or an entry of a zip."""

    number: int | None  # None: val_data
    path: pathlib.Path
    entry: str | None
    size: int  # bytes, unpacked

    @property
    def name(self) -> str:
        return str(self.path) if self.entry is None else f"{self.path}, entry {self.entry},"

    @property
    def is_npz(self) -> bool:
        return (self.entry or self.path.name).endswith(".npz")


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A batch whose outside has been checked.

    Attributes:
        labels: int64 (images,), from 0.
        row_width: bytes of one image.
        read_rows: gives the pixels in order, uint8 (some images, row_width).
    """

    name: str
    size: int
    labels: np.ndarray
    row_width: int
    read_rows: Callable[[], Iterator[np.ndarray]]


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
        self._files = _find_batches([pathlib.Path(item) for item in inputs], split)
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
        if split == "train":
            missing = sorted(set(TRAIN_BATCHES) - {file.number for file in self._files})
            if missing:
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
        size = math.isqrt(first.row_width // 3)
        # A batch is hardly more than its pixels, so its share of the bytes is its share of the images.
        total_bytes = sum(file.size for file in self._files)
        return ImageStream(
            class_names=imagenet64_names(),
            image_size=(3, size, size),
            num_images=round(total_bytes * len(first.labels) / first.size),
            blocks=_blocks(first, batches, size),
        )

    def _batches(self, work_folder: pathlib.Path) -> Iterator[_Batch]:
        for file in self._files:
            # What a batch needs on the disk lives only until the next one is asked for.
            with tempfile.TemporaryDirectory(dir=work_folder, prefix="batch-") as folder:
                yield _open_batch(file, pathlib.Path(folder))


def _blocks(first: _Batch, others: Iterator[_Batch], size: int) -> Generator[ImageBlock, None, None]:
    batch: _Batch | None = first
    while batch is not None:
        if batch.row_width != first.row_width:
            raise DataError(
                f'{batch.name} has "data" rows of {batch.row_width} values, but {first.name} has {first.row_width}: '
                "all batches must be of one resolution"
            )
        start = 0
        for rows in batch.read_rows():
            yield ImageBlock(rows.reshape(-1, 3, size, size), batch.labels[start : start + len(rows)])
            start += len(rows)
        batch = next(others, None)


def _find_batches(inputs: Sequence[pathlib.Path], split: str) -> list[_BatchFile]:
    if not inputs:
        raise DataError("--input is missing: give the ImageNet-64 zips or batches, or the folder that holds them")
    found: list[_BatchFile] = []
    for item in inputs:
        if item.is_dir():
            for path in sorted([*item.glob("*"), *item.glob("*/*")]):
                if path.is_file() and (path.suffix.lower() == ".zip" or _BATCH_NAME.fullmatch(path.name)):
                    found += _batches_in_file(path)
        elif not item.exists():
            raise DataError(f"--input {item}: no such file or folder")
        else:
            in_file = _batches_in_file(item)
            if not in_file:
                hint = " (--source npz reads other .npz files of images)" if item.suffix.lower() == ".npz" else ""
                raise DataError(f"--input {item}: holds neither train_data_batch_1 to 10 nor val_data{hint}")
            found += in_file
    wanted = [file for file in found if (file.number is None) == (split == "validation")]
    if not wanted:
        names = "train_data_batch_1 to 10" if split == "train" else "val_data"
        others = (
            f"; there is the other split (--split {'validation' if split == 'train' else 'train'})" if found else ""
        )
        raise DataError(f"--input {' '.join(map(str, inputs))}: no {names} for --split {split}{others}")

    by_number: dict[int | None, _BatchFile] = {}
    for file in wanted:
        if file.number is not None and file.number not in TRAIN_BATCHES:
            raise DataError(f"{file.name} would be batch {file.number}, but the batches go from 1 to 10")
        if file.number in by_number:
            batch = "val_data" if file.number is None else f"train_data_batch_{file.number}"
            raise DataError(
                f"{batch} is there twice: {by_number[file.number].name.rstrip(',')} and {file.name.rstrip(',')}. "
                "Give --input the files of one of them"
            )
        by_number[file.number] = file
    return sorted(by_number.values(), key=lambda file: file.number or 0)


def _batches_in_file(path: pathlib.Path) -> list[_BatchFile]:
    """Lists the batches in a zip, or the one that a file is; empty when there are none."""
    if path.suffix.lower() != ".zip":
        match = _BATCH_NAME.fullmatch(path.name)
        return [_BatchFile(_number(match), path, None, path.stat().st_size)] if match else []
    with zip_errors(str(path)), zipfile.ZipFile(path) as archive:
        entries = [(entry, pathlib.PurePosixPath(entry.filename)) for entry in archive.infolist()]
        return [
            _BatchFile(_number(match), path, entry.filename, entry.file_size)
            for entry, name in entries
            # macOS puts a hidden twin of every file under __MACOSX
            if (match := _BATCH_NAME.fullmatch(name.name)) and "__MACOSX" not in name.parts
        ]


def _number(match: re.Match[str]) -> int | None:
    return int(match["number"]) if match["number"] else None


def _open_batch(file: _BatchFile, folder: pathlib.Path) -> _Batch:
    path = file.path
    if file.entry is not None:
        # Unpacked first: pixels come before labels in it, and unpacking to the end checks the checksum.
        path = folder / "batch"
        with zip_errors(file.name), zipfile.ZipFile(file.path) as archive, path.open("wb") as unpacked:
            shutil.copyfileobj(archive.open(file.entry), unpacked, 1 << 20)
    return (_open_npz if file.is_npz else _open_pickle)(path, file, folder)


def _open_pickle(path: pathlib.Path, file: _BatchFile, folder: pathlib.Path) -> _Batch:
    content = read_pickle(path, file.name, folder)
    if not isinstance(content, dict):
        raise DataError(f'{file.name} holds a {type(content).__name__} instead of a dict with "data" and "labels"')
    # Python 2 wrote the keys as bytes
    content = {key.decode("ascii", "replace") if isinstance(key, bytes) else key: content[key] for key in content}
    for key in ("data", "labels"):
        if key not in content:
            keys = ", ".join(map(repr, content)) or "no keys"
            raise DataError(f'{file.name} has no "{key}": it holds {keys}')
    data = content["data"]
    if not isinstance(data, StoredArray):
        raise DataError(f'{file.name} has a {type(data).__name__} as "data" instead of a uint8 array')
    num_images, row_width = _check_data(file.name, data.shape, str(data.element_type), data.fortran_order)
    if not data.is_whole():
        raise DataError(f'{file.name} has "data" with more or fewer bytes than its shape {data.shape} asks for')
    labels = _check_labels(file.name, _label_values(file.name, content["labels"]), num_images)

    def read_rows() -> Iterator[np.ndarray]:
        if isinstance(data.data, FileRange):
            with data.data.path.open("rb") as opened:
                opened.seek(data.data.offset)
                yield from read_blocks(opened, file.name, num_images, row_width)
        else:
            yield np.frombuffer(cast(bytes, data.data), np.uint8).reshape(num_images, row_width)

    return _Batch(file.name, file.size, labels, row_width, read_rows)


def _label_values(name: str, labels: Any) -> np.ndarray:
    if isinstance(labels, StoredArray):
        dtype = labels.element_type.numpy_dtype()
        if dtype is None or dtype.kind not in "iu" or len(labels.shape) != 1 or not labels.is_whole():
            raise DataError(
                f'{name} has "labels" of type {labels.element_type} and shape {labels.shape} instead of a list of '
                "integers"
            )
        content = labels.data.read() if isinstance(labels.data, FileRange) else cast(bytes, labels.data)
        return np.frombuffer(content, dtype)
    # bool is a kind of int in Python, but no label
    if not isinstance(labels, list | tuple) or not all(type(label) is int for label in labels):
        odd = next((label for label in labels if type(label) is not int), labels) if labels else labels
        raise DataError(f'{name} has a {type(odd).__name__} in "labels", which must be a list of integers')
    try:
        return np.array(labels, np.int64)
    except OverflowError as error:
        raise DataError(
            f'{name} has a number in "labels" that does not fit 64 bits; they go from 1 to 1000'
        ) from error


def _open_npz(path: pathlib.Path, file: _BatchFile, folder: pathlib.Path) -> _Batch:
    keys = array_keys(path, file.name)
    for key in ("data", "labels"):
        if key not in keys:
            raise DataError(
                f'{file.name} has no array "{key}": it holds {", ".join(keys) or "no array"} '
                "(--source npz reads other .npz files of images)"
            )
    data, labels = (open_array(path, file.name, key) for key in ("data", "labels"))
    num_images, row_width = _check_data(file.name, data.shape, str(data.dtype), data.fortran_order)
    if labels.dtype.kind not in "iu" or labels.shape != (num_images,):
        raise DataError(
            f'{file.name} has "labels" of type {labels.dtype} and shape {labels.shape} instead of {num_images} '
            "integers"
        )
    return _Batch(file.name, file.size, _check_labels(file.name, labels.read(), num_images), row_width, data.read_rows)


def _check_data(name: str, shape: tuple[int, ...], dtype: str, fortran_order: bool) -> tuple[int, int]:
    right = "(images, 3 * size * size), one image a row"
    if dtype != "uint8":
        raise DataError(f'{name} has "data" of type {dtype} instead of uint8')
    if len(shape) != 2:
        raise DataError(f'{name} has "data" of shape {shape} instead of {right}')
    num_images, row_width = shape
    size = math.isqrt(row_width // 3)
    if num_images < 1 or size < 1 or 3 * size * size != row_width:
        raise DataError(f'{name} has "data" of shape {shape} instead of {right} (12288 values for 64x64)')
    if fortran_order and num_images > 1:
        raise DataError(f'{name} has "data" stored column after column instead of image after image')
    return num_images, row_width


def _check_labels(name: str, labels: np.ndarray, num_images: int) -> np.ndarray:
    if len(labels) != num_images:
        raise DataError(f"{name} has {len(labels)} labels for {num_images} images")
    wrong = np.flatnonzero((labels < 1) | (labels > NUM_CLASSES))
    if len(wrong):
        raise DataError(
            f"{name} has the label {labels[wrong[0]]} for its image {wrong[0]}; labels go from 1 to {NUM_CLASSES}"
        )
    return labels.astype(np.int64) - 1
