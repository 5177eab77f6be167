"""What a click on Generate does: checks, samples step by step while somebody watches, shows images and files."""

import itertools
import json
import math
import queue
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..pipelines.generation import (
    ANIMATION_NAME,
    GRID_NAME,
    MANIFEST_NAME,
    class_caption,
    make_manifest,
    sample_images,
    to_pixels,
)
from ..pipelines.generation_options import GenerateOptions
from ..pipelines.image_grid import image_grid, save_animation, to_image
from .app_options import AppOptions
from .markup import done, gallery, problem, progress, side_by_side
from .model_cache import ModelCache
from .request import Form, Request, read_form


FILE_NAMES = (GRID_NAME, ANIMATION_NAME, MANIFEST_NAME, "everything.zip")
_MAX_FRAMES = 100  # an animation of more would be too large to download
_SECONDS_BETWEEN_IMAGES = 0.15
# What ends each generation that is under way.
_running: set[Callable[[], None]] = set()


class Step(NamedTuple):
    """The images after denoising step ``number`` of ``total``: uint8, (images, height, width, channels)."""

    number: int
    total: int
    pixels: np.ndarray


class Generation:
    """The images of a request."""

    def __init__(self, request: Request):
        self.request = request
        # the class name of each image; empty for the null class
        self.captions = [class_caption(request.pipeline, class_id) for class_id in request.class_ids]
        self.images: list[Image.Image] = []  # when all steps have been taken
        self.frames: list[np.ndarray] = []  # the pixels of each step, or of every so many

    def steps(self) -> Generator[Step, None, None]:
        """Samples in a thread of its own, which is never more than two steps ahead; CancelledError after `end_all`.

        When the iterator is closed or dropped, the thread ends with the step that it is in.
        """
        taken: queue.SimpleQueue[Step | BaseException | None] = queue.SimpleQueue()
        wanted, abandoned = threading.Semaphore(2), threading.Event()

        def give(step: Step) -> None:
            taken.put(step)
            wanted.acquire()  # an iterator that nobody takes from holds the network back
            if abandoned.is_set():
                raise CancelledError

        def stop() -> None:
            abandoned.set()
            wanted.release()

        def work() -> None:
            try:
                self._sample(give)
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

    def _sample(self, give: Callable[[Step], None]) -> None:
        pipeline, options, class_ids = self.request.pipeline, self.request.options, self.request.class_ids

        def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
            pixels, total = to_pixels(pipeline, tensors["latents"]), pipeline.num_timesteps
            # counted from the last one, which is always there
            if (total - 1 - step) % math.ceil(total / _MAX_FRAMES) == 0:
                self.frames.append(pixels)
            give(Step(step + 1, total, pixels))

        self.images = sample_images(pipeline, options, class_ids, options.seed, callback_on_step_end=on_step_end)


def end_all() -> None:
    """Ends every generation of this process with the step that it is in."""
    for stop in list(_running):
        stop()


class View(NamedTuple):
    """What the page shows next: HTML of status and images, and the files to download; None leaves them as they are."""

    status: str
    images: str | None
    files: list[Path] | None  # which are copied before the next view is asked for


def generate(form: Form, models: ModelCache, limits: AppOptions) -> Generator[View, None, None]:
    """Samples what a form asks for. Whatever goes wrong is shown, and nothing is raised."""
    # before it begins, those of the request before stay
    images: str | None = None
    files: list[Path] | None = None
    try:
        generations = [Generation(request) for request in read_form(form, models, limits)]
        started = shown = time.monotonic()
        latest: list[Step] = []
        with ExitStack() as stack:
            iterators = [stack.enter_context(closing(each.steps())) for each in generations]
            for steps in itertools.zip_longest(*iterators):
                # one that has come to its end stays as it is
                latest = [new or old for new, old in itertools.zip_longest(steps, latest)]
                if time.monotonic() - shown >= _SECONDS_BETWEEN_IMAGES or latest[0].number == 1:
                    shown, (number, total, _) = time.monotonic(), max(latest, key=lambda step: step.total)
                    images, files = _galleries(generations, latest, finished=False), []
                    yield View(progress(number, total), images, files)
        number, seconds = sum(len(each.images) for each in generations), time.monotonic() - started
        said = f"{number} image{'s' if number > 1 else ''} in {seconds:.1f} seconds"
        images = _galleries(generations, latest, finished=True)
        with tempfile.TemporaryDirectory(prefix="imagenet64-") as folder:
            options = [each.request.options for each in generations]
            yield View(done(said, options), images, write_files(generations, Path(folder)))
        return
    except CancelledError:
        return
    except (ValueError, OSError) as error:
        sentence = str(error)
    except Exception as error:
        # what the person cannot mend is for whoever serves the page to read
        traceback.print_exc()
        sentence = f"Sampling failed ({type(error).__name__}): whoever serves this page finds more in its log"
    yield View(problem(sentence), images, files)


def _galleries(generations: Sequence[Generation], latest: Sequence[Step], finished: bool) -> str:
    galleries = [
        gallery(step.pixels, each.captions, each.request.options.seed, finished, beside=len(generations) > 1)
        for step, each in zip(latest, generations, strict=True)
    ]
    return side_by_side(galleries, [each.request.title for each in generations])


def write_files(generations: Sequence[Generation], folder: Path) -> list[Path]:
    """Writes the files of `FILE_NAMES` for one finished generation, or for two side by side."""
    everything = folder / "everything"
    manifests: dict[str, dict[str, Any]] = {}
    animations: list[list[Image.Image]] = []
    for name, each in zip((".",) if len(generations) == 1 else ("left", "right"), generations, strict=True):
        pipeline, options, class_ids = each.request.pipeline, each.request.options, each.request.class_ids
        manifests[name] = make_manifest(pipeline, options, class_ids)
        animations.append([image_grid(list(map(to_image, frame)), each.captions) for frame in each.frames])
        (everything / name).mkdir(parents=True)
        for image, entry in zip(each.images, manifests[name]["images"], strict=True):
            image.save(everything / name / entry["file"])
        _write_shared_files(everything / name, animations[-1], manifests[name])
    with zipfile.ZipFile(folder / FILE_NAMES[-1], "w") as archive:
        for file in filter(Path.is_file, everything.rglob("*")):
            archive.write(file, file.relative_to(everything))
    if len(generations) == 1:
        return [*(everything / name for name in FILE_NAMES[:-1]), folder / FILE_NAMES[-1]]

    # frame i of the longest one, and what the other one has come to by then
    length, titles = max(map(len, animations)), [each.request.title for each in generations]
    pairs = ([own[max(0, (i + 1) * len(own) // length - 1)] for own in animations] for i in range(length))
    _write_shared_files(folder, [image_grid(pair, titles, columns=2) for pair in pairs], manifests)
    return [folder / name for name in FILE_NAMES]


def _write_shared_files(folder: Path, frames: list[Image.Image], manifest: dict[str, Any]) -> None:
    frames[-1].save(folder / GRID_NAME)
    save_animation(frames, folder / ANIMATION_NAME, GenerateOptions.fps)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
