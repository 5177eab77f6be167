"""The extractors of the protocols: the Inceptions of Frechet distances, DINOv2, classifiers, pixels."""

import abc
import contextlib
import importlib.metadata
import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from ..pipelines.loading import download_snapshot
from ..utils.devices import find_device
from ..utils.file_digest import file_digest
from ..utils.nearest_names import perhaps
from .protocols import PROTOCOLS, PUBLISHED
from .weights import INCEPTION_2015, TORCHVISION_INCEPTION, find_weights


class Features(NamedTuple):
    """What a network makes of images, float32."""

    features: Tensor  # (images, num_features)
    probabilities: Tensor | None = None  # (images, num_classes), where the network knows classes
    spatial_features: Tensor | None = None  # (images, 2023), an Inception's for sFID


class FeatureExtractor(abc.ABC):
    """A network that turns each image into features; the others of a batch matter by rounding only.

    A subclass sets the attributes and completes ``facts``, which is what the header says.
    """

    num_features: int
    num_classes: int | None = None
    id2label: dict[int, str] | None = None
    channels: int = 3

    def __init__(
        self, protocol: str, device: str | torch.device = "cpu", dtype: str | None = None, batch_size: int = 64
    ) -> None:
        self.device, self.batch_size = find_device(device), batch_size
        self.facts: dict[str, Any] = {"protocol": protocol, "dtype": "float32", "libraries": []}
        self.facts |= dict.fromkeys(("weights", "weights_sha256", "note")) | PROTOCOLS[protocol]
        self.facts["dtype"] = dtype or self.facts["dtype"]
        self.dtype: torch.dtype = getattr(torch, self.facts["dtype"])

    @property
    def header(self) -> dict[str, Any]:
        """The protocol as JSON values."""
        facts = {name: value for name, value in self.facts.items() if name != "libraries"}
        versions = {name: importlib.metadata.version(name) for name in sorted({"torch", *self.facts["libraries"]})}
        numbers = {"num_features": self.num_features, "num_classes": self.num_classes}
        return {**facts, "versions": versions, **numbers, "device": self.device.type}

    def __call__(self, images: Tensor) -> Features:
        """Extracts the features of images on any device; grey ones are repeated for a network of three channels.

        ValueError unless the images are uint8 (images, channels, height, width), and their features finite.
        """
        protocol, dtype = self.facts["protocol"], self.facts["dtype"]
        channels = (1, 3) if self.channels == 3 else (self.channels,)
        if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape or images.shape[1] not in channels:
            wanted = f"torch.uint8 (images, {' or '.join(map(str, channels))}, height, width) for {protocol}"
            raise ValueError(f"the images are {images.dtype} {tuple(images.shape)}, but must be {wanted}")
        with torch.no_grad(), full_float32():
            chunks = images.expand(-1, self.channels, -1, -1).split(self.batch_size)
            kinds = zip(*map(self._extract, chunks), strict=True)
            found = Features._make(None if parts[0] is None else torch.cat(parts) for parts in kinds)
        broken = (~found.features.isfinite()).any(dim=1).nonzero()
        if len(broken):
            told = f"{protocol} in {dtype} gives features that are not finite for image {int(broken[0])}"
            raise ValueError(told if dtype == "float32" else f"{told}; try extractor_dtype float32")
        return found

    @abc.abstractmethod
    def _extract(self, images: Tensor) -> Features:
        """Those of one chunk."""


class PixelExtractor(FeatureExtractor):
    """Images averaged over boxes to 8x8 pixels, for tests and toys."""

    def __init__(self, protocol: str = "pixels", weights: None = None, channels: int = 3, **options: Any) -> None:
        super().__init__(protocol, **options)
        self.channels, self.num_features = channels, channels * 64
        self.facts["features"] = f"{channels} channels"

    def _extract(self, images: Tensor) -> Features:
        height, width = images.shape[2:]
        if min(height, width) < 8:
            raise ValueError(f"the images have {height}x{width} pixels, too few to be averaged to 8x8")
        averaged = F.adaptive_avg_pool2d(images.to(self.device, torch.float32) / 255, 8)
        return Features(averaged.flatten(1))


def _spatial(output: Tensor) -> Tensor:
    """What sFID needs of a layer (Nash et al. 2021, https://arxiv.org/abs/2103.03841): of 17x17 places the first 7
    channels, which come last, as in guided-diffusion's statistics."""
    return output[:, :7].permute(0, 2, 3, 1).flatten(1).float()


class TorchScriptInception(FeatureExtractor):
    """The Inception of 2015-12-05: StyleGAN2-ADA's file, whose code is run.

    Its ``mixed_6`` begins with the channels of TensorFlow's ``mixed_6/conv``; without it, there is no sFID.
    """

    def __init__(self, protocol: str, weights: str | Path | None, **options: Any) -> None:
        super().__init__(protocol, **options)
        self._resize: Callable[[np.ndarray], np.ndarray] | None = None
        if protocol == "clean":
            from cleanfid.resize import build_resizer

            self._resize = build_resizer("clean")
        file, self.facts["weights_sha256"] = find_weights(INCEPTION_2015, weights)
        self.facts["weights"] = file.name
        with warnings.catch_warnings():
            # the file exists in this form only
            warnings.filterwarnings("ignore", ".*torch.jit.load.* is deprecated")
            self._network = torch.jit.load(str(file), map_location=self.device).eval()
        self.num_classes, self.num_features = self._network.output.weight.shape
        self._layers = dict(self._network.layers.named_children())

    def _extract(self, images: Tensor) -> Features:
        spatial = None
        if self._resize is None and "mixed_6" not in self._layers:
            features = self._network(images.to(self.device, torch.float32), return_features=True)
        else:
            if self._resize is None:
                resized = _resize_as_tensorflow(images.to(self.device, torch.float32))
            else:
                resized = _resize_each(images, self._resize).to(self.device, memory_format=torch.contiguous_format)
            features = (resized - 128) / 128
            # one by one, because a loaded script takes no hooks
            for name, layer in self._layers.items():
                features = layer(features)
                spatial = _spatial(features) if name == "mixed_6" else spatial
        features = features.reshape(len(images), -1)
        # without the bias, as in the original Inception Score
        return Features(features, F.linear(features, self._network.output.weight).softmax(dim=1), spatial)


class TorchvisionInception(FeatureExtractor):
    """torchvision's Inception v3; on a CPU, float16 takes about twenty times as long as float32."""

    def __init__(self, protocol: str, weights: str | Path | None, **options: Any) -> None:
        super().__init__(protocol, **options)
        from torchvision.models import inception_v3

        file, self.facts["weights_sha256"] = find_weights(TORCHVISION_INCEPTION, weights)
        self.facts["weights"] = file.name
        # as torchvision makes it for these weights
        network = inception_v3(weights=None, init_weights=False, transform_input=True)
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        network.to(self.device, self.dtype).eval()
        self.num_classes, self.num_features = network.fc.out_features, network.fc.in_features
        self._network, self._head, network.fc = network, network.fc, torch.nn.Identity()
        self._spatial: list[Tensor] = []
        # it is the same layer as mixed_6, in the same order
        network.Mixed_6d.register_forward_hook(lambda layer, _, output: self._spatial.append(_spatial(output)))

    def _extract(self, images: Tensor) -> Features:
        images = images.to(self.device, torch.float32) / 255
        images = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
        features = self._network(_normalize(images).to(self.dtype))
        return Features(features.float(), self._head(features).float().softmax(dim=1), self._spatial.pop())


class DinoV2(FeatureExtractor):
    """The class token; transformers interpolates positions without the authors' offset of 0.1: nearly the same."""

    def __init__(self, protocol: str, weights: str | Path | None, **options: Any) -> None:
        super().__init__(protocol, **options)
        self._network, _ = _load_transformers(self, "AutoModel", weights or "facebook/dinov2-large")
        self.num_features = self._network.config.hidden_size

    def _extract(self, images: Tensor) -> Features:
        def resize(image: np.ndarray) -> np.ndarray:
            return np.asarray(PIL.Image.fromarray(image).resize((224, 224), PIL.Image.Resampling.BICUBIC))

        images = _resize_each(images, resize).to(self.device).float() / 255
        answer = self._network(pixel_values=_normalize(images).to(self.dtype))
        return Features(answer.last_hidden_state[:, 0].float())


class Classifier(FeatureExtractor):
    """Any image classifier of transformers, with its image processor, if its folder has one.

    Without, images get the configuration's size and what this package's models see: x / 127.5 - 1.
    """

    def __init__(self, protocol: str, weights: str | Path, **options: Any) -> None:
        super().__init__(protocol, **options)
        self._network, folder = _load_transformers(self, "AutoModelForImageClassification", weights)
        config = self._network.config
        size = getattr(config, "image_size", None)
        self._size = (size, size) if isinstance(size, int) else size and tuple(size)
        self.facts["resize"] = {**self.facts["resize"], "size": self._size and list(self._size)}
        self._processor = None
        if (folder / "preprocessor_config.json").is_file():
            from transformers import AutoImageProcessor

            self._processor = AutoImageProcessor.from_pretrained(folder)
            settings = json.loads(self._processor.to_json_string())
            self.facts["resize"] = {"library": "transformers", "processor": type(self._processor).__name__, **settings}
            self.facts["normalization"] = "as the processor does"
        self.channels = getattr(config, "num_channels", 3)
        self.num_classes, self.id2label = config.num_labels, dict(config.id2label)
        layers = (layer for layer in self._network.modules() if isinstance(layer, torch.nn.Linear))
        heads = [layer for layer in layers if layer.out_features == self.num_classes]
        if not heads:
            raise ValueError(f"weights {weights} has no linear layer for its {self.num_classes} classes")
        self.num_features = heads[-1].in_features
        self._inputs: list[Tensor] = []
        heads[-1].register_forward_pre_hook(lambda head, arguments: self._inputs.append(arguments[0]))

    def _extract(self, images: Tensor) -> Features:
        if self._processor is not None:
            images = images.contiguous().to(self.device)
            # named, because it cannot be told from the shape of small images of few channels
            processed = self._processor(images=list(images), return_tensors="pt", input_data_format="channels_first")
            inputs = processed["pixel_values"].to(self.device)
        else:
            inputs = images.to(self.device, torch.float32)
            if self._size is not None and inputs.shape[2:] != self._size:
                inputs = F.interpolate(inputs, self._size, mode="bilinear", align_corners=False, antialias=True)
            inputs = inputs / 127.5 - 1
        logits = self._network(pixel_values=inputs.to(self.dtype)).logits
        features = self._inputs.pop().float().reshape(len(images), -1)
        return Features(features, logits.float().softmax(dim=1))


def _load_transformers(extractor: FeatureExtractor, auto_class: str, weights: str | Path) -> tuple[Any, Path]:
    """A network in the dtype of the protocol, from a folder or the snapshot of a Hub repository, and its folder."""
    # transformers takes seconds to import
    import transformers

    folder = Path(weights).expanduser()
    if folder.is_file():
        raise OSError(f"weights {weights} is a file, but must be a folder of a transformers model or a Hub id")
    # without the place on this machine
    extractor.facts["weights"] = folder.absolute().name if folder.exists() else str(weights)
    if not folder.exists():
        folder = download_snapshot(str(weights), ["*.json", "*.safetensors"])
    # the code in a repository is never run, and pickles are never read
    loading = {"dtype": extractor.dtype, "use_safetensors": True, "local_files_only": True}
    network = getattr(transformers, auto_class).from_pretrained(folder, **loading)
    extractor.facts["network"] = type(network).__name__
    extractor.facts["weights_sha256"] = file_digest(*sorted(folder.glob("*.safetensors")))
    return network.eval().to(extractor.device), folder


_EXTRACTORS: dict[str, Callable[..., FeatureExtractor]] = {
    **dict.fromkeys(("clean", "legacy_tensorflow", *PUBLISHED), TorchScriptInception),
    "original": TorchvisionInception,
    "dinov2": DinoV2,
    "classifier": Classifier,
    "pixels": PixelExtractor,
}


def published_header(protocol: str) -> dict[str, Any]:
    """The header of an extractor with the published Inception, without reading its weights."""
    weights = {"weights": INCEPTION_2015.name, "weights_sha256": INCEPTION_2015.sha256, "dtype": "float32"}
    return {"protocol": protocol, **PROTOCOLS[protocol], **weights, "num_features": 2048, "num_classes": 1008}


def make_extractor(protocol: str, weights: str | Path | None = None, **options: Any) -> FeatureExtractor:
    """Makes the extractor of a protocol; ``weights`` is a file, folder or Hub id, None fetches the published ones.

    The options are those of `FeatureExtractor`, and ``channels`` for ``pixels``.
    """
    if protocol not in PROTOCOLS:
        names = ", ".join(PROTOCOLS) + perhaps(protocol, PROTOCOLS)
        raise ValueError(f"there is no protocol {protocol!r}: take one of {names}")
    if protocol == "pixels" and weights is not None:
        raise ValueError(f"the protocol pixels has no network, but weights is {weights}")
    if protocol == "classifier" and weights is None:
        raise ValueError("the protocol classifier needs weights: a folder of an image classifier, or a Hub id")
    try:
        return _EXTRACTORS[protocol](protocol, weights, **options)
    except ImportError as error:
        raise ImportError(
            f"the protocol {protocol} needs another library: pip install 'imagenet64-diffusion[eval]' ({error})"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        # torch, safetensors and transformers have no common class for what they raise; these two name the weights
        if not isinstance(error, OSError | ValueError):
            reason = f"weights {weights} cannot be read for the protocol {protocol} ({reason})"
        raise ValueError(reason) from error


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Keeps float32 from being rounded to TF32 or bfloat16, and algorithms from being chosen by their speed.

    Since 2.9 torch has these settings twice. Where a program has set both, reading the older ones raises, so the newer
    ones, which have the last word, come first.
    """
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    settings: list[tuple[Any, str, Any]] = [(cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    if hasattr(backends, "fp32_precision"):
        operations = (cudnn.conv, cudnn.rnn, mkldnn.conv, mkldnn.rnn, mkldnn.matmul, backends.cuda.matmul)
        settings += [(operation, "fp32_precision", "ieee") for operation in operations]
    else:
        settings += [(cudnn, "allow_tf32", False)]
    with contextlib.ExitStack() as stack:
        for place, name, value in settings:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        yield


def _resize_each(images: Tensor, resize: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Resizes images with a function for one, (height, width, channels)."""
    arrays = images.permute(0, 2, 3, 1).cpu().contiguous().numpy()
    with ThreadPoolExecutor() as pool:
        return torch.from_numpy(np.stack(list(pool.map(resize, arrays)))).permute(0, 3, 1, 2)


def _resize_as_tensorflow(images: Tensor) -> Tensor:
    """Bilinear, to 299x299 pixels, of which pixel i lies at i * size / 299: TensorFlow 1's ``resize_bilinear``."""
    height, width = images.shape[2:]
    # from where torch has the middle of that pixel, in halves of the image
    shift = torch.tensor([[1, 0, 1 / width - 1 / 299], [0, 1, 1 / height - 1 / 299]], device=images.device)
    grid = F.affine_grid(shift.expand(len(images), -1, -1), [len(images), 1, 299, 299], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _normalize(images: Tensor) -> Tensor:
    """By ImageNet's mean and standard deviation."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=images.device)[..., None, None]
    return (images - mean) / std
