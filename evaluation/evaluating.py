"""Evaluating images, real ones or those that a model generates: features in parts, by many ranks, and a folder."""

import contextlib
import datetime
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm

from ..pipelines.sampler import Sampler
from ..utils.atomic_write import atomic_file, only_writer
from ..utils.distributed import on_every_process, on_main_process
from ..version import __version__
from .evaluation_folder import (
    PARTS_NAME,
    STATISTICS_NAME,
    Evaluation,
    evenly_spread,
    find_parts,
    missing_batches,
    write_evaluation,
    write_json,
)
from .extractors import FeatureExtractor, make_extractor
from .images import RESIZE_FILTER, GeneratedImages, count_classes, find_revision, open_images
from .options import ExtractionOptions, ModelOptions, ReferenceOptions
from .protocols import COMPARED_ENTRIES


_SETTINGS_NAME = "settings.json"
# tells the other ranks that one of them cannot go on
_FAILED_NAME = "failed"
# names and places, beside which stand digests of what is there
_NAMES = ("source", "model")
_RESUME = "what has been evaluated stays, and the same call resumes"


class Images(Protocol):
    """Images by their number, such as `images.ImageBatches` and `images.GeneratedImages`.

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


@contextlib.contextmanager
def distributed_state(device: str | None = None) -> Iterator[PartialState]:
    """The ranks that accelerate has started; on the CPU where that is asked for."""
    # one rank may have the last batch of an hour while the others wait for it
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7)).to_kwargs()
    state = PartialState(cpu=device == "cpu", **patience)
    yield state
    # not on an error, of which the others may not know yet
    if state.num_processes > 1:
        state.destroy_process_group()


def evaluate_reference(options: ReferenceOptions) -> Path:
    """Evaluates real images and returns the folder.

    Raises:
        ValueError: If the images cannot be read, or do not fit the protocol, or the folder holds something else.
        OSError: If something cannot be read or written, or another process evaluates into the same folder.
    """
    with distributed_state(options.device) as state:
        images = on_every_process(
            state, lambda: open_images(options.source, options.split, options.resolution, options.color_mode)
        )
        chosen = _EvenlySpread(images, options.max_images or len(images))
        facts = {
            "source": options.source,
            "split": options.split,
            "resolution": options.resolution,
            "resize_filter": None if options.resolution is None else RESIZE_FILTER,
            # of a folder of images all files are read for it, once for all ranks
            "fingerprint": on_main_process(state, lambda: images.fingerprint),
            "image_size": list(images.image_size),
            "of": len(images),
            "num_images": len(chosen),
        }
        return evaluate(chosen, facts, options, state)


def evaluate_model(
    options: ModelOptions,
    state: PartialState | None = None,
    extractor: FeatureExtractor | None = None,
    quiet: bool = False,
    revision: str | None = None,
) -> Path:
    """Generates images with a model, evaluates them and returns the folder.

    Args:
        options: What to generate and to evaluate, and how.
        state: The ranks that share the work; by default those that accelerate has started.
        extractor: That of the options, if it has been made already.
        quiet: Whether to print nothing at the end.
        revision: Commit of the Hub repository; by default the latest one.

    Raises:
        ValueError: If the settings do not fit the model or the protocol, or the folder holds something else.
        OSError: If something cannot be read or written, or another process evaluates into the same folder.
    """
    if state is None:
        with distributed_state(options.device) as state:
            return evaluate_model(options, state, extractor, quiet, revision)
    # one for all ranks, whatever is pushed meanwhile
    commit = revision or on_main_process(state, lambda: find_revision(options.model))

    def open_model() -> GeneratedImages:
        return GeneratedImages(
            options.model,
            Sampler.from_options(options),
            options.num_images,
            class_labels=options.class_labels,
            class_counts=None if options.train_data_dir is None else count_classes(options.train_data_dir),
            seed=options.seed,
            device=options.device or state.device,
            dtype=getattr(torch, options.dtype),
            revision=commit,
        )

    images = on_every_process(state, open_model)
    return evaluate(images, images.description, options, state, options.keep_images, extractor, quiet)


def open_extractor(options: ExtractionOptions, channels: int, state: PartialState) -> FeatureExtractor:
    """The extractor that the options name, in every rank; ``channels`` is what the images have."""
    own_channels = {"channels": channels} if options.protocol == "pixels" and channels not in (1, 3) else {}

    def make() -> FeatureExtractor:
        return make_extractor(
            options.protocol,
            weights=options.weights,
            device=options.device or state.device,
            dtype=options.extractor_dtype,
            batch_size=options.batch_size,
            **own_channels,
        )

    return on_every_process(state, make)


def evaluate(
    images: Images,
    facts: Mapping[str, Any],
    options: ExtractionOptions,
    state: PartialState,
    keep_images: str | None = None,
    extractor: FeatureExtractor | None = None,
    quiet: bool = False,
) -> Path:
    """Evaluates images, or resumes that, or finds that it has been done; returns the folder.

    One run at a time evaluates into a folder; it may have several ranks.

    Args:
        images: The images.
        facts: All that they depend on, as JSON values.
        options: How to evaluate.
        state: The ranks that share the work.
        keep_images: See `ModelOptions`.
        extractor: That of the options, if it has been made already.
        quiet: Whether to print nothing at the end.

    Raises:
        ValueError: If the images do not fit the protocol, or the folder has something else, which stays as it is.
        OSError: If something cannot be written, or another process evaluates into the folder.
    """
    folder = Path(options.output_dir)
    extractor = extractor or open_extractor(options, images.image_size[0], state)
    names = None if extractor.id2label is None else {str(key): name for key, name in extractor.id2label.items()}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "numpy": np.__version__}
    header = {
        "protocol": {**extractor.header, "id2label": names},
        "images": json.loads(json.dumps(facts)),
        "kept": {"features": min(options.num_features, len(images)), "images": keep_images},
        "versions": {"imagenet64_diffusion": __version__, **versions},
    }
    with contextlib.ExitStack() as stack:

        def begin() -> bool:
            if keep_images == "png" and images.image_size[0] not in (1, 3, 4):
                raise ValueError(f"keep_images is png, which cannot hold {images.image_size[0]} channels: take npz")
            stack.enter_context(only_writer(folder))
            return _is_finished(folder, header)

        def finish() -> None:
            try:
                write_evaluation(folder, header, len(images), options.num_features, keep_images)
            except OSError as error:
                reason = error if error.errno is None else f"could not write {folder} ({error.strerror})"
                raise OSError(f"{reason}; {_RESUME}") from error

        done = on_main_process(state, begin)
        if not done:
            if state.is_main_process:
                stack.callback(_remove_if_nothing_was_done, folder)
            extract_parts(images, extractor, folder / PARTS_NAME, options.batch_size, keep_images is not None, state)
            on_main_process(state, finish)
    if state.is_main_process and not quiet:
        what = "evaluated already" if done else f"evaluated {len(images):,} images with {options.protocol}"
        print(f"{what}: {folder}")
    return folder


def extract_parts(
    images: Images,
    extractor: FeatureExtractor,
    folder: Path,
    batch_size: int,
    keep_pixels: bool,
    state: PartialState,
) -> None:
    """Sees to it that every image is in a part; what has none is cut into batches and shared out.

    Args:
        images: The images.
        extractor: What makes their features.
        folder: Where the parts are, the same for all ranks. What is in it was made of the same images by the same
            protocol, by however many ranks.
        batch_size: Images at a time, for each rank; memory holds one batch.
        keep_pixels: Whether the parts hold the images too.
        state: The ranks that share the work; all of them call this.

    Raises:
        ValueError: If images cannot be read or generated, or give features that are not finite.
        OSError: If a part cannot be written.
    """
    failed = folder / _FAILED_NAME
    if state.is_main_process:
        failed.unlink(missing_ok=True)
    state.wait_for_everyone()
    batches = list(missing_batches(find_parts(folder), len(images), batch_size))
    # nobody writes before everybody has looked
    state.wait_for_everyone()
    done = len(images) - sum(stop - start for start, stop in batches)

    def extract_mine() -> None:
        with tqdm(
            total=len(images),
            initial=done,
            desc="evaluating",
            unit="image",
            # a file, such as a job's, gets a line now and then
            mininterval=0.1 if sys.stderr.isatty() else 10,
            disable=not state.is_main_process,
        ) as progress_bar:
            for start, stop in batches[state.process_index :: state.num_processes]:
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
        features, probabilities = extractor(pixels)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the device's memory is too small for {stop - start} images at a time: give a smaller batch_size"
        ) from error
    tensors = {"features": features.float(), "probabilities": probabilities, "labels": labels}
    tensors |= {"pixels": pixels} if keep_pixels else {}
    arrays: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in tensors.items() if tensor is not None}
    try:
        with atomic_file(folder / f"{start:09d}-{stop:09d}.npz") as writing:
            np.savez(writing, **arrays)
    except OSError as error:
        raise OSError(f"{error}; {_RESUME}") from error


class _EvenlySpread:
    """Some of the images, evenly spread over all, because sets are often sorted by class."""

    def __init__(self, images: Images, count: int):
        self._images = images
        self._indices = evenly_spread(count, len(images))
        self.image_size = images.image_size

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Images`."""
        indices = self._indices[start:stop]
        stretches = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
        read = [self._images.read(int(stretch[0]), int(stretch[-1]) + 1) for stretch in stretches]
        pixels, labels = zip(*read, strict=True)
        return torch.cat(pixels), None if labels[0] is None else torch.cat(labels)


def _is_finished(folder: Path, header: dict[str, Any]) -> bool:
    """Readies a folder for an evaluation, in the main process; ValueError if it has something else."""
    parts = folder / PARTS_NAME
    settings_file = parts / _SETTINGS_NAME
    asked = header["kept"]
    if (folder / STATISTICS_NAME).is_file():
        before = Evaluation.load(folder).header
        _check_same(folder, "an evaluation", before, header)
        kept = before.get("kept", {})
        wrong = ""
        if asked["features"] > kept.get("features", 0):
            wrong = f"with features of {kept.get('features', 0):,} images, not of {asked['features']:,}"
        elif asked["images"] not in (None, kept.get("images")):
            wrong = f"without its images as {asked['images']}"
        if wrong:
            raise ValueError(f"{folder} has an evaluation {wrong}: give another output_dir, or remove it")
        shutil.rmtree(parts, ignore_errors=True)
        return True
    # without a part nothing hangs on the settings, and the call may have been stopped because they are wrong
    has_parts = parts.is_dir() and bool(find_parts(parts))
    if has_parts and settings_file.is_file():
        before = json.loads(settings_file.read_text(encoding="utf-8"))
        _check_same(folder, "an unfinished evaluation", before, header)
        if before["kept"]["images"] != asked["images"]:
            raise ValueError(
                f"{folder} has an evaluation that was begun with keep_images {before['kept']['images']}, not"
                f" {asked['images']}: give another output_dir, or remove it"
            )
        return False
    others = folder.is_dir() and any(file.name[0] != "." and file != parts for file in folder.iterdir())
    if has_parts or (others and not settings_file.is_file()):
        raise ValueError(f"output_dir is {folder}, which holds other files: name a new or an empty folder")
    write_json(settings_file, header)
    return False


def _check_same(folder: Path, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compares what decides the numbers; names, places, devices and versions of libraries do not."""
    image_entries = sorted({*before["images"], *now["images"]}.difference([*_NAMES, "revision"]))
    for part, entries in (("protocol", COMPARED_ENTRIES), ("images", image_entries)):
        for entry in entries:
            one, other = before[part].get(entry), now[part].get(entry)
            if one != other:
                of = next((f" of {before['images'][name]}" for name in _NAMES if name in before["images"]), "")
                shown = [text if len(text) <= 200 else f"{text[:200]}..." for text in map(json.dumps, (one, other))]
                raise ValueError(
                    f"{folder} has {what}{of} with {entry} {shown[0]}, not {shown[1]}: give another output_dir, or"
                    " remove it"
                )


def _remove_if_nothing_was_done(folder: Path) -> None:
    """A call that failed at once, such as by a wrong option, leaves nothing behind."""
    parts = folder / PARTS_NAME
    if parts.is_dir() and not find_parts(parts):
        shutil.rmtree(parts)
        with contextlib.suppress(OSError):
            # only where it is empty
            folder.rmdir()
