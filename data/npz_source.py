"""Images of 1 to 64 channels from .npz files.

A file holds "images", uint8 (images, height, width, channels), and "labels", integers (images,) from 0; or the
same as "arr_0" and "arr_1", which is how numpy.savez calls arrays without a name and how guided-diffusion stores
its samples. Without labels all images are of one class. "class_names", text (classes,), names the classes; without
it their names are the numbers, "0" to the largest label.
"""

import collections
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .errors import DataError, naming_damage
from .sources import MOST_UNNAMED_CLASSES, ImageSource, ImageStream, check_labels, check_split, label_blocks
from .stored_arrays import NpzArray, open_arrays, read_rows


MAX_CHANNELS = 64


class _ImageFile(NamedTuple):
    """One .npz file, whose arrays have the right types and shapes; without labels, all are 0."""

    path: pathlib.Path
    images: NpzArray
    has_labels: bool
    labels: np.ndarray
    class_names: list[str] | None
    description: dict[str, Any]


class NpzSource(ImageSource):
    """Images of .npz files, in this order, or of those in folders, in the natural order of their names."""

    def __init__(self, inputs: Sequence[str | pathlib.Path] = (), split: str = "train") -> None:
        check_split(split, ".npz files have", "train")
        self._files = [_open_file(path) for path in find_files(inputs, ".npz files", ".npz")]
        first = self._files[0]
        for file in self._files[1:]:
            for what, found, right in (
                ("images of (height, width, channels)", file.images.shape[1:], first.images.shape[1:]),
                ("class_names", file.class_names, first.class_names),
                ("labels", file.has_labels, first.has_labels),
            ):
                if found != right:
                    raise DataError(f"{file.path} has {what} {found!r:.80}, but {first.path} has {right!r:.80}")
        paths = [str(file.path) for file in self._files]
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        summary = f"{len(paths)} .npz file{'s' * (len(paths) > 1)}: {', '.join(paths[:3])}{more}"
        super().__init__({"kind": "npz", "split": split, "files": [file.description for file in self._files]}, summary)
        if not first.has_labels:
            self.warnings = (f'{first.path} has no array "labels" or "arr_1": all images are of one class',)

    def open(self, work_folder: pathlib.Path) -> ImageStream:
        first = self._files[0]
        largest = max(int(file.labels.max()) for file in self._files)
        unnamed = [str(label) for label in range(largest + 1)] if first.has_labels else ["image"]
        _, height, width, channels = first.images.shape
        num_images = sum(len(file.labels) for file in self._files)
        blocks = (
            block
            for file in self._files
            for block in label_blocks((rows.transpose(0, 3, 1, 2) for rows in read_rows(file.images)), file.labels)
        )
        return ImageStream(first.class_names or unnamed, (channels, height, width), num_images, blocks)


def find_files(
    inputs: Sequence[str | pathlib.Path], what: str, ending: str = "", depth: int = 1
) -> list[pathlib.Path]:
    """Lists the files that --input names, in its order; from folders those with the ending, in natural order."""
    if not inputs:
        raise DataError(f"--input is missing: give the {what}, or the folder that holds them")
    found: list[pathlib.Path] = []
    for item in (pathlib.Path(item).expanduser() for item in inputs):
        if not item.exists():
            raise DataError(f"--input {item}: no such file or folder")
        inside = [path for level in range(depth) for path in item.glob("*/" * level + "*") if path.is_file()]
        # without hidden ones, such as macOS leaves
        inside = [path for path in inside if path.name.lower().endswith(ending) and path.name[0] != "."]
        found += sorted(inside, key=natural_order) if item.is_dir() else [item]
    if not found:
        raise DataError(f"--input {' '.join(map(str, inputs))}: the folder holds no {what}")
    ((repeated, count),) = collections.Counter(path.resolve() for path in found).most_common(1)
    if count > 1:
        raise DataError(f"--input names {repeated} twice")
    return found


def natural_order(path: pathlib.PurePath) -> list[list[int | str]]:
    """A key that sorts the numbers in names by their values, so that part2 comes before part10."""
    return [[int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)] for name in path.parts]


def _open_file(path: pathlib.Path) -> _ImageFile:
    if path.suffix.lower() == ".npy":
        raise DataError(f"--input {path}: a .npy file is one array; use numpy.savez(file, images=, labels=)")
    arrays = open_arrays(path, str(path))
    for name, other in (("images", "arr_0"), ("labels", "arr_1")):
        if name in arrays and other in arrays:
            raise DataError(f'{path} has both "{name}" and "{other}": store one of them only')
    images, labels = arrays.get("images", arrays.get("arr_0")), arrays.get("labels", arrays.get("arr_1"))
    if images is None:
        held = ", ".join(f'"{key}"' for key in arrays) or "no array"
        hint = "; batches of ImageNet-64 as published are read with --source imagenet64" if "data" in arrays else ""
        raise DataError(f'{path} has no array "images" or "arr_0": it holds {held}{hint}')
    shape = images.shape
    if images.dtype != np.uint8 or len(shape) != 4 or 0 in shape or shape[-1] > MAX_CHANNELS:
        wanted = f"uint8 (images, height, width, channels), 0 to 255, with 1 to {MAX_CHANNELS} channels"
        raise DataError(f"{images.name} is {images.dtype} of shape {shape} instead of {wanted}")
    num_images, height, width, channels = shape
    # Planes one after the other can pass for very flat images of very many channels, and would train like that.
    if height < width == channels or height <= 4 < min(width, channels):
        hint = "which looks like (images, channels, height, width): numpy.moveaxis(images, 1, -1) puts channels last"
        raise DataError(f"{images.name} has shape {shape}, {hint}")
    names = _read_class_names(arrays["class_names"]) if "class_names" in arrays else None
    if labels is None and names and len(names) > 1:
        raise DataError(f'{path} has {len(names)} class_names, but no array "labels" or "arr_1"')
    last = (len(names) if names else MOST_UNNAMED_CLASSES) - 1
    values = check_labels(labels, labels.name, num_images, 0, last) if labels else np.zeros(num_images, np.int64)
    # the checksums are in the zip anyway, and tell a file from another of the same name and size
    used = [key for key in ("images", "arr_0", "labels", "arr_1", "class_names") if key in arrays]
    checksums = {key: f"{arrays[key].entry.CRC:08x}" for key in used}
    description = {"file": path.name, "bytes": path.stat().st_size, "crc32": checksums}
    return _ImageFile(path, images, labels is not None, values, names, description)


def _read_class_names(array: NpzArray) -> list[str]:
    if array.dtype.kind != "U" or len(array.shape) != 1:
        raise DataError(f"{array.name} is {array.dtype} of shape {array.shape} instead of text (classes,)")
    with naming_damage(array.name, SystemError):
        names = [name for rows in read_rows(array) for name in rows.tolist()]
        # numpy makes strings also of half characters, and Python no characters of some numbers
        "".join(names).encode()
    if "" in names or not names or len(set(names)) < len(names):
        raise DataError(f"{array.name} is {names!r:.100}, but every class needs a name of its own")
    return names
