"""Images of 1 to 64 channels from .npz files.

A file holds "images", uint8 (images, height, width, channels), and "labels", integers (images,) from 0; or the
same as "arr_0" and "arr_1", which is how numpy.savez calls arrays without a name and how guided-diffusion stores
its samples. Without labels all images are of one class. "class_names", text (classes,), names the classes; without
it their names are the numbers, "0" to the largest label.
"""

import dataclasses
import pathlib
import re
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from .errors import DataError
from .npz_arrays import NpzArray, array_keys, open_array
from .sources import ImageBlock, ImageStream


MAX_CHANNELS = 64

_IMAGE_KEYS = ("images", "arr_0")
_LABEL_KEYS = ("labels", "arr_1")
_NAMES_KEY = "class_names"
# Without names there is a class for every number up to the largest label, and a stray 2**32 - 1 must not make
# billions.
_MOST_UNNAMED_CLASSES = 1 << 16
_ONLY_CLASS = "image"


@dataclasses.dataclass(frozen=True)
class _ImageFile:
    """One .npz file, whose arrays have the right types and shapes."""

    path: pathlib.Path
    images: NpzArray
    labels: NpzArray | None
    class_names: NpzArray | None

    def arrays(self) -> list[NpzArray]:
        return [array for array in (self.images, self.labels, self.class_names) if array is not None]


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
        self._files = [_open_file(path) for path in _find_files([pathlib.Path(item) for item in inputs])]
        first = self._files[0]
        for file in self._files[1:]:
            _check_same_kind(file, first)
        # The checksums are in the zip anyway, and tell a file from another of the same name and size.
        self.description: dict[str, Any] = {
            "kind": "npz",
            "split": split,
            "files": [
                {
                    "file": file.path.name,
                    "bytes": file.path.stat().st_size,
                    "crc32": {array.key: array.crc32 for array in file.arrays()},
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
        class_names = _common_class_names(self._files)
        num_classes = None if class_names is None else len(class_names)
        labels = [_read_labels(file, num_classes) for file in self._files]
        if class_names is None:
            if self._files[0].labels is None:
                class_names = [_ONLY_CLASS]
            else:
                class_names = [str(label) for label in range(max(int(values.max()) for values in labels) + 1)]
        _, height, width, channels = self._files[0].images.shape
        return ImageStream(
            class_names=class_names,
            image_size=(channels, height, width),
            num_images=sum(map(len, labels)),
            blocks=_blocks(self._files, labels),
        )


def _blocks(files: Sequence[_ImageFile], labels: Sequence[np.ndarray]) -> Generator[ImageBlock, None, None]:
    for file, labels_of_file in zip(files, labels, strict=True):
        start = 0
        for images in file.images.read_rows():
            yield ImageBlock(images.transpose(0, 3, 1, 2), labels_of_file[start : start + len(images)])
            start += len(images)


def _find_files(inputs: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    if not inputs:
        raise DataError("--input is missing: give the .npz files, or the folder that holds them")
    found: list[pathlib.Path] = []
    for item in inputs:
        item = item.expanduser()
        if item.is_dir():
            # macOS leaves hidden files beside those it copies
            inside = [path for path in item.glob("*") if path.suffix.lower() == ".npz" and path.name[0] != "."]
            if not inside:
                raise DataError(f"--input {item}: the folder holds no .npz file")
            found += sorted(inside, key=natural_order)
        elif not item.exists():
            raise DataError(f"--input {item}: no such file or folder")
        elif item.suffix.lower() == ".npy":
            raise DataError(
                f"--input {item}: a .npy file is one array; store images and labels together with "
                "numpy.savez(file, images=..., labels=...)"
            )
        else:
            found.append(item)
    seen = set()
    for path in found:
        if path.resolve() in seen:
            raise DataError(f"--input names {path} twice: its images would be there twice")
        seen.add(path.resolve())
    return found


def natural_order(path: pathlib.PurePath) -> list[list[int | str]]:
    """A key that sorts the numbers in names by their values, so that part2 comes before part10."""
    return [[int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)] for name in path.parts]


def _open_file(path: pathlib.Path) -> _ImageFile:
    name = str(path)
    keys = array_keys(path, name)
    image_key, label_key = (_only_key(name, keys, wanted) for wanted in (_IMAGE_KEYS, _LABEL_KEYS))
    if image_key is None:
        held = ", ".join(f'"{key}"' for key in keys) or "no array"
        published = {"data", "labels"} <= set(keys)
        hint = "; batches of ImageNet-64 as published are read with --source imagenet64" if published else ""
        raise DataError(f'{name} has no array "images" or "arr_0": it holds {held}{hint}')
    images = open_array(path, name, image_key)
    _check_images(images)
    labels = None if label_key is None else open_array(path, name, label_key)
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
        raise DataError(
            f"{labels.name} is {labels.dtype} of shape {labels.shape} instead of {images.shape[0]} integers, "
            f'one for each image of "{image_key}"'
        )
    class_names = open_array(path, name, _NAMES_KEY) if _NAMES_KEY in keys else None
    if class_names is not None and (class_names.dtype.kind != "U" or len(class_names.shape) != 1):
        raise DataError(
            f"{class_names.name} is {class_names.dtype} of shape {class_names.shape} instead of text (classes,), "
            "such as numpy.array(['cat', 'dog'])"
        )
    return _ImageFile(path, images, labels, class_names)


def _only_key(name: str, keys: Sequence[str], wanted: Sequence[str]) -> str | None:
    found = [key for key in wanted if key in keys]
    if len(found) > 1:
        raise DataError(f'{name} has both "{found[0]}" and "{found[1]}": store one of them only')
    return found[0] if found else None


def _check_images(images: NpzArray) -> None:
    right = "(images, height, width, channels)"
    if images.dtype != np.uint8:
        hint = "; floating-point images are not scaled here, as nobody says what their range is"
        raise DataError(
            f"{images.name} is {images.dtype} instead of uint8 (0 to 255){hint if images.dtype.kind == 'f' else ''}"
        )
    if len(images.shape) != 4:
        hint = "; images of one channel have a last axis of length 1" if len(images.shape) == 3 else ""
        raise DataError(f"{images.name} has shape {images.shape} instead of {right}{hint}")
    if 0 in images.shape:
        raise DataError(f"{images.name} has shape {images.shape}: there are no pixels in it")
    _, height, width, channels = images.shape
    # Planes one after the other can pass for very flat images of very many channels, and would train like that.
    if height < width == channels or height <= 4 < min(width, channels):
        raise DataError(
            f"{images.name} has shape {images.shape}, which looks like (images, channels, height, width) instead of "
            f"{right}: numpy.moveaxis(images, 1, -1) puts the channels last"
        )
    if channels > MAX_CHANNELS:
        raise DataError(
            f"{images.name} has {channels} channels (the last axis of {images.shape}), but at most "
            f"{MAX_CHANNELS} are read"
        )
    if images.fortran_order:
        raise DataError(
            f"{images.name} is stored column after column (Fortran order) instead of image after image: "
            "store numpy.ascontiguousarray(images)"
        )


def _check_same_kind(file: _ImageFile, first: _ImageFile) -> None:
    sizes = ["{}x{} with {} channels".format(*item.images.shape[1:]) for item in (file, first)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{file.path} has images of height x width {sizes[0]}, but {first.path} has {sizes[1]}: all files must "
            "be alike"
        )
    if (file.labels is None) != (first.labels is None):
        without, with_labels = (file, first) if file.labels is None else (first, file)
        raise DataError(
            f'{without.path} has no array "labels" or "arr_1", but {with_labels.path} has one: all files must be alike'
        )


def _common_class_names(files: Sequence[_ImageFile]) -> list[str] | None:
    first = _read_class_names(files[0])
    for file in files[1:]:
        names = _read_class_names(file)
        if names != first:
            named = ["no class_names" if value is None else f"the class_names {value}" for value in (names, first)]
            # a thousand names would bury the sentence
            short = [f"{text[:100]}..." if len(text) > 100 else text for text in named]
            raise DataError(
                f"{file.path} has {short[0]}, but {files[0].path} has {short[1]}: all files must name the same "
                "classes in the same order"
            )
    return first


def _read_class_names(file: _ImageFile) -> list[str] | None:
    if file.class_names is None:
        return None
    stored = file.class_names.read()
    stored = stored.astype(stored.dtype.newbyteorder("<"))
    try:
        # decoded by hand: numpy makes strings of any four bytes, also of those that are no character
        names = [stored[index : index + 1].tobytes().decode("utf-32-le").rstrip("\0") for index in range(len(stored))]
    except ValueError as error:
        raise DataError(f"{file.class_names.name} holds what is no text ({error})") from error
    if "" in names or not names:
        state = f"nothing as the name of class {names.index('')}" if names else "no name"
        raise DataError(f"{file.class_names.name} holds {state}: every class needs a name")
    return names


def _read_labels(file: _ImageFile, num_classes: int | None) -> np.ndarray:
    """Returns the labels of one file: int64 (images,), from 0 to num_classes - 1."""
    if file.labels is None:
        if num_classes not in (None, 1):
            raise DataError(f'{file.path} has {num_classes} class_names, but no array "labels" or "arr_1"')
        return np.zeros(file.images.shape[0], np.int64)
    labels = file.labels.read()
    most = _MOST_UNNAMED_CLASSES if num_classes is None else num_classes
    wrong = np.flatnonzero((labels < 0) | (labels >= most))
    if len(wrong):
        reason = " without class_names" if num_classes is None else f", as there are {num_classes} class_names"
        raise DataError(
            f"{file.labels.name} has the label {labels[wrong[0]]} for image {wrong[0]}; labels go from 0 to "
            f"{most - 1}{reason}"
        )
    return labels.astype(np.int64)
