"""Images by their number, so that ranks share them and stopped work resumes."""

import abc
import contextlib
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from ..data.dataset import PreparedImages
from ..data.errors import DataError
from ..data.image_source import ImageDatasetSource, decode_image
from ..data.npz_source import NpzSource, natural_order
from ..data.preparation import RECORD_NAME
from ..pipelines.generation import class_id, open_model, pipeline_digest, plain_config, sample_images
from ..pipelines.loading import download_snapshot
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..utils.file_digest import file_digest
from .options import SAMPLER_NAMES, ModelOptions


# as imagenet64-prepare has it by default, and the published ImageNet of 64x64 pixels
RESIZE_FILTER = "box"
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# keeps the random classes apart from the noise, which comes from the same seed
_CLASS_STREAM = 0xC1A55


class ImageBatch(NamedTuple):
    """Images, uint8 (images, channels, height, width), and labels, int64 (images,), None where there are none."""

    pixels: torch.Tensor
    labels: torch.Tensor | None


class ImageBatches(abc.ABC):
    """Images of one size, (channels, height, width), whose fingerprint is of them and their order."""

    image_size: tuple[int, int, int]
    fingerprint: str
    _num_images: int

    def __len__(self) -> int:
        return self._num_images

    @abc.abstractmethod
    def read(self, start: int, stop: int) -> ImageBatch:
        """Those from start to stop; DataError for one that is broken, or of another size than the first."""


def open_images(
    source: str | Path, split: str | None = None, resolution: int | None = None, color_mode: str = "rgb"
) -> ImageBatches:
    """Opens a prepared folder, .npz files, a dataset (also of the Hub), or images at any depth of a folder.

    DataError where there are none, or where an option does not belong to them.
    """
    path = Path(source).expanduser()
    inside = [file for file in path.rglob("*") if file.is_file()]
    # without hidden ones, part2 before part10
    files = [file for file in inside if not any(part[0] == "." for part in file.relative_to(path).parts)]
    files = sorted(files, key=lambda file: natural_order(file.relative_to(path))) or [path]
    suffixes = {file.suffix.lower() for file in files if file.is_file()}
    # what datasets writes into a folder of save_to_disk
    is_dataset = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if not path.exists():
        is_dataset = path.suffix != ".npz" and _HUB_ID.fullmatch(str(source)) is not None
    elif path.is_dir() and suffixes & {".parquet", ".arrow"}:
        is_dataset = is_dataset or not suffixes & {".npz", *_IMAGE_SUFFIXES}
    kinds = {
        "prepared folder": (path / RECORD_NAME).is_file(),
        "dataset": is_dataset,
        "folder of images": path.is_dir() and bool(suffixes & _IMAGE_SUFFIXES),
        "set of .npz images": ".npz" in suffixes,
    }
    kind = next((kind for kind, is_it in kinds.items() if is_it), None)
    if kind is None:
        found = ", ".join(sorted(suffix or "files without ending" for suffix in suffixes)) or "nothing"
        found = f" holds {found}" if path.exists() else ": no such file or folder"
        raise DataError(
            f"{source}{found}, but must hold images, .npz files, a dataset, or what imagenet64-prepare writes, or be"
            " the id of a Hub dataset"
        )
    if split is not None and kind != "dataset":
        raise DataError(f"split is {split}, but {source} is a {kind}, which has no such choice")
    if resolution is not None and kind not in ("dataset", "folder of images"):
        raise DataError(f"resolution is {resolution}, but {source} is a {kind}, which has no such choice")
    if kind == "prepared folder":
        return _PreparedBatches(path)
    if kind == "set of .npz images":
        return _NpzBatches(path)
    if kind == "dataset":
        taken: Any = ImageDatasetSource("dataset", [str(source)], split or "train")
    else:
        taken = [file for file in files if file.suffix.lower() in _IMAGE_SUFFIXES]
    return _DecodedBatches(str(path), taken, (resolution, RESIZE_FILTER, color_mode))


def _digest_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _PreparedBatches(ImageBatches):
    def __init__(self, folder: Path) -> None:
        self._images = PreparedImages(folder)
        self._num_images, self.fingerprint = len(self._images), self._images.fingerprint
        self.image_size = (self._images.channels, *self._images.image_size)

    def read(self, start: int, stop: int) -> ImageBatch:
        batch = self._images[range(start, stop)]
        return ImageBatch(batch["pixel_values"], batch["class_labels"])


class _NpzBatches(ImageBatches):
    """Images of .npz files, which can be read forwards only: going back begins again."""

    def __init__(self, path: Path) -> None:
        # the first reading begins
        self._path, self._npz, self._next = path, NpzSource([path]), math.inf
        # its headers say how many there are, and its zip the CRC-32 of every array
        stream, files = self._npz.open(path), self._npz.description["files"]
        self.image_size, self._num_images = stream.image_size, stream.num_images
        self._has_labels = bool({"labels", "arr_1"}.intersection(files[0]["crc32"]))
        checksums = [file["crc32"].get("images") or file["crc32"]["arr_0"] for file in files]
        self.fingerprint = _digest_of("npz", self.image_size, len(self), checksums)

    def read(self, start: int, stop: int) -> ImageBatch:
        if start < self._next:
            blocks = self._npz.open(self._path).blocks
            self._rows = (row for block in blocks for row in zip(block.pixels, block.labels, strict=True))
            self._next = 0
        # after an error the next reading begins again
        position, self._next = int(self._next), math.inf
        pixels, labels = zip(*itertools.islice(self._rows, start - position, stop - position), strict=True)
        self._next = stop
        return ImageBatch(torch.from_numpy(np.stack(pixels)), torch.tensor(labels) if self._has_labels else None)


class _DecodedBatches(ImageBatches):
    """Images of files or of a dataset, which are decoded one by one; the first says what size all have."""

    def __init__(self, source: str, found: ImageDatasetSource | list[Path], conversion: tuple[int | None, str, str]):
        self._source, self._conversion, self._found = source, conversion, found
        self._images: Any
        self._labels: np.ndarray | None = None
        if isinstance(found, list):
            self._images = [{"": {"path": str(file), "bytes": None}} for file in found]
        else:
            # what datasets writes for local files lies here as long as the images are used
            self._work_folder = tempfile.TemporaryDirectory(prefix="imagenet64_images_")
            dataset, self._images = found.load(Path(self._work_folder.name))
            self._source = found.summary
            # without a column of them, or more than one, or no whole one
            with contextlib.suppress(DataError):
                self._labels, *_ = found.read_labels(dataset)
        if not len(self._images):
            raise DataError(f"{self._source} has no images")
        # Pillow's decoders run without the interpreter's lock
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self.image_size, self._num_images = cast(tuple[int, int, int], self._decode(0).shape), len(self._images)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Of what is in the files, for which all are read; of datasets their own, which copies may not share."""
        if not isinstance(self._found, list):
            return _digest_of("dataset", self._conversion, self._images._fingerprint)

        def digest(file: Path) -> str:
            try:
                return file_digest(file)
            except OSError as error:
                raise DataError(f"{file} cannot be read ({error.strerror})") from error

        return _digest_of("imagefolder", self._conversion, list(self._pool.map(digest, self._found)))

    def read(self, start: int, stop: int) -> ImageBatch:
        pixels = np.stack(list(self._pool.map(self._decode, range(start, stop))))
        labels = None if self._labels is None else torch.tensor(self._labels[start:stop])
        return ImageBatch(torch.from_numpy(pixels), labels)

    def _decode(self, number: int) -> np.ndarray:
        (stored,) = self._images[number].values()
        name = (stored and stored["path"]) or f"{self._source} image {number}"
        pixels = decode_image(stored, name, *self._conversion)
        if number and pixels.shape != self.image_size:
            found, right = (f"{width}x{height}" for _, height, width in (pixels.shape, self.image_size))
            raise DataError(
                f"{name} is {found} pixels (width x height), but the first image of {self._source} is {right}: give a"
                " resolution to make all of one size"
            )
        return pixels


class GeneratedImages(ImageBatches):
    """Images that a model generates: image i from the noise of seed + i, of a class that is a function of i.

    The classes are uniform (i modulo their number), frequencies (as in ``class_counts``), or ids and names in turn.
    ``description`` has all that the images depend on, as JSON values.
    """

    def __init__(
        self, options: ModelOptions, device: Any, revision: str | None = None, class_counts: np.ndarray | None = None
    ):
        dtype = getattr(torch, options.dtype)
        self.pipeline = open_model(options.model, options, device, dtype, revision=revision)
        scheduler, config = self.pipeline.scheduler, self.pipeline.unet.config
        name = type(scheduler).__name__
        if options.eta and "eta" not in inspect.signature(scheduler.step).parameters:
            # the number would be known by a setting that it does not depend on
            raise ValueError(f"eta is {options.eta:g}, but {name} takes none: leave it 0")
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.image_size, self._num_images = (config.in_channels, height, width), options.num_images
        self._options, self._labels = options, _choose_classes(self.pipeline, options, class_counts)
        asked = {key: getattr(options, key) for key in ("model", "class_labels", "seed", "num_images", "dtype")}
        settings = {key: getattr(options, key) for key in SAMPLER_NAMES} | options.arguments(self.pipeline)
        self.description: dict[str, Any] = {
            **asked,
            "revision": revision,
            "weights_sha256": pipeline_digest(self.pipeline),
            "scheduler_config": plain_config(scheduler.config),
            **plain_config(settings),
            "scheduler": name,
            "class_counts": None if class_counts is None else class_counts.tolist(),
            "image_size": list(self.image_size),
            "num_classes": self.pipeline.num_classes,
            "id2label": plain_config(self.pipeline.config).get("id2label"),
        }

    def read(self, start: int, stop: int) -> ImageBatch:
        """The pixels as generate_images.py writes them, and labels, -1 for the null class."""
        labels = self._labels[start:stop]
        seed = self._options.seed + start
        generated = sample_images(self.pipeline, self._options, labels, seed, output_type="pt")
        broken = (~generated.flatten(1).isfinite()).any(dim=1).nonzero()
        if len(broken):
            told = f"{self._options.model} generates image {start + int(broken[0])} with values that are not finite"
            raise ValueError(f"{told}, under {self.description['scheduler']}")
        pixels = (generated.float() * 255).round().to(torch.uint8).cpu()
        has_classes = self.pipeline.num_classes is not None
        given = torch.tensor([-1 if label is None else label for label in labels]) if has_classes else None
        return ImageBatch(pixels, given)


def _choose_classes(
    pipeline: ClassConditionalPipeline, options: ModelOptions, counts: np.ndarray | None
) -> list[int | None]:
    """The class of each image; None is the null class."""
    num_classes, asked, num_images = pipeline.num_classes, options.class_labels, options.num_images
    chosen: list[int | None] = [None]
    if num_classes is None:
        if asked not in (["uniform"], ["null"]):
            raise ValueError(f"class_labels is {' '.join(asked)}, but the model has no classes: leave it out")
    elif asked == ["uniform"]:
        chosen = list(range(num_classes))
    elif asked == ["frequencies"]:
        if counts is None:
            raise ValueError("class_labels is frequencies, which needs train_data_dir, a prepared dataset")
        if len(counts) != num_classes:
            raise ValueError(f"train_data_dir has {len(counts)} classes, but the model has {num_classes}")
        # all at once, and so the same whatever part of them is generated
        rng = np.random.default_rng([_CLASS_STREAM, options.seed])
        chosen = rng.choice(num_classes, num_images, p=counts / counts.sum()).tolist()
    else:
        chosen = [class_id(pipeline, label, num_classes) for label in asked]
    return [chosen[index % len(chosen)] for index in range(num_images)]


def find_revision(model: str) -> str | None:
    """The commit that a Hub id stands for now, None for a folder."""
    # the folder of a snapshot has the name of its commit
    return None if Path(model).is_dir() else download_snapshot(model, [ClassConditionalPipeline.config_name]).name


def count_classes(folder: str | Path) -> np.ndarray:
    """Images of each class in a prepared dataset, int64 (num_classes,)."""
    images = PreparedImages(folder)
    return np.bincount(images.labels(), minlength=images.num_classes)
