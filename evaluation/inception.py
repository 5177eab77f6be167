"""The Inception networks that Fréchet distances are measured with."""

import warnings
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from .extractors import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FeatureExtractor,
    Features,
    Protocol,
    ThreadedResizer,
    needs_extra,
    normalize,
)
from .weights import INCEPTION_2015, TORCHVISION_INCEPTION, find_weights


class TorchScriptInception(FeatureExtractor):
    """The Inception of 2015-12-05, which the usual FID is measured with.

    It is the TorchScript file that StyleGAN2-ADA published. There are two ways to its 299x299 pixels, named as
    clean-fid names them (Parmar et al. 2022, arXiv 2104.11222):

    * ``clean``: clean-fid's own resizer, Pillow's antialiased bicubic on float32.
    * ``legacy_tensorflow``: bilinear inside the network, as TensorFlow 1 aligned it, without antialiasing.
      This is closest to the published FIDs of ImageNet 64x64.

    The features are the 2048 values after the last pooling. The probabilities are the softmax over the output
    layer's 1008 values without its bias, as in the original Inception Score: what the file itself answers
    when it is called with ``no_output_bias=True``.

    Args:
        mode: one of the two.
        weights: a path to the file; None to fetch the published one. Loading TorchScript runs the code in the
            file: what is fetched is what its SHA-256 says, and what you name you trust.
        device: where the network runs; the resizing of ``clean`` is done on the CPU.
        batch_size: how many images go through the network at once.

    Raises:
        OSError: there is no such file, or it cannot be fetched.
        ValueError: the file is not such a network.
        ImportError: clean-fid is needed and not installed.
    """

    def __init__(
        self,
        mode: Literal["clean", "legacy_tensorflow"],
        weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
    ) -> None:
        self._resize_outside = None
        libraries: tuple[str, ...]
        if mode == "clean":
            with needs_extra("clean-fid", mode):
                from cleanfid.resize import build_resizer
            self._resize_outside = ThreadedResizer(build_resizer("clean"))
            resize = {"library": "Pillow", "filter": "bicubic", "antialias": True, "quantized": False}
            libraries = ("clean-fid", "Pillow")
        else:
            resize = {"library": "TorchScript", "filter": "bilinear", "antialias": False}
            libraries = ()
        file, digest = find_weights(INCEPTION_2015, weights)
        protocol = Protocol(
            mode,
            "Inception v3 of 2015-12-05 (TorchScript)",
            "after the last pooling",
            {**resize, "size": [299, 299]},
            "inside the network" if self._resize_outside is None else "(x - 128) / 128",
            weights=file.name,
            weights_sha256=digest,
            libraries=libraries,
        )
        super().__init__(protocol, device, batch_size)
        self._network = _load_torchscript(file, self.device)
        # the real file's output layer has 1008 classes, and inputs as many as there are features
        self.num_classes, self.num_features = self._network.output.weight.shape

    def _extract(self, images: torch.Tensor) -> Features:
        if self._resize_outside is None:
            features = self._network(images.to(self.device, torch.float32), return_features=True)
        else:
            resized = self._resize_outside(images).to(self.device, memory_format=torch.contiguous_format)
            features = self._network.layers((resized - 128) / 128)
        features = features.reshape(len(images), -1)
        return Features(features, F.linear(features, self._network.output.weight).softmax(dim=1))


def _load_torchscript(file: Path, device: torch.device) -> torch.jit.ScriptModule:
    try:
        with warnings.catch_warnings():
            # the file exists in this form only, so that the advice to use another helps nobody
            warnings.filterwarnings("ignore", ".*torch.jit.load.* is deprecated")
            network = torch.jit.load(str(file), map_location=device).eval()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"weights {file} cannot be read as TorchScript ({reason})") from error
    missing = [name for name in ("layers", "output") if not hasattr(network, name)]
    if missing:
        raise ValueError(
            f"weights {file} is not the Inception of {INCEPTION_2015.url}: it has no {' and no '.join(missing)}"
        )
    return network


class TorchvisionInception(FeatureExtractor):
    """torchvision's Inception v3 for classification: the protocol of "Diffusion models from scratch".

    Bilinear to 299x299 pixels without antialiasing, ImageNet's mean and standard deviation, float16. Other
    weights than those of the usual FID: the numbers compare with that program's alone.

    float16 is what that program computed in. On a CPU it takes about twenty times as long as float32, which a
    dtype of float32 gives, with a header that says so.

    The features are the 2048 values after the last pooling, the probabilities the softmax over the 1000
    classes in float32.

    Args:
        weights: a path to torchvision's file; None to fetch it.
        device: where the network runs.
        dtype: what it computes in; float16 by default.
        batch_size: how many images go through the network at once.

    Raises:
        OSError: there is no such file, or it cannot be fetched.
        ValueError: the file does not hold these weights.
        ImportError: torchvision is not installed.
    """

    num_features = 2048

    def __init__(
        self,
        weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        batch_size: int = 64,
    ) -> None:
        with needs_extra("torchvision", "original"):
            from torchvision.models import inception_v3
        self._dtype = dtype or torch.float16
        file, digest = find_weights(TORCHVISION_INCEPTION, weights)
        protocol = Protocol(
            "original",
            "Inception v3 of torchvision, for classification",
            "after the last pooling",
            {"library": "torch", "filter": "bilinear", "antialias": False, "quantized": False, "size": [299, 299]},
            "ImageNet's mean and standard deviation, which the network turns into 2 x / 255 - 1",
            str(self._dtype).removeprefix("torch."),
            weights=file.name,
            weights_sha256=digest,
            libraries=("torchvision",),
            note="the original program's own protocol: it does not compare with the usual FID",
        )
        super().__init__(protocol, device, batch_size)
        # as torchvision makes it for these weights
        network = inception_v3(weights=None, init_weights=False, transform_input=True)
        network.load_state_dict(_load_state_dict(file, network.state_dict()))
        self._head, network.fc = network.fc, torch.nn.Identity()
        self._network = network.to(self.device, self._dtype).eval()
        self._head.to(self.device, self._dtype)
        self.num_classes = self._head.out_features

    def _extract(self, images: torch.Tensor) -> Features:
        images = images.to(self.device, torch.float32) / 255
        images = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
        features = self._network(normalize(images, IMAGENET_MEAN, IMAGENET_STD).to(self._dtype))
        return Features(features.float(), self._head(features).float().softmax(dim=1))


def _load_state_dict(file: Path, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Reads weights, and looks whether they are those of the network."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
        found_shapes = {name: tuple(value.shape) for name, value in found.items()}
    except Exception as error:
        # torch has no common class for what its readers raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"weights {file} cannot be read as a state dict ({reason})") from error
    shapes = {name: tuple(value.shape) for name, value in wanted.items()}
    for name in [*shapes, *found_shapes]:
        # files from before torch 0.4.1 do not count batches, which torch makes up for
        if shapes.get(name) != found_shapes.get(name) and not name.endswith("num_batches_tracked"):
            raise ValueError(
                f"weights {file} are not those of torchvision's Inception v3: {name} has shape"
                f" {found_shapes.get(name, 'none')} instead of {shapes.get(name, 'none')}"
            )
    return found
