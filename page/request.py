"""What the page is asked for, checked before anything is sampled."""

import inspect
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..pipelines.generation import requested_class_ids
from ..pipelines.generation_options import GenerateOptions
from ..pipelines.loading import scheduler_class, scheduler_names
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..pipelines.sampler import Sampler
from .app_options import AppOptions
from .model_cache import ModelCache


OWN_SCHEDULER = "own"
NOTHING, TWO_SCHEDULERS, TWO_SCALES = "nothing", "two schedulers", "two guidance scales"
MAX_SEED = 2**32 - 1


class Form(NamedTuple):
    """What the controls of the page hold, in their order, as it comes from a browser: anything."""

    model: Any
    classes: Any
    images_per_class: Any
    seed: Any
    compare: Any
    other_scheduler: Any
    other_guidance_scale: Any
    guidance_scale: Any
    steps: Any
    scheduler: Any
    eta: Any
    guidance_begin: Any
    guidance_end: Any


@dataclass(frozen=True)
class Request:
    """One set of images to generate.

    Attributes:
        pipeline: Of this request alone but for its network, with the scheduler that is asked for.
        options: What generate_images.py would be told.
        class_ids: The class of each image, None for the null class.
        title: What tells it from the other one in a comparison.
    """

    pipeline: ClassConditionalPipeline
    options: GenerateOptions
    class_ids: list[int | None]
    title: str


def takes_eta(pipeline: ClassConditionalPipeline, scheduler: str) -> bool:
    """Whether eta has an effect with a scheduler of that name, or with the pipeline's own."""
    chosen = type(pipeline.scheduler) if scheduler == OWN_SCHEDULER else scheduler_class(scheduler)
    return "eta" in inspect.signature(chosen.step).parameters


def read_form(form: Form, models: ModelCache, limits: AppOptions) -> list[Request]:
    """The set of images that a form asks for, or the two of a comparison.

    Raises:
        ValueError: With a sentence for the person who filled it in.
        OSError: If the model cannot be had.
    """
    scheduler, scale = form.scheduler, _number("Guidance scale", form.guidance_scale, 0, 100)
    if form.compare == NOTHING:
        sides = [(scheduler, scale, "")]
    elif form.compare == TWO_SCHEDULERS:
        sides = [(each, scale, str(each)) for each in (scheduler, form.other_scheduler)]
    elif form.compare == TWO_SCALES:
        other = _number("Other guidance scale", form.other_guidance_scale, 0, 100)
        sides = [(scheduler, each, f"guidance {each:g}") for each in (scale, other)]
    else:
        raise ValueError(f"Compare is {form.compare!r}, but must be {NOTHING}, {TWO_SCHEDULERS} or {TWO_SCALES}")
    requests = [_read_side(form, models, limits, *side) for side in sides]

    evaluations = sum(map(_evaluations, requests))
    if evaluations > limits.max_evaluations:
        raise ValueError(
            f"This takes {evaluations:,} evaluations of the network, but a request may take"
            f" {limits.max_evaluations:,}: ask for fewer images or steps, or less guidance"
        )
    return requests


def _read_side(
    form: Form, models: ModelCache, limits: AppOptions, scheduler: str, guidance_scale: float, title: str
) -> Request:
    steps = _integer("Steps", form.steps, 1, limits.max_steps)
    per_class = _integer("Images per class", form.images_per_class, 1, limits.max_images)
    interval = [
        _number("Guidance begins", form.guidance_begin, 0, 1),
        _number("Guidance ends", form.guidance_end, 0, 1),
    ]
    if interval[0] > interval[1]:
        raise ValueError(
            f"Guidance begins at {interval[0]:g} and ends at {interval[1]:g}, but must end after it begins"
        )
    if scheduler != OWN_SCHEDULER and scheduler not in scheduler_names():
        raise ValueError(f"Scheduler is {scheduler!r}, which this page does not have: choose one of the list")

    pipeline = models.pipeline(form.model)
    has_classes = pipeline.unet.config.num_class_embeds is not None
    classes = form.classes if has_classes else ["null"]
    if not isinstance(classes, list) or not classes:
        raise ValueError("Classes is empty: choose at least one class")
    _check_number_of_images(len(classes) * per_class, limits)
    options = GenerateOptions(
        model=form.model,
        class_labels=classes,
        num_images_per_label=per_class,
        seed=_integer("Seed", form.seed, 0, MAX_SEED),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        guidance_interval=interval,
        eta=_number("Eta", form.eta, 0, 1) if takes_eta(pipeline, scheduler) else 0.0,
        scheduler=None if scheduler == OWN_SCHEDULER else scheduler,
        dtype=str(models.dtype).removeprefix("torch."),
        device=str(models.device),
    )
    class_ids = requested_class_ids(pipeline, options)
    _check_number_of_images(len(class_ids), limits)
    Sampler.from_options(options).prepare(pipeline)
    if title == OWN_SCHEDULER:
        title = f"{type(pipeline.scheduler).__name__} of the model"
    return Request(pipeline, options, class_ids, title)


def _check_number_of_images(number: int, limits: AppOptions) -> None:
    if number > limits.max_images:
        raise ValueError(
            f"This is {number:,} images, but a request may ask for {limits.max_images}: choose fewer classes, or fewer"
            " images per class"
        )


def _evaluations(request: Request) -> int:
    """How often the network is evaluated for an image, times the images; schedulers of second order do it twice."""
    options = request.options
    branches = 2 if options.guidance_scale > 1 and any(each is not None for each in request.class_ids) else 1
    steps = (options.num_inference_steps or 0) * getattr(request.pipeline.scheduler, "order", 1)
    return len(request.class_ids) * steps * branches


def _number(name: str, value: Any, low: float, high: float, whole: bool = False) -> float:
    wanted = f"but must be a {'whole ' if whole else ''}number from {low:g} to {high:.12g}"
    if value is None or value == "":
        raise ValueError(f"{name} is empty, {wanted}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {value!r}, {wanted}")
    if not math.isfinite(value) or not low <= value <= high or (whole and value != int(value)):
        raise ValueError(f"{name} is {value:.12g}, {wanted}")
    return float(value)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    return int(_number(name, value, low, high, whole=True))
