"""The options of sampling, which generate_images.py and evaluate_models.py have in common, and of generating."""

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import yaml

from ..pretrained import DIGITS
from ..schedulers.original_schedule import original_timesteps
from ..utils.command_line import CheckedOptions, option


if TYPE_CHECKING:
    from .pipeline_class_conditional import ClassConditionalPipeline


_sampling, _model, _images, _output = (
    partial(option, group=group) for group in ("sampling", "model", "images", "output")
)
# What of a sampler are arguments of the pipeline's call by the same names.
_CALL_ARGUMENTS = (
    *("guidance_scale", "guidance_interval", "guidance_sigma_interval"),
    *("classifier_scale", "eta", "clip_sample"),
)


@dataclass
class Sampler(CheckedOptions):
    """Settings of a sampling run. The help texts say what each one is.

    Raises:
        ValueError: If a value is out of range, or both ways to say the steps are taken.
    """

    scheduler: str | None = _sampling(
        None,
        "Another scheduler, ours or one of diffusers, such as DDIM, DPMSolverMultistep, UniPCMultistep (default: the"
        " model's own).",
        metavar="NAME",
    )
    scheduler_options: list[str] = option(
        [],
        "Options of the scheduler that differ from its own, such as S_churn=40 S_noise=1.003.",
        group="sampling",
        metavar="NAME=VALUE",
    )
    num_inference_steps: int | None = _sampling(
        None, "Denoising steps (default: 100, where step_size is not given either).", at_least=1
    )
    step_size: int | None = _sampling(
        None, "The original program's way to say the steps: every step_size-th timestep, from the first.", at_least=1
    )
    guidance_scale: float | None = _sampling(
        1.0,
        "Guidance away from the null class, or from the model's guidance network; at least 0, up to 1 samples without."
        " The original's guidance w is w + 1 here.",
        at_least=0,
        below=math.inf,
    )
    guidance_interval: list[float] = option(
        [0.0, 1.0],
        "Begin and end of guidance as fractions of the steps, 0 <= begin <= end <= 1.",
        group="sampling",
        nargs=2,
    )
    guidance_sigma_interval: list[float] | None = option(
        None,
        "Noise levels that are guided, above the first and up to the second, in standard deviations of the noise over"
        " that of the image (default: all).",
        group="sampling",
        nargs=2,
        at_least=0,
    )
    classifier_scale: float = _sampling(
        0.0, "Guidance by the model's classifier, at least 0; 0 does without.", at_least=0, below=math.inf
    )
    eta: float = _sampling(
        0.0,
        "0 is DDIM, 1 is DDPM; at least 0. The original's DDIM_scale S is sqrt(S) here.",
        at_least=0,
        below=math.inf,
    )
    clip_sample: bool | None = _sampling(None, "Clip the predicted image at each step (default: as the model says).")

    def __post_init__(self) -> None:
        """Checks the values."""
        super().__post_init__()
        interval = self.guidance_interval = list(self.guidance_interval)
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            wanted = "two fractions of the steps, 0 <= begin <= end <= 1"
            raise ValueError(f"guidance_interval is {tuple(interval)}, but must be {wanted}")
        if (sigmas := self.guidance_sigma_interval) is not None and (len(sigmas) != 2 or sigmas[0] > sigmas[1]):
            wanted = "two noise levels, 0 <= low <= high"
            raise ValueError(f"guidance_sigma_interval is {tuple(sigmas)}, but must be {wanted}")
        if self.num_inference_steps is not None and self.step_size is not None:
            raise ValueError("num_inference_steps and step_size both say the number of steps: give one of them")

    def __hash__(self) -> int:
        return hash(self.title())

    def prepare(self, pipeline: "ClassConditionalPipeline") -> None:
        """Gives the pipeline the scheduler that is asked for, and takes its guidance scale where none is given.

        Raises as `swap_scheduler`.
        """
        from .loading import swap_scheduler  # which imports torch

        if self.guidance_scale is None:
            self.guidance_scale = pipeline.default_guidance_scale
        if self.scheduler is not None or self.scheduler_options:
            swap_scheduler(pipeline, self.scheduler, **_parse_options(self.scheduler_options))

    def arguments(self, pipeline: "ClassConditionalPipeline") -> dict[str, Any]:
        """Arguments of the pipeline's call; ValueError if step_size does not fit the model's number of timesteps."""
        steps: dict[str, Any] = {"num_inference_steps": self.num_inference_steps or 100}
        if self.step_size is not None:
            steps = {"timesteps": original_timesteps(pipeline.scheduler.config.num_train_timesteps, self.step_size)}
        return steps | {name: getattr(self, name) for name in _CALL_ARGUMENTS}

    def title(self) -> str:
        """A few words that tell it from others in a chart, such as ``DDIM, 50 steps, guidance 2``."""
        words = [self.scheduler.removesuffix("Scheduler") if self.scheduler else "own scheduler"]
        words.append(f"step size {self.step_size}" if self.step_size else f"{self.num_inference_steps or 100} steps")
        words += self.scheduler_options
        if self.guidance_scale is not None and self.guidance_scale > 1:
            begin, end = self.guidance_interval
            interval = f" in [{begin:g}, {end:g}]" if (begin, end) != (0, 1) else ""
            if self.guidance_sigma_interval is not None:
                interval += " for sigma in ({:g}, {:g}]".format(*self.guidance_sigma_interval)
            words.append(f"guidance {self.guidance_scale:g}{interval}")
        if self.classifier_scale:
            words.append(f"classifier {self.classifier_scale:g}")
        if self.eta:
            words.append(f"eta {self.eta:g}")
        if self.clip_sample is not None:
            words.append("clipped" if self.clip_sample else "not clipped")
        return ", ".join(words)


def _parse_options(settings: list[str]) -> dict[str, Any]:
    """What ``NAME=VALUE`` settings say; values are YAML, so that numbers are numbers."""
    options = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            value = ""
        if not value:
            raise ValueError(f"scheduler_options has {setting!r}, but must be made of NAME=VALUE, such as S_churn=40")
    return options


def check_class_labels(labels: list[str], special: tuple[str, ...]) -> None:
    """Raises ValueError if there are none, or one of the special ones is not alone."""
    if not labels:
        raise ValueError(f"class_labels is empty: name classes, or {', or '.join(special)}")
    for name in special:
        if name in labels and len(labels) > 1:
            raise ValueError(f"class_labels names {name!r} among others, but it must stand alone")


@dataclass(kw_only=True)
class GenerateOptions(Sampler):
    """Options of `generate`. The help texts say what each one is."""

    model: str = _model(
        str(DIGITS),
        "Pipeline folder or Hub id (default: the handwritten digits that travel with this program).",
        metavar="MODEL",
    )
    dtype: str = _model("float32", "What the network computes in.", choices=["float32", "bfloat16", "float16"])
    device: str | None = _model(None, "Such as cpu, cuda, cuda:1, mps (default: the best there is).", metavar="DEVICE")
    batch_size: int = _model(64, "Images sampled at once, at least 1; it does not change them.", at_least=1)
    class_labels: list[str] = option(
        ["random"],
        "Classes by id or name; null is the null class, all is every class, random is num_images classes at random.",
        group="images",
        metavar="CLASS",
    )
    num_images_per_label: int = _images(
        1, "Images of each class, at least 1; those of one class follow one another.", at_least=1
    )
    num_images: int = _images(16, "How many images, each of another class, if class_labels is random.", at_least=1)
    seed: int = _images(0, "Seed of the first image, at least 0; the next one's is one more, and so on.", at_least=0)
    guidance_scale: float | None = option(
        None,
        "As in evaluate_models.py (default: 5 where the model has a null class, else 1).",
        group="sampling",
        at_least=0,
        below=math.inf,
    )
    output_dir: str = _output("outputs/samples", "Folder for images, grid, animation and manifest.", metavar="FOLDER")
    animation: bool = _output(True, "Write denoising.gif.")
    fps: float = _output(
        10.0, "Frames (steps) of the animation per second; above 0, at most 100.", above=0, at_most=100
    )
    columns: int | None = _output(None, "Images in a row of the grid (default: as the classes suggest).", at_least=1)

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        super().__post_init__()
        self.class_labels = [str(label) for label in self.class_labels]
        check_class_labels(self.class_labels, ("all", "random"))
