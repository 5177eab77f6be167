"""Reference images, read by their number, so that processes share them and stopped work goes on."""

import abc
import concurrent.futures
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import PIL.Image
import torch

from ..data.dataset import PreparedImages
from ..data.errors import DataError
from ..data.image_source import (
    RESIZE_FILTERS,
    ImageDatasetSource,
    convert_colors,
    convert_image,
    decode_image,
    to_planes,
)
from ..data.npz_source import NpzSource, natural_order
from ..data.preparation import RECORD_NAME
from ..data.sources import ImageBlock
from ..utils.nearest_names import perhaps
from .weights import file_digest


# What datasets writes into a folder of save_to_disk.
_SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")
# What datasets.load_dataset reads in a local folder.
_TABLE_SUFFIXES = (".parquet", ".arrow")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ImageBatch(NamedTuple):
    """Some images in a row.

    Attributes:
        pixels: uint8 (images, channels, height, width).
        labels: int64 (images,), or None where the source has none.
    """

    pixels: torch.Tensor
    labels: torch.Tensor | None


class ImageBatches(abc.ABC):
    """Images of one size that are read by their number, a stretch at a time.

    Attributes:
        source: what errors call them.
        image_size: (channels, height, width) of every image.
        class_names: the name of each class, where there are labels and names.
    """

    source: str
    image_size: tuple[int, int, int]
    class_names: list[str] | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digits; sources of one kind that have the same are the same images in the same order."""

    def read(self, start: int, stop: int) -> ImageBatch:
        """Reads a stretch of images; no more of them are in memory at a time than it has.

        Args:
            start: the number of the first, from 0.
            stop: one more than the number of the last, at most the number of images.

        Raises:
            IndexError: there are not so many images.
            DataError: an image is broken, or of another size than the first.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"{self.source} has {len(self)} images: there is no stretch from {start} to {stop}")
        return self._read(start, stop)

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[ImageBatch]:
        """Reads the images from start to stop, by default all, in batches."""
        stop = len(self) if stop is None else stop
        for first in range(start, stop, batch_size):
            yield self.read(first, min(first + batch_size, stop))

    @abc.abstractmethod
    def _read(self, start: int, stop: int) -> ImageBatch: ...


def open_images(
    source: str | Path,
    *,
    split: str | None = None,
    configuration: str | None = None,
    resolution: int | None = None,
    resize_filter: str = "box",
    color_mode: str = "rgb",
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageBatches:
    """Opens images for measuring.

    Args:
        source: what is told apart by what is there:

            * a folder that imagenet64-prepare wrote;
            * a folder that datasets.save_to_disk wrote, or one of .parquet or .arrow files;
            * an .npz file of images in the form of `data.npz_source`, uint8 (images, height, width,
              channels), as the evaluator of guided-diffusion takes it, or a folder with nothing but such
              files;
            * a folder with images in it or in folders inside it, at any depth, in the natural order of their
              paths. Their folders are not taken for classes;
            * where there is no such file or folder, the id of a dataset of the Hub.
        split: for datasets, the split to read, by default "train".
        configuration: for datasets of the Hub with several, which.
        resolution: height and width to make of image files and of images of datasets, cut to the largest
            square in the middle. None takes them as they are, which must be all of one size.
        resize_filter: one of `data.image_source.RESIZE_FILTERS`, for that.
        color_mode: "rgb" or "grayscale", what to make of image files and of images of datasets. Prepared
            images and those of .npz files are what they are.
        image_column: for datasets, the column of images; None to find it by its type.
        label_column: likewise of labels; a dataset without labels is opened without.

    Raises:
        DataError: there is nothing of that name, nothing in it that can be read as images, or an option does
            not belong to what is there.
    """
    path = Path(source).expanduser()
    kind = _find_kind(path, str(source))
    wrong = {
        "split": split if kind != "dataset" else None,
        "configuration": configuration if kind != "dataset" else None,
        "image_column": image_column if kind != "dataset" else None,
        "label_column": label_column if kind != "dataset" else None,
        "resolution": resolution if kind in ("prepared folder", "npz") else None,
    }
    for option, value in wrong.items():
        if value is not None:
            what = {"npz": ".npz images", "imagefolder": "a folder of images", "prepared folder": "a prepared folder"}
            raise DataError(f"{option} is {value}, but {source} is {what[kind]}, which has no such choice")
    if resolution is not None and resolution < 1:
        raise DataError(f"resolution is {resolution}, but must be at least 1")
    if color_mode not in ("rgb", "grayscale"):
        raise DataError(f"color_mode is {color_mode}, but must be rgb or grayscale")
    if resize_filter not in RESIZE_FILTERS:
        near = perhaps(resize_filter, RESIZE_FILTERS)
        raise DataError(f"resize_filter is {resize_filter}, but must be one of {', '.join(RESIZE_FILTERS)}{near}")
    conversion = _Conversion(resolution, resize_filter, color_mode)
    match kind:
        case "prepared folder":
            return _PreparedBatches(path)
        case "npz":
            return _NpzBatches(path)
        case "imagefolder":
            return _FileBatches(path, conversion)
    inputs = [str(source)] if configuration is None else [str(source), configuration]
    dataset = ImageDatasetSource(
        "dataset", inputs, split or "train", image_column=image_column, label_column=label_column
    )
    return _DatasetBatches(dataset, conversion)


def _find_kind(path: Path, source: str) -> str:
    if path.is_file():
        if path.suffix.lower() == ".npz":
            return "npz"
        raise DataError(f"{source} is a file, but images are read from .npz files, folders and datasets of the Hub")
    if not path.exists():
        if _HUB_ID.fullmatch(source) and path.suffix != ".npz":
            return "dataset"
        raise DataError(f"{source}: no such file or folder, and it cannot be the id of a Hub dataset either")
    if (path / RECORD_NAME).is_file():
        return "prepared folder"
    if any((path / name).is_file() for name in _SAVED_DATASET_FILES):
        return "dataset"
    if next(_image_files(path), None) is not None:
        return "imagefolder"
    suffixes = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
    if ".npz" in suffixes:
        return "npz"
    if suffixes.intersection(_TABLE_SUFFIXES):
        return "dataset"
    found = ", ".join(sorted(suffix or "files without ending" for suffix in suffixes)) or "nothing"
    raise DataError(
        f"{source} holds {found}, but must hold images, .npz files, a dataset, or what imagenet64-prepare writes"
    )


def _image_files(folder: Path) -> Iterator[Path]:
    """Images at any depth, without hidden ones."""
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and file.suffix.lower() in _IMAGE_SUFFIXES and file.is_file():
            yield file


def _digest_of(*parts: Any) -> str:
    """The SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest_of_file(file: Path) -> str:
    try:
        return file_digest(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from error


class _Conversion(NamedTuple):
    """What is made of an image that may be of any kind."""

    resolution: int | None
    resize_filter: str
    color_mode: str

    def __call__(self, image: PIL.Image.Image) -> np.ndarray:
        if self.resolution is None:
            return to_planes(convert_colors(image, self.color_mode))
        return convert_image(image, self.resolution, self.resize_filter, self.color_mode)


class _PreparedBatches(ImageBatches):
    def __init__(self, folder: Path) -> None:
        self.source = str(folder)
        self._images = PreparedImages(folder)
        self.image_size = (self._images.channels, *self._images.image_size)
        self.class_names = self._images.class_names

    def __len__(self) -> int:
        return len(self._images)

    @property
    def fingerprint(self) -> str:
        return self._images.fingerprint

    def _read(self, start: int, stop: int) -> ImageBatch:
        batch = self._images[range(start, stop)]
        return ImageBatch(batch["pixel_values"], batch["class_labels"])


class _NpzBatches(ImageBatches):
    """Images of .npz files, whose members can be read forwards only: going back begins again."""

    def __init__(self, path: Path) -> None:
        self.source = str(path)
        self._npz = NpzSource([path])
        stream = self._npz.open(path)
        self.image_size = stream.image_size
        self._num_images = cast(int, stream.num_images)  # its headers say it
        files = self._npz.description["files"]
        # the CRC-32 of every array is in its zip
        self._has_labels = bool({"labels", "arr_1"}.intersection(files[0]["crc32"]))
        self.class_names = stream.class_names if self._has_labels else None
        self._checksums = [file["crc32"].get("images") or file["crc32"]["arr_0"] for file in files]
        self._blocks: Iterator[Any] = iter(())
        self._block: ImageBlock | None = None
        self._block_start = self._block_stop = 0

    def __len__(self) -> int:
        return self._num_images

    @property
    def fingerprint(self) -> str:
        return _digest_of("npz", self.image_size, len(self), self._checksums)

    def _read(self, start: int, stop: int) -> ImageBatch:
        pixels, labels = [np.empty((0, *self.image_size), np.uint8)], [np.empty(0, np.int64)]
        if start < self._block_start or self._block is None:
            self._blocks = self._npz.open(Path(self.source)).blocks
            self._block_start = self._block_stop = 0
        position, block = start, cast(ImageBlock, self._block)
        while position < stop:
            if position >= self._block_stop:
                # left empty by an error, so that the next reading begins again
                self._block = None
                self._block = block = next(self._blocks)
                self._block_start, self._block_stop = self._block_stop, self._block_stop + len(block.pixels)
                continue
            rows = slice(position - self._block_start, min(stop, self._block_stop) - self._block_start)
            pixels.append(block.pixels[rows])
            labels.append(block.labels[rows])
            position += len(labels[-1])
        all_labels = torch.from_numpy(np.concatenate(labels)) if self._has_labels else None
        return ImageBatch(torch.from_numpy(np.concatenate(pixels)), all_labels)


class _DecodedBatches(ImageBatches):
    """Images that are decoded one by one, several at a time; the first says what size all have."""

    def __init__(self, source: str, num_images: int, conversion: _Conversion) -> None:
        self.source = source
        self._num_images = num_images
        self._conversion = conversion
        # Pillow's decoders run without the interpreter's lock
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        self.image_size = self._decode(0).shape

    def __len__(self) -> int:
        return self._num_images

    def _decode(self, number: int) -> np.ndarray:
        stored, name = self._stored(number)
        pixels = decode_image(stored, name, self._conversion.__call__)
        if number and pixels.shape != self.image_size:
            found, right = (f"{width}x{height}" for _, height, width in (pixels.shape, self.image_size))
            raise DataError(
                f"{name} is {found} pixels (width x height), but the first image of {self.source} is {right}: give a"
                " resolution to make all of one size"
            )
        return pixels

    @abc.abstractmethod
    def _stored(self, number: int) -> tuple[dict[str, Any] | None, str]:
        """An image that is not decoded, as `decode_image` takes it, and what errors call it."""

    def _decode_all(self, start: int, stop: int) -> torch.Tensor:
        pixels = np.empty((stop - start, *self.image_size), np.uint8)
        for row, image in enumerate(self._pool.map(self._decode, range(start, stop))):
            pixels[row] = image
        return torch.from_numpy(pixels)


class _FileBatches(_DecodedBatches):
    def __init__(self, folder: Path, conversion: _Conversion) -> None:
        self._files = sorted(_image_files(folder), key=lambda file: natural_order(file.relative_to(folder)))
        self._fingerprint: str | None = None
        super().__init__(str(folder), len(self._files), conversion)

    def _stored(self, number: int) -> tuple[dict[str, Any], str]:
        file = str(self._files[number])
        return {"path": file, "bytes": None}, file

    @property
    def fingerprint(self) -> str:
        """Of what is in the files, in their order: the first time that it is asked for, all are read."""
        if self._fingerprint is None:
            contents = self._pool.map(_digest_of_file, self._files)
            self._fingerprint = _digest_of("imagefolder", self._conversion, list(contents))
        return self._fingerprint

    def _read(self, start: int, stop: int) -> ImageBatch:
        return ImageBatch(self._decode_all(start, stop), None)


class _DatasetBatches(_DecodedBatches):
    def __init__(self, source: ImageDatasetSource, conversion: _Conversion) -> None:
        # what datasets writes for local files lies here as long as the images are used
        self._work_folder = tempfile.TemporaryDirectory(prefix="imagenet64_images_")
        loaded = source.load(Path(self._work_folder.name), needs_labels=False)
        self._images, self._labels, self.class_names = loaded.images, loaded.labels, loaded.class_names
        if not len(self._images):
            raise DataError(f"{source.summary} has no images")
        (self._column,) = self._images.column_names
        super().__init__(source.summary, len(self._images), conversion)

    def _stored(self, number: int) -> tuple[dict[str, Any] | None, str]:
        stored = self._images[number][self._column]
        return stored, (stored and stored["path"]) or f"{self.source} image {number}"

    @property
    def fingerprint(self) -> str:
        """Of the conversion and the dataset's own, which two copies of a local dataset may not share."""
        return _digest_of("dataset", self._conversion, self._images._fingerprint)

    def _read(self, start: int, stop: int) -> ImageBatch:
        labels = None if self._labels is None else torch.from_numpy(self._labels[start:stop].copy())
        return ImageBatch(self._decode_all(start, stop), labels)
