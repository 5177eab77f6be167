"""Features of many images, in parts that are files: several processes share the work, and any of them may be killed.

A part is a stretch of images, ``{start}-{stop}.npz``, which appears whole or not at all. What has no part yet is cut
into batches and shared out; it does not matter how many processes there are, or were before. Memory holds one batch.
On the disk an image takes 4 bytes for each feature and for each class that the network tells apart: 12 kB with the
Inception of ``clean``, 0.6 GB for 50,000 images. Where images are kept, their pixels come on top.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..utils.atomic_write import atomic_file
from ..utils.distributed import on_every_process
from .extractors import FeatureExtractor


_PART = re.compile(r"(\d+)-(\d+)\.npz")
# tells the other processes that one of them cannot go on
_FAILED_NAME = "failed"


class Images(Protocol):
    """Images by their number, such as `images.ImageBatches` and `drawing.ModelImages`.

    Attributes:
        image_size: (channels, height, width) of every image.
    """

    image_size: tuple[int, int, int]

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """uint8 (stop - start, channels, height, width), and labels, int64 (stop - start,), or None."""
        ...


def extract_parts(
    images: Images,
    extractor: FeatureExtractor,
    folder: Path,
    *,
    batch_size: int,
    keep_pixels: bool,
    state: PartialState,
) -> None:
    """Sees to it that every image is in a part.

    Args:
        images: The images.
        extractor: What they are measured with.
        folder: Where the parts are, the same for all processes. It exists, and what is in it was made of the same
            images with an extractor of the same protocol.
        batch_size: Images at a time, for each process.
        keep_pixels: Whether the parts hold the images too.
        state: The processes that share the work; all of them call this.

    Raises:
        ValueError: If images cannot be read or drawn, or give features that are not finite.
        OSError: If a part cannot be written.
    """
    failed = folder / _FAILED_NAME
    if state.is_main_process:
        failed.unlink(missing_ok=True)
    state.wait_for_everyone()
    batches = list(missing_batches(find_parts(folder), len(images), batch_size))
    # nobody writes before everybody has looked
    state.wait_for_everyone()
    mine = batches[state.process_index :: state.num_processes]
    done = len(images) - sum(stop - start for start, stop in batches)

    def extract_mine() -> None:
        with tqdm(
            total=len(images),
            initial=done,
            desc="measuring",
            unit="image",
            # a file, such as a job's, gets a line now and then
            mininterval=0.1 if sys.stderr.isatty() else 10,
            disable=not state.is_main_process,
        ) as progress_bar:
            for start, stop in mine:
                if state.num_processes > 1 and failed.exists():
                    return
                try:
                    _extract_part(images, extractor, folder, start, stop, keep_pixels)
                except Exception:
                    if state.num_processes > 1:
                        failed.touch()
                    raise
                # the others do as much in the same time
                progress_bar.update(min((stop - start) * state.num_processes, len(images) - progress_bar.n))

    on_every_process(state, extract_mine)


def _extract_part(
    images: Images, extractor: FeatureExtractor, folder: Path, start: int, stop: int, keep_pixels: bool
) -> None:
    try:
        pixels, labels = images.read(start, stop)
        features = extractor(pixels)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the device's memory is too small for {stop - start} images at a time: give a smaller batch_size"
        ) from error
    arrays: dict[str, Any] = {"features": features.features.float().cpu().numpy()}
    if features.probabilities is not None:
        arrays["probabilities"] = features.probabilities.float().cpu().numpy()
    if labels is not None:
        arrays["labels"] = labels.numpy()
    if keep_pixels:
        arrays["pixels"] = pixels.cpu().numpy()
    try:
        with atomic_file(folder / f"{start:09d}-{stop:09d}.npz") as writing:
            np.savez(writing, **arrays)
    except OSError as error:
        raise OSError(f"{error}; what has been measured stays, and the same call goes on") from error


def find_parts(folder: Path) -> list[tuple[int, int, Path]]:
    """The parts in a folder, (start, stop, file), in the order of their images."""
    found = []
    for file in folder.iterdir():
        match = _PART.fullmatch(file.name)
        if match:
            found.append((int(match[1]), int(match[2]), file))
    return sorted(found)


def missing_batches(parts: list[tuple[int, int, Path]], num_images: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Stretches of at most batch_size images that no part holds.

    Args:
        parts: As `find_parts` gives them.
        num_images: How many images there are.
        batch_size: At least 1.

    Returns:
        (start, stop) of each, in their order.
    """
    position = 0
    for start, stop in [*((start, stop) for start, stop, _ in parts), (num_images, num_images)]:
        while position < start:
            end = min(position + batch_size, start)
            yield position, end
            position = end
        position = max(position, stop)


def read_parts(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of each part, in the order of the images, each of which comes once.

    Parts may overlap: when of several processes one alone is killed, the others may still write a last part while the
    next run has begun with batches of another size.

    Raises:
        ValueError: If an image is in no part.
    """
    position = 0
    for start, stop, file in find_parts(folder):
        if start > position:
            raise ValueError(f"{folder} has no part with image {position}: remove it and measure again")
        if stop <= position:
            continue
        with np.load(file, allow_pickle=False) as arrays:
            yield {name: arrays[name][position - start :] for name in arrays.files}
        position = stop
