"""Images by their number, so that ranks share them and stopped work resumes: of files and datasets, or of a model."""

import abc
import hashlib
import inspect
import itertools
import json
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from ..data.dataset import PreparedImages
from ..data.errors import DataError
from ..data.image_source import ImageDatasetSource, convert_image, decode_image
from ..data.npz_source import NpzSource, natural_order
from ..data.preparation import RECORD_NAME
from ..pipelines.generation import class_id, open_model, plain_config, sample_images, weights_digest
from ..pipelines.generation_options import Sampler
from ..pipelines.loading import download_snapshot
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from .options import SAMPLER_NAMES
from .weights import file_digest


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
    """Images of one size that are read by their number, a stretch at a time.

    Attributes:
        image_size: (channels, height, width) of every image.
        fingerprint: Hexadecimal digits; sources of one kind that have the same are the same images in the same order.
    """

    image_size: tuple[int, int, int]
    fingerprint: str
    _num_images: int

    def __len__(self) -> int:
        return self._num_images

    def read(self, start: int, stop: int) -> ImageBatch:
        """Those from start to stop; DataError for an image that is broken, or of another size than the first."""
        return self._read(start, stop)

    @abc.abstractmethod
    def _read(self, start: int, stop: int) -> ImageBatch: ...


def open_images(
    source: str | Path, split: str | None = None, resolution: int | None = None, color_mode: str = "rgb"
) -> ImageBatches:
    """Opens images for an evaluation; DataError where there are none, or where an option does not belong to them.

    Args:
        source: A folder that imagenet64-prepare wrote; one that datasets.save_to_disk wrote, or one of .parquet or
            .arrow files; an .npz file as `data.npz_source` has it, or a folder with nothing but such files; a folder
            with images at any depth, in the natural order of their paths; or the id of a dataset of the Hub.
        split: For datasets, by default "train".
        resolution: Height and width to make of image files and of images of datasets; None takes them as they are.
        color_mode: "rgb" or "grayscale", what to make of them.
    """
    path = Path(source).expanduser()
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    # without hidden ones
    files = [file for file in files if not any(part[0] == "." for part in file.relative_to(path).parts)]
    kind = _find_kind(path, str(source), files)
    takers = {"split": (split, {"dataset"}), "resolution": (resolution, {"dataset", "folder of images"})}
    for option, (value, kinds) in takers.items():
        if value is not None and kind not in kinds:
            raise DataError(f"{option} is {value}, but {source} is a {kind}, which has no such choice")
    if kind == "prepared folder":
        return _PreparedBatches(path)
    if kind == "set of .npz images":
        return _NpzBatches(path)
    if kind == "dataset":
        found: ImageDatasetSource | list[Path] = ImageDatasetSource("dataset", [str(source)], split or "train")
    else:
        found = [file for file in files if file.suffix.lower() in _IMAGE_SUFFIXES]
        found.sort(key=lambda file: natural_order(file.relative_to(path)))
    return _DecodedBatches(str(path), found, (resolution, RESIZE_FILTER, color_mode))


def _find_kind(path: Path, source: str, files: list[Path]) -> str:
    if not path.exists():
        if _HUB_ID.fullmatch(source) and path.suffix != ".npz":
            return "dataset"
        raise DataError(f"{source}: no such file or folder, and it cannot be the id of a Hub dataset either")
    if (path / RECORD_NAME).is_file():
        return "prepared folder"
    suffixes = {file.suffix.lower() for file in files}
    if path.is_dir():
        # what datasets writes into a folder of save_to_disk
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return "dataset"
        if suffixes & _IMAGE_SUFFIXES:
            return "folder of images"
        if suffixes & {".parquet", ".arrow"} and ".npz" not in suffixes:
            return "dataset"
    if ".npz" in suffixes:
        return "set of .npz images"
    found = ", ".join(sorted(suffix or "files without ending" for suffix in suffixes)) or "nothing"
    raise DataError(
        f"{source} holds {found}, but must hold images, .npz files, a dataset, or what imagenet64-prepare writes"
    )


def _digest_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _PreparedBatches(ImageBatches):
    def __init__(self, folder: Path) -> None:
        self._images = PreparedImages(folder)
        self._num_images, self.fingerprint = len(self._images), self._images.fingerprint
        self.image_size = (self._images.channels, *self._images.image_size)

    def _read(self, start: int, stop: int) -> ImageBatch:
        batch = self._images[range(start, stop)]
        return ImageBatch(batch["pixel_values"], batch["class_labels"])


class _NpzBatches(ImageBatches):
    """Images of .npz files, which can be read forwards only: going back begins again."""

    def __init__(self, path: Path) -> None:
        self._path, self._npz = path, NpzSource([path])
        stream = self._npz.open(path)
        # its headers say how many there are
        self.image_size, self._num_images = stream.image_size, stream.num_images
        # the CRC-32 of every array is in its zip
        checksums = [file["crc32"] for file in self._npz.description["files"]]
        self._has_labels = bool({"labels", "arr_1"}.intersection(checksums[0]))
        images = [each.get("images") or each["arr_0"] for each in checksums]
        self.fingerprint = _digest_of("npz", self.image_size, len(self), images)
        # so that the first reading begins
        self._next = self._num_images + 1

    def _read(self, start: int, stop: int) -> ImageBatch:
        if start < self._next:
            blocks = self._npz.open(self._path).blocks
            self._rows = (row for block in blocks for row in zip(block.pixels, block.labels, strict=True))
            self._next = 0
        # after an error the next reading begins again
        position, self._next = self._next, self._num_images + 1
        pixels, labels = zip(*itertools.islice(self._rows, start - position, stop - position), strict=True)
        self._next = stop
        return ImageBatch(torch.from_numpy(np.stack(pixels)), torch.tensor(labels) if self._has_labels else None)


class _DecodedBatches(ImageBatches):
    """Images of files or of a dataset, which are decoded one by one; the first says what size all have."""

    def __init__(
        self, source: str, found: ImageDatasetSource | list[Path], conversion: tuple[int | None, str, str]
    ) -> None:
        self._source, self._conversion, self._files = source, conversion, list[Path]()
        self._images: Any
        self._labels: np.ndarray | None = None
        if isinstance(found, list):
            self._files, self._images = found, [{"": {"path": str(file), "bytes": None}} for file in found]
        else:
            # what datasets writes for local files lies here as long as the images are used
            self._work_folder = tempfile.TemporaryDirectory(prefix="imagenet64_images_")
            loaded = found.load(Path(self._work_folder.name), needs_labels=False)
            self._source, self._images, self._labels = found.summary, loaded.images, loaded.labels
        if not len(self._images):
            raise DataError(f"{self._source} has no images")
        # Pillow's decoders run without the interpreter's lock
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self.image_size, self._num_images = cast(tuple[int, int, int], self._decode(0).shape), len(self._images)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Of what is in the files, for which all are read; of datasets their own, which copies may not share."""

        def digest(file: Path) -> str:
            try:
                return file_digest(file)
            except OSError as error:
                raise DataError(f"{file} cannot be read ({error.strerror})") from error

        if self._files:
            return _digest_of("imagefolder", self._conversion, list(self._pool.map(digest, self._files)))
        return _digest_of("dataset", self._conversion, self._images._fingerprint)

    def _read(self, start: int, stop: int) -> ImageBatch:
        pixels = np.stack(list(self._pool.map(self._decode, range(start, stop))))
        labels = None if self._labels is None else torch.tensor(self._labels[start:stop])
        return ImageBatch(torch.from_numpy(pixels), labels)

    def _decode(self, number: int) -> np.ndarray:
        (stored,) = self._images[number].values()
        name = (stored and stored["path"]) or f"{self._source} image {number}"
        pixels = decode_image(stored, name, lambda image: convert_image(image, *self._conversion))
        if number and pixels.shape != self.image_size:
            found, right = (f"{width}x{height}" for _, height, width in (pixels.shape, self.image_size))
            raise DataError(
                f"{name} is {found} pixels (width x height), but the first image of {self._source} is {right}: give a"
                " resolution to make all of one size"
            )
        return pixels


class GeneratedImages(ImageBatches):
    """Images that a model generates, by their number.

    Image i is made of the noise of ``torch.Generator().manual_seed(seed + i)`` on the CPU and has a class that is a
    function of i. So rank and batch do not matter, beyond what rounding in the network leaves.

    The classes are ``["uniform"]``: i modulo their number; ``["frequencies"]``: as often as in ``class_counts``,
    (num_classes,); or ids and names, of which image i has the i-th, and again from the first; ``null`` is the null
    class. ``revision`` is a commit of a Hub repository, as `find_revision` gives it. ``description`` has all that the
    images depend on, as JSON values. Raises ValueError for settings that do not fit the model.
    """

    def __init__(
        self,
        model: str,
        sampler: Sampler,
        num_images: int,
        *,
        class_labels: Sequence[str] = ("uniform",),
        class_counts: np.ndarray | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
    ):
        self.pipeline, self._sampler = open_model(model, sampler, device, dtype, revision=revision), sampler
        scheduler, config = self.pipeline.scheduler, self.pipeline.unet.config
        name = type(scheduler).__name__
        if sampler.eta and "eta" not in inspect.signature(scheduler.step).parameters:
            # the number would be known by a setting that it does not depend on
            raise ValueError(f"eta is {sampler.eta:g}, but {name} takes none: leave it 0")
        self.model, self.seed = str(model), seed
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.image_size, self._num_images = (config.in_channels, height, width), num_images
        self._labels = _choose_classes(self.pipeline, class_labels, class_counts, num_images, seed)
        self.description: dict[str, Any] = {
            "model": self.model,
            "revision": revision,
            "weights_sha256": weights_digest(self.pipeline.unet),
            "scheduler_config": plain_config(scheduler.config),
            **plain_config({key: getattr(sampler, key) for key in SAMPLER_NAMES} | sampler.arguments(self.pipeline)),
            "scheduler": name,
            "class_labels": list(class_labels),
            "class_counts": None if class_counts is None else class_counts.tolist(),
            "seed": seed,
            "num_images": num_images,
            "image_size": list(self.image_size),
            "dtype": str(dtype).removeprefix("torch."),
            "num_classes": config.num_class_embeds,
            "id2label": plain_config(self.pipeline.config).get("id2label"),
        }

    def _read(self, start: int, stop: int) -> ImageBatch:
        """The pixels that generate_images.py writes, and labels, -1 for the null class."""
        labels = self._labels[start:stop]
        generated = sample_images(self.pipeline, self._sampler, labels, self.seed + start, output_type="pt")
        broken = (~generated.flatten(1).isfinite()).any(dim=1).nonzero()
        if len(broken):
            raise ValueError(
                f"{self.model} generates image {start + int(broken[0])} with values that are not finite, under"
                f" {self.description['scheduler']}"
            )
        # as they would be read from files
        pixels = (generated.float() * 255).round().to(torch.uint8).cpu()
        has_classes = self.pipeline.unet.config.num_class_embeds is not None
        given = torch.tensor([-1 if label is None else label for label in labels]) if has_classes else None
        return ImageBatch(pixels, given)


def _choose_classes(
    pipeline: ClassConditionalPipeline, asked: Sequence[str], counts: np.ndarray | None, num_images: int, seed: int
) -> list[int | None]:
    """The class of each image; None is the null class."""
    num_classes = pipeline.unet.config.num_class_embeds
    chosen: list[int | None] = [None]
    if num_classes is None:
        if list(asked) not in (["uniform"], ["null"]):
            raise ValueError(f"class_labels is {' '.join(asked)}, but the model has no classes: leave it out")
    elif list(asked) == ["uniform"]:
        chosen = list(range(num_classes))
    elif list(asked) == ["frequencies"]:
        if counts is None:
            raise ValueError("class_labels is frequencies, which needs train_data_dir, a prepared dataset")
        if len(counts) != num_classes:
            raise ValueError(f"train_data_dir has {len(counts)} classes, but the model has {num_classes}")
        # all at once, and so the same whatever part of them is generated
        uniforms = np.random.default_rng([_CLASS_STREAM, seed]).random(num_images)
        # class k where cumulative[k - 1] <= u < cumulative[k]
        chosen = np.searchsorted(np.cumsum(counts) / np.sum(counts), uniforms, side="right").tolist()
    else:
        chosen = [class_id(pipeline, label, num_classes) for label in asked]
    return [chosen[index % len(chosen)] for index in range(num_images)]


def find_revision(model: str) -> str | None:
    """The commit that a Hub id stands for now, None for a folder; OSError if there is neither, or no network."""
    # the folder of a snapshot has the name of its commit
    return None if Path(model).is_dir() else download_snapshot(model, [ClassConditionalPipeline.config_name]).name


def count_classes(folder: str | Path) -> np.ndarray:
    """Images of each class in a prepared dataset, int64 (num_classes,); ValueError if it is none."""
    images = PreparedImages(folder)
    return np.bincount(images.labels(), minlength=images.num_classes)
