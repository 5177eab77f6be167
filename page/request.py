"""What the page is asked for, checked before anything is sampled."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..pipelines.generation import requested_class_ids
from ..pipelines.generation_options import GenerateOptions
from ..pipelines.loading import scheduler_class, scheduler_names
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from .app_options import AppOptions
from .model_cache import ModelCache


OWN_SCHEDULER = "own"
NOTHING, TWO_SCHEDULERS, TWO_SCALES = "nothing", "two schedulers", "two guidance scales"
MAX_SEED = 2**32 - 1
# What the controls of the page hold, by the names of `build_page`, as it comes from a browser: anything.
Form = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """One set of images to generate."""

    pipeline: ClassConditionalPipeline  # of this request alone but for its network, with the scheduler asked for
    options: GenerateOptions  # what generate_images.py would be told
    class_ids: list[int | None]  # of each image, None for the null class
    title: str  # what tells it from the other one in a comparison
    evaluations: int  # of the network for an image, times the images


def takes_eta(pipeline: ClassConditionalPipeline, scheduler: str) -> bool:
    """Whether eta has an effect with a scheduler of that name, or with the pipeline's own."""
    chosen = type(pipeline.scheduler) if scheduler == OWN_SCHEDULER else scheduler_class(scheduler)
    return "eta" in inspect.signature(chosen.step).parameters


def read_form(form: Form, models: ModelCache, limits: AppOptions) -> list[Request]:
    """The set of images that a form asks for, or the two of a comparison.

    ValueError or OSError if that cannot be, with a sentence for the person who filled it in.
    """
    form = {**form, **_numbers(form, limits)}
    sides = [form]
    if form["compare"] == TWO_SCHEDULERS:
        sides.append({**form, "scheduler": form["other_scheduler"]})
    elif form["compare"] == TWO_SCALES:
        sides.append({**form, "guidance_scale": form["other_guidance_scale"]})
    elif form["compare"] != NOTHING:
        raise ValueError(f"Compare is {form['compare']!r}, but must be {NOTHING}, {TWO_SCHEDULERS} or {TWO_SCALES}")
    requests = [_read_side(side, models, limits) for side in sides]
    evaluations = sum(request.evaluations for request in requests)
    if evaluations > limits.max_evaluations:
        raise ValueError(
            f"This takes {evaluations:,} evaluations of the network, but a request may take"
            f" {limits.max_evaluations:,}: ask for fewer images or steps, or less guidance"
        )
    return requests


def _numbers(form: Form, limits: AppOptions) -> dict[str, float]:
    """The numbers of a form, checked."""
    ranges: dict[str, tuple[str, int, int, type]] = {
        "num_images_per_label": ("Images per class", 1, limits.max_images, int),
        "seed": ("Seed", 0, MAX_SEED, int),
        "guidance_scale": ("Guidance scale", 0, 100, float),
        "num_inference_steps": ("Steps", 1, limits.max_steps, int),
        "eta": ("Eta", 0, 1, float),
        "guidance_begin": ("Guidance begins", 0, 1, float),
        "guidance_end": ("Guidance ends", 0, 1, float),
    }
    if form["compare"] == TWO_SCALES:
        ranges["other_guidance_scale"] = ("Other guidance scale", 0, 100, float)
    for key, (name, low, high, kind) in ranges.items():
        value = form[key]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or kind(value) != value:
            found = "empty" if value in (None, "") else repr(value)[:100]
            whole = "whole " if kind is int else ""
            raise ValueError(f"{name} is {found}, but must be a {whole}number from {low} to {high}")
    return {key: kind(form[key]) for key, (*_, kind) in ranges.items()}


def _read_side(form: Form, models: ModelCache, limits: AppOptions) -> Request:
    scheduler = form["scheduler"]
    if scheduler not in (OWN_SCHEDULER, *scheduler_names()):
        raise ValueError(f"Scheduler is {scheduler!r}, which this page does not have: choose one of the list")
    pipeline = models.pipeline(form["model"])
    labels = form["class_labels"] if pipeline.unet.config.num_class_embeds is not None else ["null"]
    if not isinstance(labels, list) or not labels:
        raise ValueError("Classes is empty: choose at least one class")
    plain = ("model", "num_images_per_label", "seed", "num_inference_steps", "guidance_scale")
    options = GenerateOptions(
        **{name: form[name] for name in plain},
        class_labels=labels,
        guidance_interval=[form["guidance_begin"], form["guidance_end"]],
        eta=form["eta"] if takes_eta(pipeline, scheduler) else 0.0,
        scheduler=None if scheduler == OWN_SCHEDULER else scheduler,
        dtype=models.dtype,
        device=models.device,
    )
    class_ids: list[int | None] = []
    number = len(labels) * options.num_images_per_label
    if number <= limits.max_images:  # else there may be millions of classes to look up
        class_ids = requested_class_ids(pipeline, options)
        number = len(class_ids)
    if number > limits.max_images:
        raise ValueError(
            f"This is {number:,} images, but a request may ask for {limits.max_images}: choose fewer classes, or fewer"
            " images per class"
        )
    title = f"{type(pipeline.scheduler).__name__} of the model" if scheduler == OWN_SCHEDULER else scheduler
    if form["compare"] == TWO_SCALES:
        title = f"guidance {options.guidance_scale:g}"
    options.prepare(pipeline)
    # a guided step takes two evaluations for each image, and one of a scheduler of second order again two
    evaluations = number * form["num_inference_steps"] * getattr(pipeline.scheduler, "order", 1)
    return Request(pipeline, options, class_ids, title, evaluations * (2 if options.guidance_scale > 1 else 1))
