"""What every feature extractor does: images in, one vector for each out, in chunks, in full precision."""

import abc
import contextlib
import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..utils.devices import find_device
from .float32_precision import full_float32


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """What an extractor says of some images.

    Attributes:
        features: float32 (images, num_features), on the extractor's device.
        probabilities: float32 (images, num_classes), rows that sum to 1; None where the network knows no
            classes.
    """

    features: torch.Tensor
    probabilities: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What decides the numbers, beside the images.

    Attributes:
        name: the name that it is asked for by.
        network: what computes the features.
        features: which of its values they are.
        resize: how images get the size of the network: library, filter, size and so on.
        normalization: what the network is given of a value x from 0 to 255.
        dtype: what the network computes in.
        weights: the name of the file of weights, or of the model.
        weights_sha256: the SHA-256 of the weights' files.
        libraries: the packages that have a part in the numbers; torch always has.
        note: what a reader of the numbers should know.
    """

    name: str
    network: str
    features: str
    resize: dict[str, Any]
    normalization: str
    dtype: str = "float32"
    weights: str | None = None
    weights_sha256: str | None = None
    libraries: tuple[str, ...] = ()
    note: str | None = None

    def header(self) -> dict[str, Any]:
        """The protocol as JSON values."""
        versions = {library: importlib.metadata.version(library) for library in sorted({"torch", *self.libraries})}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["name"], fields["libraries"]
        return {"protocol": self.name, **fields, "versions": versions}


class FeatureExtractor(abc.ABC):
    """A network that turns images into vectors, under one protocol.

    The features of an image do not depend on the images beside it, beyond what the rounding of the network's
    dtype leaves: 1e-5 of their size in float32, 1e-2 in float16 and bfloat16.

    Attributes:
        num_features: the length of a vector.
        num_classes: how many classes the network tells apart; None where it tells none.
        id2label: class -> name, where the network has names.
        channels: what images must have; those of one channel are repeated where this is 3.
    """

    num_features: int
    num_classes: int | None = None
    id2label: dict[int, str] | None = None
    channels: int = 3

    def __init__(self, protocol: Protocol, device: str | torch.device = "cpu", batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
        self.device = find_device(device)
        self._protocol = protocol
        self._batch_size = batch_size

    @property
    def header(self) -> dict[str, Any]:
        """The protocol as JSON values; `protocols.check_comparable` says whether two are the same."""
        numbers = {"num_features": self.num_features, "num_classes": self.num_classes}
        return {**self._protocol.header(), **numbers, "device": self.device.type}

    def __call__(self, images: torch.Tensor) -> Features:
        """Extracts the features of some images; memory is bounded by the batch size given when this was made.

        Args:
            images: uint8 (images, channels, height, width), on any device.

        Raises:
            ValueError: the images have another type, shape or number of channels, or give features that are
                not finite.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"the images are {images.dtype}, but features are taken of uint8 ones, from 0 to 255")
        if images.ndim != 4 or 0 in images.shape[1:]:
            raise ValueError(
                f"the images have shape {tuple(images.shape)} instead of (images, channels, height, width)"
            )
        if images.shape[1] not in (self.channels, 1 if self.channels == 3 else self.channels):
            wanted = "1 channel (grey, repeated) or 3 (RGB)" if self.channels == 3 else f"{self.channels} channels"
            hint = "" if self._protocol.name == "pixels" else "; the protocol pixels takes any number"
            raise ValueError(
                f"the images have {images.shape[1]} channels, but {self._protocol.name} takes images with {wanted}"
                f"{hint}"
            )
        if not len(images):
            probabilities = None if self.num_classes is None else torch.empty(0, self.num_classes, device=self.device)
            return Features(torch.empty(0, self.num_features, device=self.device), probabilities)
        parts = []
        with torch.no_grad(), full_float32():
            for start in range(0, len(images), self._batch_size):
                chunk = images[start : start + self._batch_size]
                part = self._extract(chunk.expand(-1, self.channels, -1, -1))
                self._check_finite(part.features, start)
                parts.append(part)
        all_features, all_probabilities = zip(*parts, strict=True)
        return Features(torch.cat(all_features), None if self.num_classes is None else torch.cat(all_probabilities))

    @abc.abstractmethod
    def _extract(self, images: torch.Tensor) -> Features:
        """Extracts the features of one chunk, uint8 (images, channels, height, width) on any device."""

    def _check_finite(self, features: torch.Tensor, start: int) -> None:
        wrong = (~features.isfinite()).any(dim=1)
        if wrong.any():
            advice = "" if self._protocol.dtype == "float32" else "; try extractor_dtype float32"
            raise ValueError(
                f"{self._protocol.name} in {self._protocol.dtype} gives features that are not finite for image"
                f" {start + int(wrong.nonzero()[0])}{advice}"
            )


class PixelExtractor(FeatureExtractor):
    """Images averaged over boxes to a few pixels, for tests and toys.

    Args:
        channels: what images must have.
        size: height and width after averaging. Box i of n covers the rows from floor(i * height / n) to
            ceil((i + 1) * height / n).
    """

    def __init__(
        self, channels: int = 3, size: int = 8, device: str | torch.device = "cpu", batch_size: int = 64
    ) -> None:
        if channels < 1 or size < 1:
            raise ValueError(f"channels is {channels} and pixel_size {size}, but both must be at least 1")
        resize = {"library": "torch", "filter": "box", "antialias": True, "size": [size, size]}
        protocol = Protocol("pixels", "none", f"{channels} channels", resize, "x / 255")
        super().__init__(protocol, device, batch_size)
        self.channels = channels
        self.num_features = channels * size**2
        self._size = size

    def _extract(self, images: torch.Tensor) -> Features:
        if min(images.shape[2:]) < self._size:
            raise ValueError(
                f"the images have {images.shape[2]}x{images.shape[3]} pixels, too few to be averaged to"
                f" {self._size}x{self._size}: give a smaller pixel_size"
            )
        averaged = F.adaptive_avg_pool2d(images.to(self.device, torch.float32) / 255, self._size)
        return Features(averaged.flatten(1), None)


class ThreadedResizer:
    """Resizes images with a function for one image, several at a time.

    Args:
        resize: takes an image, uint8 (height, width, channels), and gives another in the same order of axes.
            It is called in several threads, which Pillow's resampling runs in at once.
    """

    def __init__(self, resize: Callable[[np.ndarray], np.ndarray]) -> None:
        self._resize = resize
        # the processes of one machine share its cores
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._pool = ThreadPoolExecutor(max(1, cores // processes))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Resizes (images, channels, height, width), uint8, to the same order of axes, on the CPU."""
        arrays = images.permute(0, 2, 3, 1).cpu().contiguous().numpy()
        return torch.from_numpy(np.stack(list(self._pool.map(self._resize, arrays)))).permute(0, 3, 1, 2)


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(x - mean) / std of every channel.

    Args:
        images: floating point (images, channels, height, width).
        mean: of every channel, in units of the images; likewise ``std``.
    """
    shape = (1, -1, 1, 1)
    offsets, scales = (torch.tensor(values, dtype=images.dtype, device=images.device) for values in (mean, std))
    return (images - offsets.view(shape)) / scales.view(shape)


@contextlib.contextmanager
def needs_extra(library: str, protocol: str) -> Iterator[None]:
    """Turns the failed import of a library into a sentence.

    Raises:
        ImportError: which library is missing and how to install it.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"the protocol {protocol} needs {library}: pip install 'imagenet64-diffusion[eval]' ({error})"
        ) from error
