"""Reference images, read by their number, so that ranks share them and stopped work resumes."""

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
from ..data.image_source import ImageDatasetSource, convert_image, decode_image
from ..data.npz_source import NpzSource, natural_order
from ..data.preparation import RECORD_NAME
from ..data.sources import ImageBlock
from .weights import file_digest


# as imagenet64-prepare has it by default, and the published ImageNet of 64x64 pixels
RESIZE_FILTER = "box"
# what datasets writes into a folder of save_to_disk, and what its load_dataset reads in a local folder
_SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")
_TABLE_SUFFIXES = (".parquet", ".arrow")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ImageBatch(NamedTuple):
    """Images, uint8 (images, channels, height, width), and labels, int64 (images,), None where there are none."""

    pixels: torch.Tensor
    labels: torch.Tensor | None


class ImageBatches:
    """Images of one size that are read by their number, a stretch at a time.

    Attributes:
        source: What errors call them.
        image_size: (channels, height, width) of every image.
        fingerprint: Hexadecimal digits; sources of one kind that have the same are the same images in the same order.
    """

    source: str
    image_size: tuple[int, int, int]
    fingerprint: str
    _num_images: int

    def __len__(self) -> int:
        return self._num_images

    def read(self, start: int, stop: int) -> ImageBatch:
        """Reads the images from start to stop; no more are in memory at a time.

        Raises:
            IndexError: There are not so many images.
            DataError: An image is broken, or of another size than the first.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"{self.source} has {len(self)} images: there is no stretch from {start} to {stop}")
        return self._read(start, stop)

    def _read(self, start: int, stop: int) -> ImageBatch:
        raise NotImplementedError


def open_images(
    source: str | Path, split: str | None = None, resolution: int | None = None, color_mode: str = "rgb"
) -> ImageBatches:
    """Opens images for an evaluation.

    Args:
        source: A folder that imagenet64-prepare wrote; one that datasets.save_to_disk wrote, or one of .parquet or
            .arrow files; an .npz file of images as `data.npz_source` has it, or a folder with nothing but such files;
            a folder with images at any depth, in the natural order of their paths; or, where there is no such file or
            folder, the id of a dataset of the Hub.
        split: For datasets, the split to read, by default "train".
        resolution: Height and width to make of image files and of images of datasets, cut to the largest square in
            the middle. None takes them as they are, which must be all of one size.
        color_mode: "rgb" or "grayscale", what to make of image files and of images of datasets.

    Raises:
        DataError: There is nothing of that name, nothing in it that can be read as images, or an option does not
            belong to what is there.
    """
    path = Path(source).expanduser()
    kind = _find_kind(path, str(source))
    for option, value, takes_it in (
        ("split", split, kind == "dataset"),
        ("resolution", resolution, kind in ("dataset", "folder of images")),
    ):
        if value is not None and not takes_it:
            raise DataError(f"{option} is {value}, but {source} is a {kind}, which has no such choice")
    conversion = _Conversion(resolution, RESIZE_FILTER, color_mode)
    if kind == "prepared folder":
        return _PreparedBatches(path)
    if kind == "set of .npz images":
        return _NpzBatches(path)
    if kind == "folder of images":
        return _FileBatches(path, conversion)
    return _DatasetBatches(ImageDatasetSource("dataset", [str(source)], split or "train"), conversion)


def _find_kind(path: Path, source: str) -> str:
    if path.is_file():
        if path.suffix.lower() == ".npz":
            return "set of .npz images"
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
        return "folder of images"
    suffixes = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
    if ".npz" in suffixes:
        return "set of .npz images"
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


class _Conversion(NamedTuple):
    """What is made of an image that may be of any kind."""

    resolution: int | None
    resize_filter: str
    color_mode: str

    def __call__(self, image: PIL.Image.Image) -> np.ndarray:
        return convert_image(image, self.resolution, self.resize_filter, self.color_mode)


class _PreparedBatches(ImageBatches):
    def __init__(self, folder: Path) -> None:
        self._images = PreparedImages(folder)
        self.source, self._num_images, self.fingerprint = str(folder), len(self._images), self._images.fingerprint
        self.image_size = (self._images.channels, *self._images.image_size)

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
        # the CRC-32 of every array is in its zip
        checksums = [file["crc32"] for file in self._npz.description["files"]]
        self._has_labels = bool({"labels", "arr_1"}.intersection(checksums[0]))
        images = [each.get("images") or each["arr_0"] for each in checksums]
        self.fingerprint = _digest_of("npz", self.image_size, len(self), images)
        self._blocks: Iterator[ImageBlock] = iter(())
        self._block: ImageBlock | None = None
        self._block_start = self._block_stop = 0

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

    _labels: np.ndarray | None = None

    def __init__(self, source: str, num_images: int, conversion: _Conversion) -> None:
        self.source, self._num_images, self._conversion = source, num_images, conversion
        # Pillow's decoders run without the interpreter's lock
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        self.image_size = self._decode(0).shape

    def _stored(self, number: int) -> tuple[dict[str, Any] | None, str]:
        """An image that is not decoded, as `decode_image` takes it, and what errors call it."""
        raise NotImplementedError

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

    def _read(self, start: int, stop: int) -> ImageBatch:
        pixels = np.empty((stop - start, *self.image_size), np.uint8)
        for row, image in enumerate(self._pool.map(self._decode, range(start, stop))):
            pixels[row] = image
        labels = None if self._labels is None else torch.from_numpy(self._labels[start:stop].copy())
        return ImageBatch(torch.from_numpy(pixels), labels)


class _FileBatches(_DecodedBatches):
    def __init__(self, folder: Path, conversion: _Conversion) -> None:
        self._files = sorted(_image_files(folder), key=lambda file: natural_order(file.relative_to(folder)))
        super().__init__(str(folder), len(self._files), conversion)

    def _stored(self, number: int) -> tuple[dict[str, Any], str]:
        file = str(self._files[number])
        return {"path": file, "bytes": None}, file

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Of what is in the files, in their order: all are read for it."""

        def digest(file: Path) -> str:
            try:
                return file_digest(file)
            except OSError as error:
                raise DataError(f"{file} cannot be read ({error.strerror})") from error

        return _digest_of("imagefolder", self._conversion, list(self._pool.map(digest, self._files)))


class _DatasetBatches(_DecodedBatches):
    def __init__(self, source: ImageDatasetSource, conversion: _Conversion) -> None:
        # what datasets writes for local files lies here as long as the images are used
        self._work_folder = tempfile.TemporaryDirectory(prefix="imagenet64_images_")
        loaded = source.load(Path(self._work_folder.name), needs_labels=False)
        self._images, self._labels = loaded.images, loaded.labels
        if not len(self._images):
            raise DataError(f"{source.summary} has no images")
        (self._column,) = self._images.column_names
        # of the dataset's own, which two copies of a local dataset may not share
        self.fingerprint = _digest_of("dataset", conversion, self._images._fingerprint)
        super().__init__(source.summary, len(self._images), conversion)

    def _stored(self, number: int) -> tuple[dict[str, Any] | None, str]:
        stored = self._images[number][self._column]
        return stored, (stored and stored["path"]) or f"{self.source} image {number}"
