"""What a click on Generate does: reads the form, shows images while they are sampled, and writes files."""

import itertools
import json
import tempfile
import time
import traceback
import zipfile
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..pipelines.generation import ANIMATION_NAME, GRID_NAME, MANIFEST_NAME, make_manifest
from ..pipelines.generation_options import GenerateOptions
from ..pipelines.image_grid import image_grid, save_animation, to_image
from .markup import done, gallery, note, progress
from .model_cache import ModelCache
from .request import Form, Request, Step, read_form


FILE_NAMES = (GRID_NAME, ANIMATION_NAME, MANIFEST_NAME, "everything.zip")
_SECONDS_BETWEEN_IMAGES = 0.15


class View(NamedTuple):
    """What the page shows next: HTML of status and images, and the files to download; None leaves them as they are."""

    status: str
    images: str | None
    files: list[Path] | None  # which are copied before the next view is asked for


def generate(form: Form, models: ModelCache) -> Generator[View, None, None]:
    """Samples what a form asks for. Whatever goes wrong is shown, and nothing is raised."""
    # before it begins, those of the request before stay
    images: str | None = None
    files: list[Path] | None = None
    try:
        requests = read_form(form, models)
        started = shown = time.monotonic()
        latest: list[Step] = []
        with ExitStack() as stack:
            iterators = [stack.enter_context(closing(each.steps())) for each in requests]
            for steps in itertools.zip_longest(*iterators):
                # one that has come to its end stays as it is
                latest = [new or old for new, old in itertools.zip_longest(steps, latest)]
                if time.monotonic() - shown >= _SECONDS_BETWEEN_IMAGES or latest[0][0] == 1:
                    shown, (number, total, _) = time.monotonic(), max(latest, key=lambda step: step[1])
                    images, files = _galleries(requests, latest, finished=False), []
                    yield View(progress(number, total), images, files)
        number, seconds = sum(len(each.images) for each in requests), time.monotonic() - started
        said = f"{number} image{'s' if number > 1 else ''} in {seconds:.1f} seconds"
        images = _galleries(requests, latest, finished=True)
        with tempfile.TemporaryDirectory(prefix="imagenet64-") as folder:
            status = done(said, [each.options for each in requests])
            yield View(status, images, write_files(requests, Path(folder)))
        return
    except CancelledError:
        return
    except (ValueError, OSError) as error:
        sentence = str(error)
    except Exception as error:
        # what the person cannot mend is for whoever serves the page to read
        traceback.print_exc()
        sentence = f"Sampling failed ({type(error).__name__}): whoever serves this page finds more in its log"
    yield View(note(sentence, is_problem=True), images, files)


def _galleries(requests: Sequence[Request], latest: Sequence[Step], finished: bool) -> str:
    shown, are_two = "", len(requests) > 1
    for (_, _, pixels), each in zip(latest, requests, strict=True):
        shown += gallery(pixels, each.captions, each.options.seed, finished, each.title if are_two else "")
    return f'<div class="sides">{shown}</div>' if are_two else shown


def write_files(requests: Sequence[Request], folder: Path) -> list[Path]:
    """Writes the files of `FILE_NAMES` for one sampled request, or for two side by side."""
    everything = folder / "everything"
    manifests: dict[str, dict[str, Any]] = {}
    animations: list[list[Image.Image]] = []
    for name, each in zip((".",) if len(requests) == 1 else ("left", "right"), requests, strict=True):
        manifests[name] = make_manifest(each.pipeline, each.options, each.class_ids)
        animations.append([image_grid(list(map(to_image, frame)), each.captions) for frame in each.frames])
        (everything / name).mkdir(parents=True)
        for image, entry in zip(each.images, manifests[name]["images"], strict=True):
            image.save(everything / name / entry["file"])
        _write_shared_files(everything / name, animations[-1], manifests[name])
    with zipfile.ZipFile(folder / FILE_NAMES[-1], "w") as archive:
        for file in filter(Path.is_file, everything.rglob("*")):
            archive.write(file, file.relative_to(everything))
    if len(requests) == 1:
        return [*(everything / name for name in FILE_NAMES[:-1]), folder / FILE_NAMES[-1]]

    # frame i of the longest one, and what the other one has come to by then
    length, titles = max(map(len, animations)), [each.title for each in requests]
    pairs = ([own[max(0, (i + 1) * len(own) // length - 1)] for own in animations] for i in range(length))
    _write_shared_files(folder, [image_grid(pair, titles, columns=2) for pair in pairs], manifests)
    return [folder / name for name in FILE_NAMES]


def _write_shared_files(folder: Path, frames: list[Image.Image], manifest: dict[str, Any]) -> None:
    frames[-1].save(folder / GRID_NAME)
    save_animation(frames, folder / ANIMATION_NAME, GenerateOptions.fps)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
