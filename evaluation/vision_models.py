"""Extractors made of transformers' models: FD-DINOv2, and any image classifier."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from ..pipelines.loading import download_snapshot
from .extractors import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FeatureExtractor,
    Features,
    Protocol,
    ThreadedResizer,
    normalize,
)
from .weights import file_digest


DINOV2_DEFAULT = "facebook/dinov2-large"
DINOV2_SIZE = 224

_PROCESSOR_NAME = "preprocessor_config.json"


class DinoV2(FeatureExtractor):
    """The features of FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675): the class token of a DINOv2 network.

    As the authors' program computes them by default: Pillow's antialiased bicubic on 8-bit pixels to 224x224,
    ImageNet's mean and standard deviation, ViT-L/14, the class token after the last layer norm. transformers
    interpolates the encoding of positions from 37x37 patches to 16x16 by the sizes themselves, where the
    authors' network adds 0.1 before dividing, so the two differ a little more than by rounding.

    Args:
        weights: a folder of a transformers vision model, or a Hub id.
        device: where the network runs; images are resized on the CPU.
        dtype: what it computes in; float32 by default.
        batch_size: how many images go through the network at once.

    Raises:
        OSError: there is no such folder or repository, or the Hub cannot be reached.
        ValueError: the folder holds no model with tokens.
    """

    def __init__(
        self,
        weights: str | Path = DINOV2_DEFAULT,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        batch_size: int = 64,
    ) -> None:
        from transformers import AutoModel

        self._dtype = dtype or torch.float32
        folder = _find_folder(weights)
        resize = {"library": "Pillow", "filter": "bicubic", "antialias": True, "quantized": True}
        protocol = Protocol(
            "dinov2",
            _architecture(folder),
            "the class token after the last layer norm",
            {**resize, "size": [DINOV2_SIZE, DINOV2_SIZE]},
            "ImageNet's mean and standard deviation",
            str(self._dtype).removeprefix("torch."),
            weights=_public_name(weights),
            weights_sha256=_digest(folder),
            libraries=("transformers", "Pillow"),
        )
        super().__init__(protocol, device, batch_size)
        self._network: Any = _load_network(AutoModel, folder, self._dtype).to(self.device)
        config: Any = self._network.config
        if not hasattr(config, "hidden_size"):
            raise ValueError(f"weights {weights}: {protocol.network} has no tokens; name a vision transformer")
        self.num_features = config.hidden_size
        self._resize = ThreadedResizer(_resize_bicubic)

    def _extract(self, images: torch.Tensor) -> Features:
        images = self._resize(images).to(self.device).float() / 255
        answer = self._network(pixel_values=normalize(images, IMAGENET_MEAN, IMAGENET_STD).to(self._dtype))
        return Features(answer.last_hidden_state[:, 0].float(), None)


def _resize_bicubic(image: np.ndarray) -> np.ndarray:
    resized = PIL.Image.fromarray(image).resize((DINOV2_SIZE, DINOV2_SIZE), PIL.Image.Resampling.BICUBIC)
    return np.asarray(resized)


class Classifier(FeatureExtractor):
    """Any image classifier of transformers; the features are what its last linear layer is given.

    Images become what the model's image processor makes of them, where the folder has one. Without one they
    are resized to the configuration's ``image_size`` (bilinear, antialiased), if it has one and the images
    are of another size, and mapped to x / 127.5 - 1, which is what models trained on this package's data see.

    The probabilities are the softmax over the classifier's logits, in float32.

    Args:
        weights: a folder of a transformers image classifier, or a Hub id.
        device: where the network runs.
        dtype: what it computes in; float32 by default.
        batch_size: how many images go through the network at once.

    Raises:
        OSError: there is no such folder or repository, or the Hub cannot be reached.
        ValueError: the folder holds no image classifier with a linear layer for its classes.
    """

    def __init__(
        self,
        weights: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        batch_size: int = 64,
    ) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self._dtype = dtype or torch.float32
        folder = _find_folder(weights)
        network: Any = _load_network(AutoModelForImageClassification, folder, self._dtype)
        self._processor = None
        size = getattr(network.config, "image_size", None)
        self._size = (size, size) if isinstance(size, int) else size and tuple(size)
        if (folder / _PROCESSOR_NAME).is_file():
            self._processor = AutoImageProcessor.from_pretrained(folder)
            settings = json.loads(self._processor.to_json_string())
            resize = {"library": "transformers", "processor": type(self._processor).__name__, **settings}
            normalization = "as the processor does"
        else:
            resize = {"library": "torch", "filter": "bilinear", "antialias": True, "quantized": False}
            resize["size"] = self._size and list(self._size)
            normalization = "x / 127.5 - 1"
        protocol = Protocol(
            "classifier",
            _architecture(folder),
            "the input of the last linear layer",
            resize,
            normalization,
            str(self._dtype).removeprefix("torch."),
            weights=_public_name(weights),
            weights_sha256=_digest(folder),
            libraries=("transformers",),
        )
        super().__init__(protocol, device, batch_size)
        self.channels = getattr(network.config, "num_channels", 3)
        self.num_classes = network.config.num_labels
        self.id2label = dict(network.config.id2label)
        head = _find_head(network, weights)
        self.num_features = head.in_features
        head.register_forward_pre_hook(self._keep)
        self._kept: torch.Tensor | None = None
        self._network = network.to(self.device)

    def _keep(self, head: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._kept = arguments[0]

    def _extract(self, images: torch.Tensor) -> Features:
        logits = self._network(pixel_values=self._prepare(images).to(self.device, self._dtype)).logits
        kept = cast(torch.Tensor, self._kept)
        features, self._kept = kept.float().reshape(len(images), -1), None
        if features.shape[1] != self.num_features:
            raise ValueError(
                f"{self._protocol.network} gives its last linear layer {features.shape[1]} values of an image instead"
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


def _find_head(network: Any, weights: str | Path) -> torch.nn.Linear:
    """The last linear layer whose outputs are the classes."""
    num_classes = network.config.num_labels
    layers = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
    heads = [layer for layer in layers if layer.out_features == num_classes]
    if not heads:
        raise ValueError(
            f"weights {weights}: {type(network).__name__} has no linear layer for its {num_classes} classes"
        )
    return heads[-1]


def _find_folder(weights: str | Path) -> Path:
    """A local folder as it is, or the snapshot of a Hub repository: weights as safetensors, and JSON."""
    folder = Path(weights).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise OSError(f"weights {weights} is a file, but must be a folder of a transformers model or a Hub id")
    return download_snapshot(str(weights), ["*.json", "*.safetensors"])


def _load_network(auto_class: Any, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    try:
        # the code in a repository is never run, and pickles are never read
        return auto_class.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True).eval()
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"weights {folder} cannot be loaded with {auto_class.__name__} ({reason})") from error


def _architecture(folder: Path) -> str:
    """What config.json says the weights are of."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return (config.get("architectures") or [config["model_type"]])[0]
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"weights {folder} is not a folder of a transformers model: no usable {file.name}") from error


def _public_name(weights: str | Path) -> str:
    """A Hub id, or the name of a folder without the place on this machine."""
    folder = Path(weights).expanduser()
    return folder.absolute().name if folder.exists() else str(weights)


def _digest(folder: Path) -> str:
    """The SHA-256 of the safetensors files of a model, in the order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"weights {folder} holds no *.safetensors file")
    return file_digest(*files)
