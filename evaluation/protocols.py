"""The protocols by which features are extracted, by name, and what every extractor does.

A number such as an FID means something only beside its protocol: which network, which weights, how images got their
size. Every statistics file carries the header of its extractor, and files with different headers are not compared.
"""

import abc
import contextlib
import dataclasses
import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..utils.devices import find_device
from ..utils.nearest_names import perhaps
from .options import EXTRACTOR_DTYPES, FLOAT32_PROTOCOLS, PROTOCOLS


# The entries of a header that must be equal for two sets of features to be comparable. Versions of libraries and the
# kind of device change the numbers by rounding only, and the name of a file does not change them.
COMPARED_ENTRIES = (
    "protocol",
    "network",
    "features",
    "resize",
    "normalization",
    "dtype",
    "weights_sha256",
    "num_features",
    "num_classes",
)

_DTYPES = {name: getattr(torch, name) for name in EXTRACTOR_DTYPES}


class Features(NamedTuple):
    """What an extractor says of some images.

    Attributes:
        features: float32 (images, num_features), on the extractor's device.
        probabilities: float32 (images, num_classes), rows that sum to 1; None where the network knows no classes.
    """

    features: torch.Tensor
    probabilities: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What decides the numbers, beside the images.

    Attributes:
        name: The name that it is asked for by.
        network: What computes the features.
        features: Which of its values they are.
        resize: How images get the size of the network: library, filter, size and so on.
        normalization: What the network is given of a value x from 0 to 255.
        dtype: What the network computes in.
        weights: The name of the file of weights, or of the model.
        weights_sha256: The SHA-256 of the weights' files.
        libraries: The packages that have a part in the numbers; torch always has.
        note: What a reader of the numbers should know.
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


class FeatureExtractor(abc.ABC):
    """A network that turns images into vectors, under one protocol.

    The features of an image do not depend on the images beside it, beyond rounding in the network's dtype: 1e-5 of
    their size in float32, 1e-2 in float16 and bfloat16.

    Attributes:
        num_features: The length of a vector.
        num_classes: How many classes the network tells apart; None where it tells none.
        id2label: Class -> name, where the network has names.
        channels: What images must have; those of one channel are repeated where this is 3.
    """

    num_features: int
    num_classes: int | None = None
    id2label: dict[int, str] | None = None
    channels: int = 3

    def __init__(self, protocol: Protocol, device: str | torch.device = "cpu", batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
        self.device = find_device(device)
        self.protocol, self.batch_size = protocol, batch_size

    @property
    def header(self) -> dict[str, Any]:
        """The protocol as JSON values; `check_comparable` says whether two are the same."""
        entries = dataclasses.asdict(self.protocol)
        name, libraries = entries.pop("name"), entries.pop("libraries")
        versions = {library: importlib.metadata.version(library) for library in sorted({"torch", *libraries})}
        numbers = {"num_features": self.num_features, "num_classes": self.num_classes}
        return {"protocol": name, **entries, "versions": versions, **numbers, "device": self.device.type}

    def __call__(self, images: torch.Tensor) -> Features:
        """Extracts the features of some images; memory is bounded by the batch size given when this was made.

        Args:
            images: uint8 (images, channels, height, width), on any device.

        Raises:
            ValueError: The images have another type, shape or number of channels, or features are not finite.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
            raise ValueError(
                f"the images are {images.dtype} of shape {tuple(images.shape)}, but must be torch.uint8 (images,"
                " channels, height, width)"
            )
        if images.shape[1] != self.channels and (images.shape[1], self.channels) != (1, 3):
            wanted = "1 channel (grey, repeated) or 3 (RGB)" if self.channels == 3 else f"{self.channels} channels"
            hint = "" if self.protocol.name == "pixels" else "; the protocol pixels takes any number"
            raise ValueError(
                f"the images have {images.shape[1]} channels, but {self.protocol.name} takes images with {wanted}"
                f"{hint}"
            )
        features = [torch.empty(0, self.num_features, device=self.device)]
        probabilities = [torch.empty(0, self.num_classes or 0, device=self.device)]
        with torch.no_grad(), full_float32():
            for start in range(0, len(images), self.batch_size):
                chunk = images[start : start + self.batch_size]
                part = self._extract(chunk.expand(-1, self.channels, -1, -1))
                wrong = (~part.features.isfinite()).any(dim=1)
                if wrong.any():
                    advice = "" if self.protocol.dtype == "float32" else "; try extractor_dtype float32"
                    raise ValueError(
                        f"{self.protocol.name} in {self.protocol.dtype} gives features that are not finite for image"
                        f" {start + int(wrong.nonzero()[0])}{advice}"
                    )
                features.append(part.features)
                probabilities += [] if part.probabilities is None else [part.probabilities]
        return Features(torch.cat(features), None if self.num_classes is None else torch.cat(probabilities))

    @abc.abstractmethod
    def _extract(self, images: torch.Tensor) -> Features:
        """Extracts the features of one chunk, uint8 (images, channels, height, width) on any device."""


def make_extractor(
    protocol: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    batch_size: int = 64,
    channels: int = 3,
    pixel_size: int = 8,
) -> FeatureExtractor:
    """Makes the extractor of a protocol.

    Args:
        protocol: One of `options.PROTOCOLS`.
        weights: For ``clean``, ``legacy_tensorflow`` and ``original`` a path to the file, or None to fetch the
            published one once (`weights.find_weights`); for ``dinov2`` and ``classifier`` a folder or a Hub id, by
            default ``facebook/dinov2-large`` and none.
        device: Where the network runs.
        dtype: "float32", "float16" or "bfloat16" for ``original`` (by default float16), ``dinov2`` and ``classifier``
            (by default float32). Another dtype is another protocol, and the header says it.
        batch_size: How many images go through the network at once; it changes memory and not the features.
        channels: For ``pixels``, the channels of the images.
        pixel_size: For ``pixels``, height and width after averaging.

    Raises:
        ValueError: The protocol does not exist or does not take an argument, or the weights are others.
        OSError: The weights are not there and cannot be fetched.
        ImportError: A library that the protocol needs is not installed.
    """
    # here, because they are made of the classes above
    from . import extractors

    if protocol not in PROTOCOLS:
        near = perhaps(protocol, PROTOCOLS)
        raise ValueError(f"there is no protocol {protocol!r}: take one of {', '.join(PROTOCOLS)}{near}")
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES.values():
        raise ValueError(f"dtype is {dtype}, but must be one of {', '.join(_DTYPES)}{perhaps(dtype, _DTYPES)}")
    if protocol != "pixels" and (channels, pixel_size) != (3, 8):
        raise ValueError(f"channels and pixel_size are for the protocol pixels, but the protocol is {protocol}")
    if protocol in FLOAT32_PROTOCOLS and found not in (None, torch.float32):
        raise ValueError(f"dtype is {found}, but the protocol {protocol} is defined in float32: leave it out")
    common: dict[str, Any] = {"device": device, "batch_size": batch_size}
    if protocol in ("clean", "legacy_tensorflow"):
        return extractors.TorchScriptInception(protocol, weights, **common)
    if protocol == "original":
        return extractors.TorchvisionInception(weights, dtype=found or torch.float16, **common)
    if protocol == "dinov2":
        return extractors.DinoV2(weights or extractors.DINOV2_DEFAULT, dtype=found or torch.float32, **common)
    if protocol == "classifier":
        if weights is None:
            raise ValueError("the protocol classifier needs weights: a folder of an image classifier, or a Hub id")
        return extractors.Classifier(weights, dtype=found or torch.float32, **common)
    if weights is not None:
        raise ValueError(f"the protocol pixels has no network, but weights is {weights}")
    return extractors.PixelExtractor(channels, pixel_size, **common)


def check_comparable(
    header_a: Mapping[str, Any], header_b: Mapping[str, Any], name_a: str = "the first", name_b: str = "the second"
) -> None:
    """Raises ValueError, with every difference, if features of two headers may not be compared.

    Args:
        header_a: The header of an extractor, or one that was stored as JSON; likewise ``header_b``.
        name_a: What errors call the first, such as its file; likewise ``name_b``.
    """
    differences = [
        f"{entry} is {header_a.get(entry)} in {name_a} and {header_b.get(entry)} in {name_b}"
        for entry in COMPARED_ENTRIES
        if header_a.get(entry) != header_b.get(entry)
    ]
    if differences:
        raise ValueError(f"features of different protocols cannot be compared: {'; '.join(differences)}")


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Keeps float32 from being rounded to TF32 or bfloat16, and algorithms from being chosen by their speed.

    torch has these settings twice: ``set_float32_matmul_precision`` and ``allow_tf32``, and since 2.9
    ``fp32_precision`` for each backend and operation, which has the last word. Where a program has set both, reading
    the former ones raises, so they are read only once the latter say what is wanted here. Afterwards every setting is
    what it was, and follows the same other setting if it did.
    """
    with contextlib.ExitStack() as stack:

        def change(place: Any, name: str, value: Any) -> None:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)

        backends: Any = torch.backends
        change(backends.cudnn, "benchmark", False)
        change(backends.cudnn, "deterministic", True)
        if hasattr(backends, "fp32_precision"):
            # these two are followed by the others, which without them show what they have of their own
            for place in (backends, backends.cudnn):
                change(place, "fp32_precision", "none")
            for place in (backends.cuda.matmul, backends.mkldnn.matmul):
                change(place, "fp32_precision", "ieee")
            backends.fp32_precision = "ieee"
            for place in (backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.conv, backends.mkldnn.rnn):
                # one that follows is left alone, since there is no word for the default of cuDNN's
                if place.fp32_precision != "ieee":
                    change(place, "fp32_precision", "ieee")
        else:
            change(backends.cudnn, "allow_tf32", False)
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        yield
