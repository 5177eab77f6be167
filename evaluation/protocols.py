"""The protocols by which features are extracted, and which may be compared; read without torch."""

from collections.abc import Mapping
from typing import Any


# Of guided-diffusion (arXiv 2105.05233), EDM (2206.00364) and EDM2 (2312.02696), whose statistics `published` reads.
PUBLISHED = ("adm", "edm", "edm2")
_INCEPTION_2015 = {"network": "Inception v3 of 2015-12-05 (TorchScript)", "features": "after the last pooling"}
_TENSORFLOW = {
    **_INCEPTION_2015,
    "resize": {"library": "TorchScript", "filter": "bilinear", "antialias": False, "size": [299, 299]},
    "normalization": "inside the network",
}
_PILLOW = {"library": "Pillow", "filter": "bicubic", "antialias": True}
_TORCH = {"library": "torch", "filter": "bilinear", "quantized": False}
_IMAGENET = "ImageNet's mean and standard deviation"

# What a header says of each, as far as it does not depend on weights: normalization is of x from 0 to 255, dtype is
# float32 where nothing is said, and libraries, beside torch, are those that have a part in the numbers.
PROTOCOLS: dict[str, dict[str, Any]] = {
    # the network of the usual FID; clean-fid's antialiased resizing (Parmar et al. 2022, arXiv 2104.11222)
    "clean": {
        **_INCEPTION_2015,
        "resize": {**_PILLOW, "quantized": False, "size": [299, 299]},
        "normalization": "(x - 128) / 128",
        "libraries": ["clean-fid", "Pillow"],
    },
    # resized inside the network, as TensorFlow 1 aligned it: closest to the published FIDs of ImageNet 64x64
    "legacy_tensorflow": _TENSORFLOW,
    # the same computation as the published evaluations do it, for scores against their statistics; see PUBLISHED
    **dict.fromkeys(PUBLISHED, _TENSORFLOW),
    # that of "Diffusion models from scratch"
    "original": {
        "network": "Inception v3 of torchvision, for classification",
        "features": "after the last pooling",
        "resize": {**_TORCH, "antialias": False, "size": [299, 299]},
        "normalization": f"{_IMAGENET}, which the network turns into 2 x / 255 - 1",
        "dtype": "float16",
        "libraries": ["torchvision"],
        "note": "the original program's own protocol: it does not compare with the usual FID",
    },
    # FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675), as the authors' program computes it by default
    "dinov2": {
        "features": "the class token after the last layer norm",
        "resize": {**_PILLOW, "quantized": True, "size": [224, 224]},
        "normalization": _IMAGENET,
        "libraries": ["transformers", "Pillow"],
    },
    "classifier": {
        "features": "the input of the last linear layer",
        "resize": {**_TORCH, "antialias": True},
        "normalization": "x / 127.5 - 1",
        "libraries": ["transformers"],
    },
    "pixels": {
        "network": "none",
        "resize": {"library": "torch", "filter": "box", "antialias": True, "size": [8, 8]},
        "normalization": "x / 255",
    },
}

# The entries of a header that must be equal for two sets of features to be comparable. Versions of libraries and the
# kind of device change the numbers by rounding only, and the name of a file does not change them.
_COMPARED = "protocol network features resize normalization dtype weights_sha256 num_features num_classes"
COMPARED_ENTRIES = tuple(_COMPARED.split())


def check_comparable(
    header_a: Mapping[str, Any], header_b: Mapping[str, Any], name_a: str = "the first", name_b: str = "the second"
) -> None:
    """Raises ValueError, with every difference, if features of two headers may not be compared."""
    differences = [
        f"{entry} is {header_a.get(entry)} in {name_a} and {header_b.get(entry)} in {name_b}"
        for entry in COMPARED_ENTRIES
        if header_a.get(entry) != header_b.get(entry)
    ]
    if differences:
        raise ValueError(f"features of different protocols cannot be compared: {'; '.join(differences)}")
