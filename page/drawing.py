"""Drawing the images of a request step by step, only as long as somebody takes the steps."""

import math
import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..pipelines.generation import to_pixels
from ..pipelines.sampler import Sampler
from .request import Request


# An animation of more would be larger than a person wants to download.
_MAX_FRAMES = 100


# Threads that draw, each with what ends it. An interpreter that ends under a thread in torch aborts.
_running: dict[threading.Thread, threading.Event] = {}


class AbandonedError(Exception):
    """Nobody takes the steps any more, or the process ends."""


@dataclass(frozen=True)
class Step:
    """The images after a step.

    Attributes:
        number: Which step, from 1.
        total: How many there are.
        pixels: uint8, (images, height, width, channels).
    """

    number: int
    total: int
    pixels: np.ndarray


class Drawing:
    """The images of a request.

    Attributes:
        request: What is drawn.
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
        """Draws, in a thread of its own that is never more than two steps ahead.

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
                    self._draw(give)
                    give(None)
                except AbandonedError:
                    raise
                except BaseException as error:
                    give(error)
            except AbandonedError:
                pass
            finally:
                del _running[threading.current_thread()]

        thread = threading.Thread(target=work, name="drawing", daemon=True)
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

    def _draw(self, give: Any) -> None:
        pipeline, options = self.request.pipeline, self.request.options

        def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
            pixels = to_pixels(pipeline, tensors["latents"])
            total = pipeline.num_timesteps
            # counted from the last one, which is always there
            if (total - 1 - step) % math.ceil(total / _MAX_FRAMES) == 0:
                self.frames.append(pixels)
            give(Step(step + 1, total, pixels))

        class_ids = self.request.class_ids
        output = pipeline(
            class_ids,
            generator=[torch.Generator().manual_seed(options.seed + i) for i in range(len(class_ids))],
            callback_on_step_end=on_step_end,
            **Sampler.from_options(options).arguments(pipeline),
        )
        self.images = output.images
        self.timesteps = [float(timestep) for timestep in pipeline.scheduler.timesteps]


def end_all() -> None:
    """Ends every drawing of this process with the step that it is in, and waits for that."""
    running = dict(_running)
    for abandoned in running.values():
        abandoned.set()
    for thread in running:
        thread.join()
