"""The protocols by which features are taken, by name.

A number such as an FID means something only beside its protocol: which network, which weights, how images got
their size. Every statistics file carries the header of its extractor, and files with different headers are
not compared.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..utils.nearest_names import perhaps
from .extractors import FeatureExtractor, PixelExtractor
from .inception import TorchScriptInception, TorchvisionInception
from .options import EXTRACTOR_DTYPES, FLOAT32_PROTOCOLS
from .vision_models import DINOV2_DEFAULT, Classifier, DinoV2


PROTOCOLS: dict[str, str] = {
    "clean": "clean-fid: Inception of 2015-12-05, Pillow's antialiased bicubic to 299x299",
    "legacy_tensorflow": "Inception of 2015-12-05, TensorFlow 1's bilinear to 299x299: nearest to published FIDs",
    "original": "the original program's: torchvision's Inception v3, bilinear to 299x299, float16",
    "dinov2": "FD-DINOv2: class token of DINOv2 ViT-L/14, Pillow's antialiased bicubic to 224x224",
    "classifier": "a transformers image classifier of your own: what its last linear layer is given",
    "pixels": "pixels averaged to 8x8, for tests and toys",
}

# The entries of a header that must be equal for two sets of features to be comparable. The others are told:
# versions of libraries and the kind of device change the numbers by rounding, and the name of a file does not
# change them.
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
        protocol: one of PROTOCOLS.
        weights: for ``clean``, ``legacy_tensorflow`` and ``original`` a path to the file, or None to fetch
            the published one once (`weights.find_weights`); for ``dinov2`` and ``classifier`` a folder or a
            Hub id, by default ``facebook/dinov2-large`` and none.
        device: where the network runs.
        dtype: "float32", "float16" or "bfloat16" for ``original`` (by default float16), ``dinov2`` and
            ``classifier`` (by default float32). Another dtype is another protocol, and the header says it.
        batch_size: how many images go through the network at once; it changes memory and not the features.
        channels: for ``pixels``, the channels of the images.
        pixel_size: for ``pixels``, height and width after averaging.

    Raises:
        ValueError: the protocol does not exist or does not take an argument, or the weights are others.
        OSError: the weights are not there and cannot be fetched.
        ImportError: a library that the protocol needs is not installed.
    """
    if protocol not in PROTOCOLS:
        near = perhaps(protocol, PROTOCOLS)
        raise ValueError(f"there is no protocol {protocol!r}: take one of {', '.join(PROTOCOLS)}{near}")
    dtype = _find_dtype(dtype)
    if protocol != "pixels" and (channels, pixel_size) != (3, 8):
        raise ValueError(f"channels and pixel_size are for the protocol pixels, but the protocol is {protocol}")
    if protocol in FLOAT32_PROTOCOLS and dtype not in (None, torch.float32):
        raise ValueError(f"dtype is {dtype}, but the protocol {protocol} is defined in float32: leave it out")
    common: dict[str, Any] = {"device": device, "batch_size": batch_size}
    match protocol:
        case "clean" | "legacy_tensorflow":
            return TorchScriptInception(protocol, weights, **common)
        case "original":
            return TorchvisionInception(weights, dtype=dtype, **common)
        case "dinov2":
            return DinoV2(weights or DINOV2_DEFAULT, dtype=dtype, **common)
        case "classifier":
            if weights is None:
                raise ValueError("the protocol classifier needs weights: a folder of an image classifier, or a Hub id")
            return Classifier(weights, dtype=dtype, **common)
    if weights is not None:
        raise ValueError(f"the protocol pixels has no network, but weights is {weights}")
    return PixelExtractor(channels, pixel_size, **common)


def check_comparable(
    header_a: Mapping[str, Any],
    header_b: Mapping[str, Any],
    name_a: str = "the first",
    name_b: str = "the second",
) -> None:
    """Looks whether features of two headers may be compared.

    Args:
        header_a: the header of an extractor, or one that was stored as JSON.
        header_b: likewise.
        name_a: what errors call the first, such as its file; likewise ``name_b``.

    Raises:
        ValueError: entries among COMPARED_ENTRIES differ. The message has each of them with both values.
    """
    differences = [
        f"{entry} is {header_a.get(entry)} in {name_a} and {header_b.get(entry)} in {name_b}"
        for entry in COMPARED_ENTRIES
        if header_a.get(entry) != header_b.get(entry)
    ]
    if differences:
        raise ValueError(f"features of different protocols cannot be compared: {'; '.join(differences)}")


def _find_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES.values():
        raise ValueError(f"dtype is {dtype}, but must be one of {', '.join(_DTYPES)}{perhaps(dtype, _DTYPES)}")
    return found
