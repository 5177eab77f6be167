"""What the page is asked for: checked before anything is sampled, then sampled step by step while somebody watches."""

import dataclasses
import inspect
import math
import queue
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..pipelines.generation import class_caption, requested_class_ids, sample_images, to_pixels
from ..pipelines.generation_options import GenerateOptions
from ..pipelines.loading import scheduler_class, scheduler_names
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from .model_cache import ModelCache


OWN_SCHEDULER = "own"
NOTHING, TWO_SCHEDULERS, TWO_SCALES = "nothing", "two schedulers", "two guidance scales"
MAX_SEED = 2**32 - 1
_MAX_FRAMES = 100  # an animation of more would be too large to download
# What the controls of the page hold, by the names of `build_page`, as it comes from a browser: anything.
Form = Mapping[str, Any]
# Its number, how many there are, and the images after it: uint8, (images, height, width, channels).
Step = tuple[int, int, np.ndarray]
# What ends each request that is being sampled.
_running: set[Callable[[], None]] = set()


@dataclass
class Request:
    """One set of images to generate."""

    pipeline: ClassConditionalPipeline  # of this request alone but for its network, with the scheduler asked for
    options: GenerateOptions  # what generate_images.py would be told
    class_ids: list[int | None]  # of each image, None for the null class
    title: str  # what tells it from the other one in a comparison
    images: list[Image.Image] = dataclasses.field(default_factory=list)  # when all steps have been taken
    frames: list[np.ndarray] = dataclasses.field(default_factory=list)  # pixels of each step, or of every so many

    @property
    def captions(self) -> list[str]:
        """The class name of each image; empty for the null class."""
        return [class_caption(self.pipeline, class_id) for class_id in self.class_ids]

    def steps(self) -> Generator[Step, None, None]:
        """Samples in a thread of its own, which is never more than two steps ahead; CancelledError after `end_all`.

        When the iterator is closed or dropped, the thread ends with the step that it is in.
        """
        taken: queue.SimpleQueue[Step | BaseException | None] = queue.SimpleQueue()
        wanted, abandoned = threading.Semaphore(2), threading.Event()

        def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
            pixels, total = to_pixels(pipeline, tensors["latents"]), pipeline.num_timesteps
            # counted from the last one, which is always there
            if (total - 1 - step) % math.ceil(total / _MAX_FRAMES) == 0:
                self.frames.append(pixels)
            taken.put((step + 1, total, pixels))
            wanted.acquire()  # an iterator that nobody takes from holds the network back
            if abandoned.is_set():
                raise CancelledError

        def stop() -> None:
            abandoned.set()
            wanted.release()

        def work() -> None:
            arguments = (self.pipeline, self.options, self.class_ids, self.options.seed)
            try:
                self.images = sample_images(*arguments, callback_on_step_end=on_step_end)
                taken.put(None)
            except BaseException as error:
                taken.put(error)
            _running.discard(stop)

        _running.add(stop)
        # no daemon: an interpreter that ends under a thread in torch aborts
        threading.Thread(target=work, name="generation").start()
        try:
            while (step := taken.get()) is not None:
                if isinstance(step, BaseException):
                    raise step
                yield step
                wanted.release()
        finally:
            stop()


def end_all() -> None:
    """Ends the sampling of every request of this process with the step that it is in."""
    for stop in list(_running):
        stop()


def takes_eta(pipeline: ClassConditionalPipeline, scheduler: str) -> bool:
    """Whether eta has an effect with a scheduler of that name, or with the pipeline's own."""
    chosen = type(pipeline.scheduler) if scheduler == OWN_SCHEDULER else scheduler_class(scheduler)
    return "eta" in inspect.signature(chosen.step).parameters


def can_be_guided(pipeline: ClassConditionalPipeline) -> bool:
    """Whether guidance has an effect: there is a null class, or a guidance network."""
    return pipeline.null_class is not None or pipeline.guidance_unet is not None


def read_form(form: Form, models: ModelCache) -> list[Request]:
    """The set of images that a form asks for, or the two of a comparison; ValueError or OSError with a sentence."""
    form = {**form, **_numbers(form, models)}
    sides = [form]
    if form["compare"] == TWO_SCHEDULERS:
        sides.append({**form, "scheduler": form["other_scheduler"]})
    elif form["compare"] == TWO_SCALES:
        sides.append({**form, "guidance_scale": form["other_guidance_scale"]})
    elif form["compare"] != NOTHING:
        raise ValueError(f"Compare is {form['compare']!r}, but must be {NOTHING}, {TWO_SCHEDULERS} or {TWO_SCALES}")
    requests = [_read_side(side, models) for side in sides]
    evaluations = 0
    for each in requests:
        # a guided step takes two evaluations for each image, and one of a scheduler of second order again two
        factor = getattr(each.pipeline.scheduler, "order", 1) * (2 if (each.options.guidance_scale or 0) > 1 else 1)
        evaluations += len(each.class_ids) * form["num_inference_steps"] * factor
    if evaluations > models.options.max_evaluations:
        raise ValueError(
            f"This takes {evaluations:,} evaluations of the network, but a request may take"
            f" {models.options.max_evaluations:,}: ask for fewer images or steps, or less guidance"
        )
    return requests


def _numbers(form: Form, models: ModelCache) -> dict[str, float]:
    """The numbers of a form, checked."""
    ranges: dict[str, tuple[str, int, int, type]] = {
        "num_images_per_label": ("Images per class", 1, models.options.max_images, int),
        "seed": ("Seed", 0, MAX_SEED, int),
        "guidance_scale": ("Guidance scale", 0, 100, float),
        "num_inference_steps": ("Steps", 1, models.options.max_steps, int),
        "eta": ("Eta", 0, 1, float),
        "guidance_begin": ("Guidance begins", 0, 1, float),
        "guidance_end": ("Guidance ends", 0, 1, float),
    }
    if form["compare"] == TWO_SCALES:
        ranges["other_guidance_scale"] = ("Other guidance scale", 0, 100, float)
    for key, (name, low, high, kind) in ranges.items():
        value = form[key]
        if type(value) not in (int, float) or not low <= value <= high or kind(value) != value:
            found = "empty" if value in (None, "") else repr(value)[:100]
            whole = "whole " if kind is int else ""
            raise ValueError(f"{name} is {found}, but must be a {whole}number from {low} to {high}")
    return {key: kind(form[key]) for key, (*_, kind) in ranges.items()}


def _read_side(form: Form, models: ModelCache) -> Request:
    scheduler, max_images = form["scheduler"], models.options.max_images
    pipeline = models.pipeline(form["model"])
    if scheduler not in (OWN_SCHEDULER, *scheduler_names(pipeline.noise_kind)):
        raise ValueError(f"Scheduler is {scheduler!r}, which this model does not have: choose one of the list")
    labels = form["class_labels"] if pipeline.num_classes is not None else ["null"]
    if not isinstance(labels, list) or not labels:
        raise ValueError("Classes is empty: choose at least one class")
    plain = ("model", "num_images_per_label", "seed", "num_inference_steps")
    options = GenerateOptions(
        **{name: form[name] for name in plain},
        guidance_scale=form["guidance_scale"] if can_be_guided(pipeline) else 1.0,
        class_labels=labels,
        guidance_interval=[form["guidance_begin"], form["guidance_end"]],
        eta=form["eta"] if takes_eta(pipeline, scheduler) else 0.0,
        scheduler=None if scheduler == OWN_SCHEDULER else scheduler,
        dtype=models.options.dtype,
        device=models.device,
    )
    class_ids = requested_class_ids(pipeline, options)
    if len(class_ids) > max_images:
        raise ValueError(
            f"This is {len(class_ids):,} images, but a request may ask for {max_images}: choose fewer classes or"
            " fewer images per class"
        )
    title = f"{type(pipeline.scheduler).__name__} of the model" if scheduler == OWN_SCHEDULER else scheduler
    if form["compare"] == TWO_SCALES:
        title = f"guidance {options.guidance_scale:g}"
    options.prepare(pipeline)
    return Request(pipeline, options, class_ids, title)
