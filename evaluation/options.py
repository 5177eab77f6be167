"""The options of evaluate_models.py, a dataclass for each of its commands."""

import math
from dataclasses import MISSING, dataclass, fields

from ..pipelines.generation_options import SamplerOptions, check_class_labels
from ..utils.command_line import CheckedOptions, option, option_list
from ..utils.nearest_names import perhaps
from .metrics import METRICS


# what docs/evaluation.md says of each; here, because --help should not wait for torch
PROTOCOLS = ("clean", "legacy_tensorflow", "original", "dinov2", "classifier", "pixels")
# what an extractor can compute in, and the protocols that are defined in float32
EXTRACTOR_DTYPES = ("float32", "float16", "bfloat16")
FLOAT32_PROTOCOLS = ("clean", "legacy_tensorflow", "pixels")


@dataclass(kw_only=True)
class ExtractionOptions(CheckedOptions):
    """What evaluating images has in common, wherever they are from. The help texts say what each one is."""

    output_dir: str = option(
        help="Folder for the evaluation; the same call resumes one.",
        group="output",
        metavar="FOLDER",
    )
    protocol: str = option(
        "clean",
        "How features are made: clean and legacy_tensorflow (Inception of clean-fid), original (the original program's"
        " own, which compares with nothing else), dinov2, classifier (give its folder or Hub id as weights), pixels.",
        group="features",
        choices=list(PROTOCOLS),
        metavar="NAME",
    )
    weights: str | None = option(
        None,
        "The extractor's weights: a file, or for dinov2 and classifier a folder or Hub id (default: fetched once).",
        group="features",
        metavar="WEIGHTS",
    )
    extractor_dtype: str | None = option(
        None,
        "What the extractor computes in; another one is another protocol (default: the protocol's own,"
        " which is float16 for original and else float32). On a CPU original is 20 times as fast in float32.",
        group="features",
        choices=list(EXTRACTOR_DTYPES),
    )
    num_features: int = option(
        50_000,
        "Keep the features of so many images, evenly spread, for KID, precision and so on; 0 keeps none.",
        at_least=0,
        group="features",
    )
    batch_size: int = option(
        64, "Images at a time, at least 1; it does not change the numbers beyond rounding.", at_least=1, group="speed"
    )
    device: str | None = option(
        None, "Such as cpu or cuda (default: what accelerate finds).", group="speed", metavar="DEVICE"
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        super().__post_init__()
        if self.protocol in FLOAT32_PROTOCOLS and self.extractor_dtype not in (None, "float32"):
            raise ValueError(
                f"extractor_dtype is {self.extractor_dtype}, but the protocol {self.protocol} is defined in"
                " float32: leave it out"
            )


@dataclass(kw_only=True)
class ReferenceOptions(ExtractionOptions):
    """Options of `evaluate_reference`."""

    source: str = option(
        help="The images: a prepared folder, a folder of image files, an .npz of images, or a dataset saved or"
        " on the Hub.",
        group="images",
        metavar="SOURCE",
    )
    split: str | None = option(None, "Split of a dataset (default: train).", group="images", metavar="NAME")
    resolution: int | None = option(
        None,
        "Crop and resize to this height and width in pixels, for image files and datasets.",
        at_least=1,
        group="images",
    )
    color_mode: str = option(
        "rgb", "What to make of image files and of images of datasets.", group="images", choices=["rgb", "grayscale"]
    )
    max_images: int | None = option(None, "Only so many images, evenly spread.", at_least=1, group="images")


@dataclass(kw_only=True)
class SamplingOptions(CheckedOptions):
    """Which images are sampled; the names are those of generate_images.py."""

    num_images: int = option(
        50_000, "How many images are sampled. Numbers compare only between equal ones.", at_least=1, group="images"
    )
    class_labels: list[str] = option_list(
        ["uniform"],
        "uniform: every class as often; frequencies: as often as in train_data_dir; or classes by id or name, null for"
        " none.",
        group="images",
        metavar="CLASS",
    )
    train_data_dir: str | None = option(
        None, "Prepared dataset whose classes are counted for frequencies.", group="images", metavar="FOLDER"
    )
    seed: int = option(
        0, "Seed of the first image, at least 0; the next one's is one more, and so on.", at_least=0, group="images"
    )
    dtype: str = option(
        "float32", "What the network computes in.", group="speed", choices=["float32", "bfloat16", "float16"]
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        super().__post_init__()
        self.class_labels = [str(label) for label in self.class_labels]
        check_class_labels(self.class_labels, ("uniform", "frequencies"))
        by_frequency = self.class_labels == ["frequencies"]
        if self.train_data_dir is not None and not by_frequency:
            raise ValueError("train_data_dir is for class_labels frequencies: leave it out, or ask for these")
        if self.train_data_dir is None and by_frequency:
            raise ValueError("class_labels is frequencies, which needs train_data_dir, a prepared dataset")


@dataclass(kw_only=True)
class ModelOptions(SamplerOptions, SamplingOptions, ExtractionOptions):
    """Options of `evaluate_model`."""

    model: str = option(
        help="Pipeline folder or Hub id.",
        group="images",
        metavar="MODEL",
    )
    guidance_scale: float = option(
        1.0,
        "Classifier-free guidance, at least 0; 1 samples without, as published FIDs do.",
        at_least=0,
        group="sampling",
    )
    keep_images: str | None = option(
        None,
        "Keep the images: png in a folder, or npz as the evaluator of guided-diffusion reads it.",
        group="output",
        choices=["png", "npz"],
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        super().__post_init__()
        from ..pipelines.sampler import Sampler

        Sampler.from_options(self)


@dataclass(kw_only=True)
class ScoreOptions(CheckedOptions):
    """Options of `score`."""

    reference: str = option(
        help="Evaluation of real images, written by reference: its folder, or the .npz of it alone.",
        group="evaluations",
        metavar="FOLDER",
    )
    model: str = option(
        help="Evaluation of generated images, written by model; likewise.",
        group="evaluations",
        metavar="FOLDER",
    )
    output: str | None = option(
        None,
        "JSON file for the numbers and their protocol (default: scores.json in model).",
        group="output",
        metavar="FILE",
    )
    metrics: list[str] = option_list(
        ["all"],
        f"all: what the two evaluations allow; or some of {', '.join(METRICS)}. fid is the Frechet distance of the"
        " protocol's features: with dinov2 it is FD-DINOv2.",
        group="metrics",
        metavar="METRIC",
    )
    seed: int = option(
        0, "Seed of KID's subsets and of the splits of the Inception Score, at least 0.", at_least=0, group="metrics"
    )
    device: str = option(
        "cpu",
        "Where precision, recall, density and coverage are computed, such as cuda.",
        group="metrics",
        metavar="DEVICE",
    )

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown metric or a seed below 0."""
        super().__post_init__()
        if not self.metrics:
            raise ValueError(f"metrics is empty: name some of {', '.join(METRICS)}, or all")
        unknown = [name for name in self.metrics if name not in (*METRICS, "all")]
        if unknown:
            near = perhaps(unknown[0], (*METRICS, "all"))
            raise ValueError(f"metrics names {unknown[0]!r}, but must be all, or some of {', '.join(METRICS)}{near}")


@dataclass(kw_only=True)
class SweepOptions(SamplingOptions, ExtractionOptions):
    """Options of `sweep`."""

    reference: str = option(
        help="Evaluation of real images, written by reference.",
        group="images",
        metavar="FOLDER",
    )
    models: list[str] = option(
        help="Pipeline folders or Hub ids; a folder with several pipelines in it stands for all of them.",
        group="images",
        metavar="MODEL",
    )
    scheduler: list[str] = option_list(["own"], "Schedulers; own is the pipeline's.", group="samplers", metavar="NAME")
    num_inference_steps: list[int] = option_list(
        [], "Denoising steps (default: 100, where step_size is not given either).", at_least=1, group="samplers"
    )
    step_size: list[int] = option_list([], "Steps, the original program's way.", at_least=1, group="samplers")
    guidance_scale: list[float] = option_list([1.0], "Guidance scales, at least 0.", at_least=0, group="samplers")
    guidance_interval: list[float] = option_list(
        [0.0, 1.0],
        "Begin and end of guidance as fractions of the steps, 0 <= begin <= end <= 1.",
        group="samplers",
        nargs=2,
    )
    eta: list[float] = option_list([0.0], "Etas, at least 0.", at_least=0, group="samplers")
    clip_sample: bool | None = option(
        None, "Clip the predicted image at each step (default: as the model says).", group="samplers"
    )
    grid: str | None = option(
        None,
        "YAML or JSON file: a list of samplers, each with some of the options above, instead of their product.",
        group="samplers",
        metavar="FILE",
    )
    share: str = option(
        "images",
        "images: all ranks sample from one model, then from the next; models: each rank takes models of its own.",
        group="speed",
        choices=["images", "models"],
    )
    keep_features: bool = option(False, "Keep the evaluation of each entry, with its features.", group="output")

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        super().__post_init__()
        for name in ("scheduler", "guidance_scale", "eta"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one, or leave it out")
        if self.grid is not None:
            for item in (item for item in fields(self) if item.name in GRID_OPTIONS):
                default = item.default if item.default_factory is MISSING else item.default_factory()
                if getattr(self, item.name) != default:
                    raise ValueError(f"grid says how images are sampled, and so does {item.name}: give one of them")


# the options of a sweep whose product is its samplers
GRID_OPTIONS = tuple(item.name for item in fields(SamplerOptions))


@dataclass(kw_only=True)
class ClassifierOptions(CheckedOptions):
    """Options of `train_classifier`."""

    train_data_dir: str = option(help="Folder written by prepare_imagenet64.py.", group="folders", metavar="FOLDER")
    output_dir: str = option(
        help="Folder for the classifier; one that is there is replaced.",
        group="folders",
        metavar="FOLDER",
    )
    epochs: int = option(20, "Times through the images, at least 1.", at_least=1, group="training")
    batch_size: int = option(64, "Images per step, at least 2.", at_least=2, group="training")
    learning_rate: float = option(5e-3, "Largest learning rate, above 0.", above=0, below=math.inf, group="training")
    seed: int = option(0, "Seed of weights and order, at least 0.", at_least=0, group="training")
