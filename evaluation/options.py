"""The options of evaluate_models.py, a dataclass for each of its commands."""

import math
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import Any

from ..pipelines.generation_options import GenerateOptions, Sampler, check_class_labels
from ..utils.command_line import CheckedOptions, option
from .metrics import METRICS
from .protocols import PROTOCOLS as _PROTOCOLS


PROTOCOLS = tuple(_PROTOCOLS)
SAMPLER_NAMES = tuple(item.name for item in fields(Sampler))
INTERVALS = ("guidance_interval", "guidance_sigma_interval")  # which matter where there is guidance

_images, _output, _features, _speed, _scores, _training = (
    partial(option, group=group) for group in ("images", "output", "features", "speed", "metrics", "training")
)
_folder = partial(option, metavar="FOLDER")


def _as_generate(name: str, default: Any = MISSING, **changes: Any) -> Any:
    """The option that generate_images.py has by this name, with another default, help or group."""
    item = GenerateOptions.__dataclass_fields__[name]
    default = item.default if default is MISSING else default
    return option(default, **{**item.metadata, **changes})


@dataclass(kw_only=True)
class ExtractionOptions(CheckedOptions):
    """What evaluating images has in common, wherever they are from."""

    output_dir: str = _folder(help="Folder for the evaluation; the same call resumes one.", group="output")
    protocol: str = _features(
        "clean",
        "How features are made: clean and legacy_tensorflow (Inception of clean-fid), adm, edm and edm2 (the same, for"
        " the published statistics of these), original (the original program's own, which compares with nothing else),"
        " dinov2, classifier (give its folder or Hub id as weights), pixels.",
        choices=list(PROTOCOLS),
        metavar="NAME",
    )
    weights: str | None = _features(
        None,
        "The extractor's weights: a file, or for dinov2 and classifier a folder or Hub id (default: fetched once).",
        metavar="WEIGHTS",
    )
    extractor_dtype: str | None = _features(
        None,
        "What the extractor computes in; another one is another protocol (default: float16 for original, which is 20"
        " times as fast in float32 on a CPU, and else float32).",
        choices=["float32", "float16", "bfloat16"],
    )
    num_features: int = _features(50_000, "Keep the features of so many images, for KID and so on.", at_least=0)
    batch_size: int = _speed(64, "Images at a time; it does not change the numbers beyond rounding.", at_least=1)
    device: str | None = _as_generate("device", group="speed")

    def __post_init__(self) -> None:
        super().__post_init__()
        others = self.protocol in ("original", "dinov2", "classifier")
        if not others and self.extractor_dtype not in (None, "float32"):
            raise ValueError(
                f"extractor_dtype is {self.extractor_dtype}, but the protocol {self.protocol} is defined in float32"
            )


@dataclass(kw_only=True)
class ReferenceOptions(ExtractionOptions):
    """Options of evaluating real images."""

    source: str = _images(
        help="A prepared folder, a folder of image files, an .npz of images, or a dataset saved or on the Hub; also"
        " the published statistics of adm, edm and edm2, .npz or .pkl.",
        metavar="SOURCE",
    )
    split: str | None = _images(None, "Split of a dataset (default: train).", metavar="NAME")
    resolution: int | None = _images(None, "Crop and resize files and datasets to such height and width.", at_least=1)
    color_mode: str = _images("rgb", "What to make of image files and datasets.", choices=["rgb", "grayscale"])
    max_images: int | None = _images(None, "Only so many images, evenly spread.", at_least=1)
    num_images: int | None = _images(
        None, "Of how many images published statistics are, where the file does not say.", at_least=2
    )


@dataclass(kw_only=True)
class SamplingOptions(CheckedOptions):
    """Which images are sampled; the names are those of generate_images.py."""

    num_images: int = _images(50_000, "How many are sampled. Numbers compare only between equal ones.", at_least=1)
    class_labels: list[str] = option(
        ["uniform"],
        "uniform: every class as often; frequencies: as in train_data_dir; or classes by id or name, null for none.",
        group="images",
        metavar="CLASS",
    )
    train_data_dir: str | None = _folder(None, "Prepared dataset whose classes frequencies counts.", group="images")
    seed: int = _as_generate("seed")
    dtype: str = _as_generate("dtype", group="speed")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.class_labels = [str(label) for label in self.class_labels]
        check_class_labels(self.class_labels, ("uniform", "frequencies"))
        if self.train_data_dir is not None and self.class_labels != ["frequencies"]:
            raise ValueError("train_data_dir is for class_labels frequencies: leave it out, or ask for these")


@dataclass(kw_only=True)
class ModelOptions(Sampler, SamplingOptions, ExtractionOptions):
    """Options of `evaluate_model`."""

    model: str = _images(help="Pipeline folder or Hub id.", metavar="MODEL")
    # as published FIDs are computed
    guidance_scale: float = _as_generate("guidance_scale", 1.0)
    keep_images: str | None = _output(
        None, "Keep the images: png in a folder, or npz as guided-diffusion reads it.", choices=["png", "npz"]
    )


@dataclass(kw_only=True)
class ScoreOptions(CheckedOptions):
    """Options of `score`."""

    reference: str = _folder(help="Folder that reference has written, or the .npz of it alone.", group="evaluations")
    model: str = _folder(help="Folder that model has written; likewise.", group="evaluations")
    output: str | None = _output(None, "JSON file for the numbers (default: scores.json in model).", metavar="FILE")
    metrics: list[str] = option(
        ["all"],
        f"all: what the two evaluations allow; or some of {', '.join(METRICS)}. fid is the Frechet distance of the"
        " protocol's features: with dinov2 it is FD-DINOv2.",
        group="metrics",
        choices=["all", *METRICS],
        metavar="METRIC",
    )
    seed: int = _scores(0, "Seed of KID's subsets and of the splits of the Inception Score, at least 0.", at_least=0)
    device: str = _scores("cpu", "Where precision, recall, density and coverage are computed.", metavar="DEVICE")


@dataclass(kw_only=True)
class SweepOptions(SamplingOptions, ExtractionOptions):
    """Options of `sweep`."""

    reference: str = _folder(help="Evaluation of real images, written by reference.", group="images")
    models: list[str] = _images(help="Pipeline folders, folders of several, or Hub ids.", metavar="MODEL")
    scheduler: list[str] = _as_generate("scheduler", ["own"], help="own is the pipeline's.", group="samplers")
    scheduler_options: list[str] = _as_generate("scheduler_options", [], group="samplers")
    num_inference_steps: list[int] = _as_generate("num_inference_steps", [], group="samplers")
    step_size: list[int] = _as_generate("step_size", [], group="samplers")
    guidance_scale: list[float] = _as_generate("guidance_scale", [1.0], group="samplers")
    guidance_interval: list[float] = _as_generate("guidance_interval", [0.0, 1.0], group="samplers")
    guidance_sigma_interval: list[float] | None = _as_generate("guidance_sigma_interval", group="samplers")
    classifier_scale: list[float] = _as_generate("classifier_scale", [0.0], group="samplers")
    eta: list[float] = _as_generate("eta", [0.0], group="samplers")
    clip_sample: bool | None = _as_generate("clip_sample", group="samplers")
    grid: str | None = option(
        None, "YAML or JSON: a list of samplers, instead of the product of these.", group="samplers", metavar="FILE"
    )
    share: str = _speed(
        "images",
        "images: all ranks sample from one model, then from the next; models: each rank takes models of its own.",
        choices=["images", "models"],
    )
    keep_features: bool = _output(False, "Keep the evaluation of each entry, with its features.")

    def __post_init__(self) -> None:
        super().__post_init__()
        usual = SweepOptions(output_dir="-", reference="-", models=["-"]) if self.grid else self
        if changed := [name for name in SAMPLER_NAMES if getattr(self, name) != getattr(usual, name)]:
            raise ValueError(f"grid says how images are sampled, and so does {changed[0]}: give one of them")


@dataclass(kw_only=True)
class ClassifierOptions(CheckedOptions):
    """Options of `train_classifier`."""

    train_data_dir: str = _folder(help="Folder written by prepare_imagenet64.py.", group="folders")
    output_dir: str = _folder(help="Folder for the classifier; one that is there is replaced.", group="folders")
    epochs: int = _training(20, "Times through the images, at least 1.", at_least=1)
    batch_size: int = _training(64, "Images per step, at least 2.", at_least=2)
    learning_rate: float = _training(5e-3, "Largest learning rate, above 0.", above=0, below=math.inf)
    seed: int = _training(0, "Seed of weights and order, at least 0.", at_least=0)
