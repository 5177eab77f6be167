"""Images of 1 to 64 channels from .npz files, and the arrays of such files, read in blocks and without pickles.

A file holds "images", uint8 (images, height, width, channels), and "labels", integers (images,) from 0; or the
same as "arr_0" and "arr_1", which is how numpy.savez calls arrays without a name and how guided-diffusion stores
its samples. Without labels all images are of one class. "class_names", text (classes,), names the classes; without
it their names are the numbers, "0" to the largest label.
"""

import contextlib
import dataclasses
import math
import pathlib
import re
import zipfile
from collections.abc import Generator, Iterator, Sequence
from typing import IO, Any

import numpy as np

from .errors import DataError, naming_damage
from .sources import MOST_UNNAMED_CLASSES, ImageBlock, ImageStream, check_labels


MAX_CHANNELS = 64

_BLOCK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class NpzArray:
    """An array of a .npz file whose header has been read, and whose elements have not.

    numpy.load reads an array whole, which for a set of images may be more than there is memory.

    Attributes:
        path: the file.
        name: what errors call the array.
        key: the name of the array in the file.
        shape: its lengths.
        dtype: the type of its elements, never Python objects.
        fortran_order: whether the first index runs fastest.
        crc32: the checksum that the zip keeps of it, as eight hex digits.
    """

    path: pathlib.Path
    name: str
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    crc32: str

    def read(self) -> np.ndarray:
        """Reads the whole array, for small ones such as labels.

        Raises:
            DataError: the file is damaged.
        """
        with _opened_member(self.path, self.name, self.key) as (_, member):
            array = np.lib.format.read_array(member, allow_pickle=False)
            # the checksum is compared when the end is reached
            member.read(1)
        return array

    def read_rows(self, name: str | None = None) -> Iterator[np.ndarray]:
        """Reads an array in C order in blocks of some megabytes.

        Returns:
            Arrays (rows, ...) of the array's type, which joined along the first axis are the array; read only.

        Raises:
            DataError: the file is damaged; a wrong checksum is seen after the last block.
        """
        with _opened_member(self.path, self.name, self.key) as (_, member):
            _read_header(member)
            yield from read_blocks(member, name or self.name, self.shape, self.dtype)
            member.read(1)


def array_keys(path: pathlib.Path, name: str) -> list[str]:
    """Lists the arrays of a .npz file, in its order.

    Args:
        path: the file.
        name: what errors call it.

    Raises:
        DataError: it is no whole zip.
    """
    with naming_damage(name), zipfile.ZipFile(path) as archive:
        return [member.removesuffix(".npy") for member in archive.namelist() if member.endswith(".npy")]


def open_array(path: pathlib.Path, name: str, key: str) -> NpzArray:
    """Reads the header of an array.

    Args:
        path: the file.
        name: what errors call it.
        key: the name of the array, one of :func:`array_keys`.

    Raises:
        DataError: it is no array of numbers or text, or has more or fewer bytes than its shape asks for.
    """
    name = f'{name} array "{key}"'
    with _opened_member(path, name, key) as (entry, member):
        shape, fortran_order, dtype = _read_header(member)
        if dtype.hasobject:
            raise DataError(f"{name} holds Python objects, which are stored as a pickle and never read here")
        found, right = entry.file_size - member.tell(), math.prod(shape) * dtype.itemsize
        if found != right:
            state = "ends early" if found < right else "is longer than its shape asks for"
            raise DataError(f"{name} {state}: {shape} of {dtype} makes {right:,} bytes, but there are {found:,}")
    return NpzArray(path, name, key, shape, dtype, fortran_order, f"{entry.CRC:08x}")


def read_blocks(opened: IO[bytes], name: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Reads the elements of an array in C order, which lie one after the other in a file.

    Args:
        opened: the file, at the first element.
        name: what errors call it.
        shape: (rows, ...).
        dtype: the type of an element.

    Returns:
        Read-only arrays (some rows, ...) of some megabytes.

    Raises:
        DataError: the file ends before the last row.
    """
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    rows_at_once = max(1, _BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], rows_at_once):
        rows = min(rows_at_once, shape[0] - start)
        data = opened.read(rows * row_bytes)
        if len(data) < rows * row_bytes:
            raise DataError(f"{name} ends early, in row {start + len(data) // row_bytes} of {shape[0]}")
        yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])


@contextlib.contextmanager
def _opened_member(path: pathlib.Path, name: str, key: str) -> Iterator[tuple[zipfile.ZipInfo, IO[bytes]]]:
    with naming_damage(name), zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
        with archive.open(entry) as member:
            yield entry, member


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the format")
    shape, fortran_order, dtype = readers[version](member)
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {shape}")
    return shape, fortran_order, dtype


@dataclasses.dataclass(frozen=True)
class _ImageFile:
    """One .npz file, whose arrays have the right types and shapes."""

    path: pathlib.Path
    images: NpzArray
    labels: NpzArray | None
    class_names: NpzArray | None


class NpzSource:
    """Images and labels of .npz files, one file after the other.

    Args:
        inputs: the files in their order, or folders, whose .npz files follow in the natural order of their
            names (part2 before part10).
        split: only "train" exists: a file is what it is.

    Raises:
        DataError: an input does not exist, is named twice, is not a whole .npz file, or lacks images; arrays
            are of other types or shapes than above; two files differ in the size of their images, or only one of
            them has labels.
    """

    def __init__(self, inputs: Sequence[str | pathlib.Path], split: str = "train") -> None:
        if split != "train":
            raise DataError(f"--split {split}: .npz files have only the split train; give --input the files to read")
        self._files = [_open_file(path) for path in find_files(inputs, ".npz files", ".npz")]
        if not self._files:
            raise DataError(f"--input {' '.join(map(str, inputs))}: the folder holds no .npz file")
        first = self._files[0]
        for file in self._files[1:]:
            sizes = ["{}x{} with {} channels".format(*item.images.shape[1:]) for item in (file, first)]
            if sizes[0] != sizes[1]:
                raise DataError(
                    f"{file.path} has images of height x width {sizes[0]}, but {first.path} has {sizes[1]}"
                )
            if (file.labels is None) != (first.labels is None):
                raise DataError(f"of {first.path} and {file.path} only one has labels: all files must be alike")
        # The checksums are in the zip anyway, and tell a file from another of the same name and size.
        self.description: dict[str, Any] = {
            "kind": "npz",
            "split": split,
            "files": [
                {
                    "file": file.path.name,
                    "bytes": file.path.stat().st_size,
                    "crc32": {
                        array.key: array.crc32 for array in (file.images, file.labels, file.class_names) if array
                    },
                }
                for file in self._files
            ],
        }
        paths = [str(file.path) for file in self._files]
        plural = "s" if len(paths) > 1 else ""
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        self.summary = f"{len(paths)} .npz file{plural}: {', '.join(paths[:3])}{more}"
        self.warnings: list[str] = []
        if first.labels is None:
            self.warnings.append(f'{first.path} has no array "labels" or "arr_1": all images are of one class')

    def open(self, work_folder: pathlib.Path) -> ImageStream:
        """Reads labels and names of classes, and starts reading the images.

        Args:
            work_folder: not used; nothing has to be unpacked.

        Raises:
            DataError: a label is out of range, files name their classes differently, or a file is damaged.
        """
        class_names = _read_class_names(self._files[0])
        for file in self._files[1:]:
            if _read_class_names(file) != class_names:
                raise DataError(
                    f"{file.path} has other class_names than {self._files[0].path}: all must have the same"
                )
        labels = [_read_labels(file, class_names) for file in self._files]
        if class_names is None:
            largest = max(int(values.max()) for values in labels)
            class_names = ["image"] if self._files[0].labels is None else [str(n) for n in range(largest + 1)]
        _, height, width, channels = self._files[0].images.shape
        return ImageStream(class_names, (channels, height, width), sum(map(len, labels)), self._blocks(labels))

    def _blocks(self, labels: list[np.ndarray]) -> Generator[ImageBlock, None, None]:
        for file, labels_of_file in zip(self._files, labels, strict=True):
            start = 0
            for images in file.images.read_rows():
                yield ImageBlock(images.transpose(0, 3, 1, 2), labels_of_file[start : start + len(images)])
                start += len(images)


def find_files(
    inputs: Sequence[str | pathlib.Path], what: str, ending: str = "", deep: bool = False
) -> list[pathlib.Path]:
    """Lists files that were named and those in folders that were, without hidden ones, which macOS leaves.

    Args:
        inputs: files, in their order, and folders.
        what: what the inputs should be, for errors.
        ending: of the files that are taken from a folder, in lower case.
        deep: whether to look one folder further down, too.

    Raises:
        DataError: there are no inputs, one does not exist, or a file is named twice.
    """
    if not inputs:
        raise DataError(f"--input is missing: give the {what}, or the folder that holds them")
    found: list[pathlib.Path] = []
    for item in (pathlib.Path(item).expanduser() for item in inputs):
        if not item.exists():
            raise DataError(f"--input {item}: no such file or folder")
        if item.is_dir():
            inside = [*item.glob("*"), *(item.glob("*/*") if deep else ())]
            inside = [path for path in inside if path.name.lower().endswith(ending) and path.name[0] != "."]
            found += sorted(inside, key=natural_order)
        else:
            found.append(item)
    resolved = [path.resolve() for path in found]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise DataError(f"--input names {found[index]} twice: its images would be there twice")
    return found


def natural_order(path: pathlib.PurePath) -> list[list[int | str]]:
    """A key that sorts the numbers in names by their values, so that part2 comes before part10."""
    return [[int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)] for name in path.parts]


def _open_file(path: pathlib.Path) -> _ImageFile:
    if path.suffix.lower() == ".npy":
        raise DataError(
            f"--input {path}: a .npy file is one array; store images and labels together with "
            "numpy.savez(file, images=..., labels=...)"
        )
    keys = array_keys(path, str(path))
    arrays = []
    for wanted in (("images", "arr_0"), ("labels", "arr_1"), ("class_names",)):
        found = [key for key in wanted if key in keys]
        if len(found) > 1:
            raise DataError(f'{path} has both "{found[0]}" and "{found[1]}": store one of them only')
        arrays.append(open_array(path, str(path), found[0]) if found else None)
    images, labels, class_names = arrays
    if images is None:
        held = ", ".join(f'"{key}"' for key in keys) or "no array"
        published = {"data", "labels"} <= set(keys)
        hint = "; batches of ImageNet-64 as published are read with --source imagenet64" if published else ""
        raise DataError(f'{path} has no array "images" or "arr_0": it holds {held}{hint}')
    _check_images(images)
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
        raise DataError(
            f"{labels.name} is {labels.dtype} of shape {labels.shape} instead of {images.shape[0]} integers, "
            "one for each image"
        )
    if class_names is not None and (class_names.dtype.kind != "U" or len(class_names.shape) != 1):
        raise DataError(
            f"{class_names.name} is {class_names.dtype} of shape {class_names.shape} instead of text (classes,), "
            "such as numpy.array(['cat', 'dog'])"
        )
    return _ImageFile(path, images, labels, class_names)


def _check_images(images: NpzArray) -> None:
    shape = images.shape
    if images.dtype != np.uint8 or len(shape) != 4 or 0 in shape or shape[-1] > MAX_CHANNELS or images.fortran_order:
        raise DataError(
            f"{images.name} is {images.dtype} of shape {shape}{' in Fortran order' * images.fortran_order} instead of "
            f"uint8 (images, height, width, channels), 0 to 255, with 1 to {MAX_CHANNELS} channels"
        )
    _, height, width, channels = shape
    # Planes one after the other can pass for very flat images of very many channels, and would train like that.
    if height < width == channels or height <= 4 < min(width, channels):
        raise DataError(
            f"{images.name} has shape {shape}, which looks like (images, channels, height, width) instead of (images, "
            "height, width, channels): numpy.moveaxis(images, 1, -1) puts the channels last"
        )


def _read_class_names(file: _ImageFile) -> list[str] | None:
    if file.class_names is None:
        return None
    with naming_damage(file.class_names.name):
        names = file.class_names.read().tolist()
        # numpy makes strings also of half characters
        "".join(names).encode()
    if "" in names or not names:
        raise DataError(f"{file.class_names.name} is {names!r:.100}, but every class needs a name")
    return names


def _read_labels(file: _ImageFile, class_names: list[str] | None) -> np.ndarray:
    """Returns the labels of one file: int64 (images,), from 0 to the number of classes less one."""
    num_images = file.images.shape[0]
    if file.labels is None:
        if class_names is not None and len(class_names) != 1:
            raise DataError(f'{file.path} has {len(class_names)} class_names, but no array "labels" or "arr_1"')
        return np.zeros(num_images, np.int64)
    last = (MOST_UNNAMED_CLASSES if class_names is None else len(class_names)) - 1
    return check_labels(file.labels.read(), file.labels.name, num_images, 0, last)
