"""What a click on Generate does: checks, samples step by step while somebody watches, shows images and files."""

import itertools
import math
import queue
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..pipelines.generation import to_pixels
from ..pipelines.sampler import Sampler
from .app_options import AppOptions
from .downloads import captions, write_downloads
from .markup import done, gallery, note, problem, progress, side_by_side
from .model_cache import ModelCache
from .request import Form, Request, read_form


_MAX_FRAMES = 100  # an animation of more would be too large to download
_SECONDS_BETWEEN_IMAGES = 0.15
# Threads that sample, each with what ends it. An interpreter that ends under a thread in torch aborts.
_running: dict[threading.Thread, threading.Event] = {}


class AbandonedError(Exception):
    """Nobody takes the steps any more, or the process ends."""


@dataclass(frozen=True)
class Step:
    """The images after denoising step ``number`` of ``total``: uint8, (images, height, width, channels)."""

    number: int
    total: int
    pixels: np.ndarray


class Generation:
    """The images of a request.

    Attributes:
        request: What is sampled.
        images: The images, when all steps have been taken.
        frames: What they looked like after each step, or every so many: uint8, (images, height, width, channels).
        timesteps: What the scheduler stepped over.
    """

    def __init__(self, request: Request):
        self.request = request
        self.images: list[Image.Image] = []
        self.frames: list[np.ndarray] = []
        self.timesteps: list[float] = []

    def steps(self) -> Generator[Step, None, None]:
        """Samples in a thread of its own, which is never more than two steps ahead.

        When the iterator is closed or dropped, the thread ends with the step that it is in.

        Raises:
            ValueError: What the pipeline raises where the options do not fit together.
            AbandonedError: After `end_all`.
        """
        # of one place: an iterator that nobody takes from holds the network back
        taken: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=1)
        abandoned = threading.Event()

        def give(what: Step | BaseException | None) -> None:
            while not abandoned.is_set():
                try:
                    return taken.put(what, timeout=0.1)
                except queue.Full:
                    continue
            raise AbandonedError

        def work() -> None:
            try:
                try:
                    self._sample(give)
                    give(None)
                except Exception as error:
                    give(error)
            except AbandonedError:
                pass
            finally:
                del _running[threading.current_thread()]

        thread = threading.Thread(target=work, name="generation", daemon=True)
        _running[thread] = abandoned
        thread.start()
        try:
            while True:
                try:
                    step = taken.get(timeout=0.5)
                except queue.Empty:
                    if abandoned.is_set():
                        raise AbandonedError from None
                    continue
                if step is None:
                    return
                if isinstance(step, BaseException):
                    raise step
                yield step
        finally:
            abandoned.set()

    def _sample(self, give: Any) -> None:
        pipeline, options, class_ids = self.request.pipeline, self.request.options, self.request.class_ids

        def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
            pixels, total = to_pixels(pipeline, tensors["latents"]), pipeline.num_timesteps
            # counted from the last one, which is always there
            if (total - 1 - step) % math.ceil(total / _MAX_FRAMES) == 0:
                self.frames.append(pixels)
            give(Step(step + 1, total, pixels))

        self.images = pipeline(
            class_ids,
            generator=[torch.Generator().manual_seed(options.seed + i) for i in range(len(class_ids))],
            callback_on_step_end=on_step_end,
            **Sampler.from_options(options).arguments(pipeline),
        ).images
        self.timesteps = [float(timestep) for timestep in pipeline.scheduler.timesteps]


def end_all() -> None:
    """Ends every generation of this process with the step that it is in, and waits for that."""
    running = dict(_running)
    for abandoned in running.values():
        abandoned.set()
    for thread in running:
        thread.join()


@dataclass(frozen=True)
class View:
    """What the page shows next, each whole: HTML of status and images, and the downloads; None leaves a part as it is.

    The files are copied before the next view is asked for; an empty list takes those before away.
    """

    status: str
    images: str | None = None
    files: list[Path] | None = None


def generate(form: Form, models: ModelCache, limits: AppOptions) -> Generator[View, None, None]:
    """Samples what a form asks for. Whatever goes wrong is shown, and nothing is raised."""
    view = None
    try:
        with closing(_generate(form, models, limits)) as views:
            for view in views:
                yield view
        return
    except AbandonedError:
        return
    except (ValueError, OSError) as error:
        sentence = str(error)
    except Exception as error:
        # what the person cannot mend is for whoever serves the page to read
        traceback.print_exc(file=sys.stderr)
        sentence = f"Sampling failed ({type(error).__name__}): whoever serves this page finds more in its log"
    # before it began, images and files of the request before stay
    yield View(problem(sentence)) if view is None else View(problem(sentence), view.images, files=[])


def _generate(form: Form, models: ModelCache, limits: AppOptions) -> Generator[View, None, None]:
    generations = [Generation(request) for request in read_form(form, models, limits)]
    titles = [each.request.title for each in generations]
    started = shown = time.monotonic()

    def images(steps: list[Step], finished: bool) -> str:
        beside = len(generations) > 1
        galleries = [
            gallery(step.pixels, captions(each), each.request.options.seed, finished, beside)
            for step, each in zip(steps, generations, strict=True)
        ]
        return side_by_side(galleries, titles)

    steps: list[Step] = []
    with ExitStack() as stack:
        for steps in _together([stack.enter_context(closing(each.steps())) for each in generations]):
            if time.monotonic() - shown >= _SECONDS_BETWEEN_IMAGES or steps[0].number == 1:
                shown = time.monotonic()
                furthest = max(steps, key=lambda step: step.total)
                yield View(progress(furthest.number, furthest.total), images(steps, finished=False), files=[])
    seconds = time.monotonic() - started

    final = images(steps, finished=True)
    yield View(note("writing the files"), final, files=[])
    number = sum(len(each.images) for each in generations)
    said = f"{number} image{'s' if number > 1 else ''} in {seconds:.1f} seconds"
    with tempfile.TemporaryDirectory(prefix="imagenet64-") as folder:
        files = write_downloads(generations, Path(folder))
        yield View(done(said, [each.request.options for each in generations]), final, files)


def _together(iterators: Sequence[Iterator[Step]]) -> Iterator[list[Step]]:
    """The steps of several generations, of each the one that it has come to."""
    current: list[Step | None] = [None] * len(iterators)
    for steps in itertools.zip_longest(*iterators):
        current = [new or old for new, old in zip(steps, current, strict=True)]
        yield [step for step in current if step is not None]
