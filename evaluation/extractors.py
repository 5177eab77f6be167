"""The extractors of the protocols: the Inceptions of Frechet distances, DINOv2, classifiers, pixels."""

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from ..pipelines.loading import download_snapshot
from .protocols import FeatureExtractor, Features, Protocol
from .weights import INCEPTION_2015, TORCHVISION_INCEPTION, file_digest, find_weights


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_DEFAULT = "facebook/dinov2-large"
_DINOV2_SIZE = (224, 224)


class PixelExtractor(FeatureExtractor):
    """Images averaged over boxes to a few pixels, for tests and toys.

    Args:
        channels: What images must have.
        size: Height and width after averaging.
    """

    def __init__(
        self, channels: int = 3, size: int = 8, device: str | torch.device = "cpu", batch_size: int = 64
    ) -> None:
        if channels < 1 or size < 1:
            raise ValueError(f"channels is {channels} and pixel_size {size}, but both must be at least 1")
        resize = {"library": "torch", "filter": "box", "antialias": True, "size": [size, size]}
        super().__init__(Protocol("pixels", "none", f"{channels} channels", resize, "x / 255"), device, batch_size)
        self.channels, self.num_features, self._size = channels, channels * size**2, size

    def _extract(self, images: torch.Tensor) -> Features:
        if min(images.shape[2:]) < self._size:
            raise ValueError(
                f"the images have {images.shape[2]}x{images.shape[3]} pixels, too few to be averaged to"
                f" {self._size}x{self._size}: give a smaller pixel_size"
            )
        averaged = F.adaptive_avg_pool2d(images.to(self.device, torch.float32) / 255, self._size)
        return Features(averaged.flatten(1), None)


class TorchScriptInception(FeatureExtractor):
    """The Inception of 2015-12-05, which the usual FID is taken with: StyleGAN2-ADA's TorchScript file.

    Images get 299x299 pixels in one of the ways of clean-fid (Parmar et al. 2022, arXiv 2104.11222): ``clean`` by its
    own resizer, Pillow's antialiased bicubic on float32, on the CPU; ``legacy_tensorflow`` bilinear inside the
    network, as TensorFlow 1 aligned it, without antialiasing, closest to the published FIDs of ImageNet 64x64.

    The features are the 2048 values after the last pooling; the probabilities are the softmax over the output layer's
    1008 values without its bias, as in the original Inception Score.

    Args:
        mode: One of the two.
        weights: A path to the file, whose code is run: name one that you trust. None to fetch the published one.

    Raises:
        OSError: There is no such file, or it cannot be fetched.
        ValueError: The file is not such a network.
        ImportError: clean-fid is needed and not installed.
    """

    def __init__(
        self,
        mode: Literal["clean", "legacy_tensorflow"] | str,
        weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
    ) -> None:
        self._resize = None
        resize = {"library": "TorchScript", "filter": "bilinear", "antialias": False}
        if mode == "clean":
            with _needs_extra("clean-fid", mode):
                from cleanfid.resize import build_resizer
            self._resize = _ThreadedResizer(build_resizer("clean"))
            resize = {"library": "Pillow", "filter": "bicubic", "antialias": True, "quantized": False}
        file, digest = find_weights(INCEPTION_2015, weights)
        protocol = Protocol(
            mode,
            "Inception v3 of 2015-12-05 (TorchScript)",
            "after the last pooling",
            {**resize, "size": [299, 299]},
            "inside the network" if self._resize is None else "(x - 128) / 128",
            weights=file.name,
            weights_sha256=digest,
            libraries=() if self._resize is None else ("clean-fid", "Pillow"),
        )
        super().__init__(protocol, device, batch_size)
        try:
            with warnings.catch_warnings():
                # the file exists in this form only, so that the advice to use another helps nobody
                warnings.filterwarnings("ignore", ".*torch.jit.load.* is deprecated")
                self._network = torch.jit.load(str(file), map_location=self.device).eval()
        except RuntimeError as error:
            raise ValueError(f"weights {file} cannot be read as TorchScript ({_first_line(error)})") from error
        missing = [name for name in ("layers", "output") if not hasattr(self._network, name)]
        if missing:
            raise ValueError(
                f"weights {file} is not the Inception of {INCEPTION_2015.url}: it has no {' and no '.join(missing)}"
            )
        self.num_classes, self.num_features = self._network.output.weight.shape

    def _extract(self, images: torch.Tensor) -> Features:
        if self._resize is None:
            features = self._network(images.to(self.device, torch.float32), return_features=True)
        else:
            resized = self._resize(images).to(self.device, memory_format=torch.contiguous_format)
            features = self._network.layers((resized - 128) / 128)
        features = features.reshape(len(images), -1)
        return Features(features, F.linear(features, self._network.output.weight).softmax(dim=1))


class TorchvisionInception(FeatureExtractor):
    """torchvision's Inception v3 for classification: the protocol of "Diffusion models from scratch".

    Bilinear to 299x299 pixels without antialiasing, ImageNet's mean and standard deviation, float16 as that program
    computed in; on a CPU this takes about twenty times as long as float32. Other weights than those of the usual FID:
    the numbers compare with that program's alone.

    The features are the 2048 values after the last pooling, the probabilities the softmax over 1000 classes.

    Args:
        weights: A path to torchvision's file; None to fetch it.
        dtype: What the network computes in.

    Raises:
        OSError: There is no such file, or it cannot be fetched.
        ValueError: The file does not hold these weights.
        ImportError: torchvision is not installed.
    """

    num_features = 2048

    def __init__(
        self,
        weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float16,
        batch_size: int = 64,
    ) -> None:
        with _needs_extra("torchvision", "original"):
            from torchvision.models import inception_v3
        file, digest = find_weights(TORCHVISION_INCEPTION, weights)
        protocol = Protocol(
            "original",
            "Inception v3 of torchvision, for classification",
            "after the last pooling",
            {"library": "torch", "filter": "bilinear", "antialias": False, "quantized": False, "size": [299, 299]},
            "ImageNet's mean and standard deviation, which the network turns into 2 x / 255 - 1",
            str(dtype).removeprefix("torch."),
            weights=file.name,
            weights_sha256=digest,
            libraries=("torchvision",),
            note="the original program's own protocol: it does not compare with the usual FID",
        )
        super().__init__(protocol, device, batch_size)
        self._dtype = dtype
        # as torchvision makes it for these weights
        network = inception_v3(weights=None, init_weights=False, transform_input=True)
        try:
            network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        # torch has no common class for what its readers raise
        except Exception as error:
            raise ValueError(
                f"weights {file} are not those of torchvision's Inception v3 ({' '.join(str(error).split())[:300]})"
            ) from error
        self._head, network.fc = network.fc, torch.nn.Identity()
        self._network = network.to(self.device, dtype).eval()
        self._head.to(self.device, dtype)
        self.num_classes = self._head.out_features

    def _extract(self, images: torch.Tensor) -> Features:
        images = images.to(self.device, torch.float32) / 255
        images = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
        features = self._network(_normalize(images).to(self._dtype))
        return Features(features.float(), self._head(features).float().softmax(dim=1))


class DinoV2(FeatureExtractor):
    """The features of FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675): the class token of a DINOv2 network.

    As the authors' program computes them by default: Pillow's antialiased bicubic on 8-bit pixels to 224x224,
    ImageNet's mean and standard deviation, ViT-L/14, the class token after the last layer norm. transformers
    interpolates the encoding of positions by the sizes themselves, where the authors' network adds 0.1 before
    dividing, so the two differ a little more than by rounding.

    Args:
        weights: A folder of a transformers vision model, or a Hub id.
        dtype: What the network computes in.

    Raises:
        OSError: There is no such folder or repository, or the Hub cannot be reached.
        ValueError: The folder holds no model with tokens.
    """

    def __init__(
        self,
        weights: str | Path = DINOV2_DEFAULT,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
    ) -> None:
        self._network, _, facts = _open_model("AutoModel", weights, dtype)
        resize = {"library": "Pillow", "filter": "bicubic", "antialias": True, "quantized": True}
        protocol = Protocol(
            "dinov2",
            features="the class token after the last layer norm",
            resize={**resize, "size": list(_DINOV2_SIZE)},
            normalization="ImageNet's mean and standard deviation",
            libraries=("transformers", "Pillow"),
            **facts,
        )
        super().__init__(protocol, device, batch_size)
        if not hasattr(self._network.config, "hidden_size"):
            raise ValueError(f"weights {weights}: {protocol.network} has no tokens; name a vision transformer")
        self.num_features, self._dtype = self._network.config.hidden_size, dtype
        self._network.to(self.device)
        self._resize = _ThreadedResizer(
            lambda image: np.asarray(PIL.Image.fromarray(image).resize(_DINOV2_SIZE, PIL.Image.Resampling.BICUBIC))
        )

    def _extract(self, images: torch.Tensor) -> Features:
        images = self._resize(images).to(self.device).float() / 255
        answer = self._network(pixel_values=_normalize(images).to(self._dtype))
        return Features(answer.last_hidden_state[:, 0].float(), None)


class Classifier(FeatureExtractor):
    """Any image classifier of transformers; the features are what its last linear layer is given.

    Images become what the model's image processor makes of them, where the folder has one. Without one they are
    resized to the configuration's ``image_size`` (bilinear, antialiased), if it has one and the images are of another
    size, and mapped to x / 127.5 - 1, which is what models trained on this package's data see.

    The probabilities are the softmax over the classifier's logits, in float32.

    Args:
        weights: A folder of a transformers image classifier, or a Hub id.
        dtype: What the network computes in.

    Raises:
        OSError: There is no such folder or repository, or the Hub cannot be reached.
        ValueError: The folder holds no image classifier with a linear layer for its classes.
    """

    def __init__(
        self,
        weights: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
    ) -> None:
        network, folder, facts = _open_model("AutoModelForImageClassification", weights, dtype)
        size = getattr(network.config, "image_size", None)
        self._size = (size, size) if isinstance(size, int) else size and tuple(size)
        self._processor = None
        resize = {"library": "torch", "filter": "bilinear", "antialias": True, "quantized": False}
        resize["size"] = self._size and list(self._size)
        if (folder / "preprocessor_config.json").is_file():
            from transformers import AutoImageProcessor

            self._processor = AutoImageProcessor.from_pretrained(folder)
            settings = json.loads(self._processor.to_json_string())
            resize = {"library": "transformers", "processor": type(self._processor).__name__, **settings}
        protocol = Protocol(
            "classifier",
            features="the input of the last linear layer",
            resize=resize,
            normalization="x / 127.5 - 1" if self._processor is None else "as the processor does",
            libraries=("transformers",),
            **facts,
        )
        super().__init__(protocol, device, batch_size)
        self.channels = getattr(network.config, "num_channels", 3)
        self.num_classes, self.id2label = network.config.num_labels, dict(network.config.id2label)
        heads = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
        heads = [layer for layer in heads if layer.out_features == self.num_classes]
        if not heads:
            raise ValueError(
                f"weights {weights}: {protocol.network} has no linear layer for its {self.num_classes} classes"
            )
        self.num_features = heads[-1].in_features
        heads[-1].register_forward_pre_hook(self._keep)
        self._kept: torch.Tensor | None = None
        self._network, self._dtype = network.to(self.device), dtype

    def _keep(self, head: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._kept = arguments[0]

    def _extract(self, images: torch.Tensor) -> Features:
        logits = self._network(pixel_values=self._prepare(images).to(self.device, self._dtype)).logits
        features, self._kept = cast(torch.Tensor, self._kept).float().reshape(len(images), -1), None
        if features.shape[1] != self.num_features:
            raise ValueError(
                f"{self.protocol.network} gives its last linear layer {features.shape[1]} values of an image instead"
                f" of {self.num_features}: it does not pool before it classifies"
            )
        return Features(features, logits.float().softmax(dim=1))

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        if self._processor is not None:
            images = images.contiguous().to(self.device)
            # named, because it cannot be told from the shape of small images of few channels
            processed = self._processor(images=list(images), return_tensors="pt", input_data_format="channels_first")
            return processed["pixel_values"]
        images = images.to(self.device, torch.float32)
        if self._size is not None and images.shape[2:] != self._size:
            images = F.interpolate(images, self._size, mode="bilinear", align_corners=False, antialias=True)
        return images / 127.5 - 1


class _ThreadedResizer:
    """Resizes uint8 (images, channels, height, width) with a function for one image (height, width, channels)."""

    def __init__(self, resize: Callable[[np.ndarray], np.ndarray]) -> None:
        self._resize = resize
        # the ranks of one machine share its cores
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        arrays = images.permute(0, 2, 3, 1).cpu().contiguous().numpy()
        return torch.from_numpy(np.stack(list(self._pool.map(self._resize, arrays)))).permute(0, 3, 1, 2)


def _normalize(images: torch.Tensor) -> torch.Tensor:
    """By ImageNet's mean and standard deviation of every channel; values from 0 to 1."""
    mean, std = (
        torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (images - mean) / std


@contextlib.contextmanager
def _needs_extra(library: str, protocol: str) -> Iterator[None]:
    """Raises ImportError with the way to install the library."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"the protocol {protocol} needs {library}: pip install 'imagenet64-diffusion[eval]' ({error})"
        ) from error


def _open_model(auto_class: str, weights: str | Path, dtype: torch.dtype) -> tuple[Any, Path, dict[str, Any]]:
    """A network of transformers, its folder, and what a `Protocol` says of it.

    Args:
        auto_class: Of transformers.
        weights: A folder, or the id of a Hub repository, of which the snapshot is taken.
        dtype: What it computes in.
    """
    # transformers takes seconds to import
    import transformers

    folder = Path(weights).expanduser()
    # without the place on this machine
    name = folder.absolute().name if folder.exists() else str(weights)
    if folder.is_file():
        raise OSError(f"weights {weights} is a file, but must be a folder of a transformers model or a Hub id")
    if not folder.exists():
        folder = download_snapshot(str(weights), ["*.json", "*.safetensors"])
    try:
        # the code in a repository is never run, and pickles are never read
        loading = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
        network = getattr(transformers, auto_class).from_pretrained(folder, **loading).eval()
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"weights {folder} cannot be loaded with {auto_class} ({_first_line(error)})") from error
    facts = {"network": type(network).__name__, "dtype": str(dtype).removeprefix("torch."), "weights": name}
    return network, folder, facts | {"weights_sha256": file_digest(*sorted(folder.glob("*.safetensors")))}


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
