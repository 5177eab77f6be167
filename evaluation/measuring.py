"""Measuring a set of images, real ones or those that a model draws."""

import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs

from ..pipelines.sampler import Sampler
from ..utils.atomic_write import atomic_file, only_writer
from ..utils.distributed import on_every_process, on_main_process
from ..version import __version__
from .drawing import ModelImages, count_classes, find_revision
from .extraction import Images, extract_parts, find_parts
from .extractors import FeatureExtractor
from .images import ImageBatches, open_images
from .measurement import PARTS_NAME, STATISTICS_NAME, Measurement, evenly_spread, remove_parts, write_measurement
from .options import ExtractionOptions, ModelOptions, ReferenceOptions
from .protocols import COMPARED_ENTRIES, make_extractor


_SETTINGS_NAME = "settings.json"
# names and places, beside which stand digests of what is there
_NAMES = ("source", "model")
_TOLD = (*_NAMES, "revision")
_LONGEST_SHOWN = 200
# as imagenet64-prepare has it by default, and the published ImageNet of 64x64 pixels
_RESIZE_FILTER = "box"


@contextlib.contextmanager
def distributed_state(device: str | None = None) -> Iterator[PartialState]:
    """The processes that accelerate has started; on the CPU where that is asked for."""
    # one process may have the last batch of an hour while the others wait for it
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7)).to_kwargs()
    state = PartialState(cpu=device == "cpu", **patience)
    yield state
    # not on an error, of which the others may not know yet
    if state.num_processes > 1:
        state.destroy_process_group()


def measure_reference(options: ReferenceOptions) -> Path:
    """Measures real images.

    Args:
        options: What to measure, and how.

    Returns:
        The folder of the measurement.

    Raises:
        ValueError: If the images cannot be read, or do not fit the protocol, or the folder holds something else.
        OSError: If something cannot be read or written, or another process measures into the same folder.
    """

    def open_source() -> ImageBatches:
        return open_images(
            options.source,
            split=options.split,
            resolution=options.resolution,
            resize_filter=_RESIZE_FILTER,
            color_mode=options.color_mode,
        )

    with distributed_state(options.device) as state:
        images = on_every_process(state, open_source)
        chosen = _EvenlySpread(images, options.max_images or len(images))
        facts: dict[str, Any] = {"source": options.source, "split": options.split, "resolution": options.resolution}
        facts |= {"resize_filter": None if options.resolution is None else _RESIZE_FILTER}
        # of a folder of images all files are read for it, once for all processes
        facts |= {"fingerprint": on_main_process(state, lambda: images.fingerprint)}
        facts |= {"image_size": list(images.image_size), "of": len(images), "num_images": len(chosen)}
        return measure(chosen, facts, options, state)


def measure_model(
    options: ModelOptions,
    state: PartialState | None = None,
    extractor: FeatureExtractor | None = None,
    quiet: bool = False,
    revision: str | None = None,
) -> Path:
    """Draws images from a model and measures them.

    Args:
        options: What to draw and to measure, and how.
        state: The processes that share the work; by default those that accelerate has started.
        extractor: That of the options, if it has been made already.
        quiet: Whether to print nothing at the end.
        revision: Commit of the Hub repository; by default the latest one.

    Returns:
        The folder of the measurement.

    Raises:
        ValueError: If the settings do not fit the model or the protocol, or the folder holds something else.
        OSError: If something cannot be read or written, or another process measures into the same folder.
    """
    if state is None:
        with distributed_state(options.device) as state:
            return measure_model(options, state, extractor, quiet, revision)
    # one for all processes, whatever is pushed meanwhile
    commit = revision or on_main_process(state, lambda: find_revision(options.model))

    def open_model() -> ModelImages:
        return ModelImages(
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
    return measure(images, images.description, options, state, options.keep_images, extractor, quiet)


def open_extractor(options: ExtractionOptions, channels: int, state: PartialState) -> FeatureExtractor:
    """The extractor that the options name, in every process.

    Args:
        options: Which one.
        channels: What the images have.
        state: The processes that share the work.
    """
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


def measure(
    images: Images,
    facts: Mapping[str, Any],
    options: ExtractionOptions,
    state: PartialState,
    keep_images: str | None = None,
    extractor: FeatureExtractor | None = None,
    quiet: bool = False,
) -> Path:
    """Measures images, or goes on with it, or finds that it has been done.

    One run at a time measures into a folder; it may have several processes.

    Args:
        images: The images.
        facts: All that they depend on, as JSON values.
        options: How to measure.
        state: The processes that share the work.
        keep_images: See `ModelOptions`.
        extractor: That of the options, if it has been made already.
        quiet: Whether to print nothing at the end.

    Returns:
        The folder of the measurement.

    Raises:
        ValueError: If the images do not fit the protocol, or the folder has something else, which stays as it is.
        OSError: If something cannot be written, or another process measures into the folder.
    """
    folder = Path(options.output_dir)
    extractor = extractor or open_extractor(options, images.image_size[0], state)
    names = None if extractor.id2label is None else {str(key): name for key, name in extractor.id2label.items()}
    header = {
        "protocol": {**extractor.header, "id2label": names},
        "images": json.loads(json.dumps(facts)),
        "kept": {"features": min(options.num_features, len(images)), "images": keep_images},
        "versions": {
            "imagenet64_diffusion": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "numpy": np.__version__,
        },
    }
    with contextlib.ExitStack() as stack:

        def take_place() -> bool:
            if keep_images == "png" and images.image_size[0] not in (1, 3, 4):
                raise ValueError(f"keep_images is png, which cannot hold {images.image_size[0]} channels: take npz")
            stack.enter_context(only_writer(folder))
            return _is_finished(folder, header)

        if on_main_process(state, take_place):
            if state.is_main_process and not quiet:
                print(f"measured already: {folder}")
            return folder
        if state.is_main_process:
            stack.callback(_remove_if_nothing_was_done, folder)
        extract_parts(
            images,
            extractor,
            folder / PARTS_NAME,
            batch_size=options.batch_size,
            keep_pixels=keep_images is not None,
            state=state,
        )

        def put_together() -> None:
            try:
                write_measurement(folder, header, len(images), options.num_features, keep_images)
            except OSError as error:
                reason = error if error.errno is None else f"could not write {folder} ({error.strerror})"
                raise OSError(f"{reason}; what has been measured stays, and the same call goes on") from error

        on_main_process(state, put_together)
    if state.is_main_process and not quiet:
        print(f"measured {len(images):,} images with {options.protocol}: {folder}")
    return folder


class _EvenlySpread:
    """Some of the images, evenly spread over all, because sets are often sorted by class."""

    def __init__(self, images: Images, count: int):
        self._images = images
        self._indices = evenly_spread(count, len(images))
        self.image_size = images.image_size

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `extraction.Images`."""
        indices = self._indices[start:stop]
        stretches = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
        read = [self._images.read(int(stretch[0]), int(stretch[-1]) + 1) for stretch in stretches]
        pixels, labels = zip(*read, strict=True)
        return torch.cat(pixels), None if labels[0] is None else torch.cat(labels)


def _is_finished(folder: Path, header: dict[str, Any]) -> bool:
    """Readies a folder for a measurement, in the main process.

    Raises:
        ValueError: If it has something else.
    """
    parts = folder / PARTS_NAME
    settings_file = parts / _SETTINGS_NAME
    if (folder / STATISTICS_NAME).is_file():
        before = Measurement.load(folder).header
        _check_same(folder, "a measurement", before, header)
        kept, asked = before.get("kept", {}), header["kept"]
        if asked["features"] > kept.get("features", 0):
            raise ValueError(
                f"{folder} has a measurement with features of {kept.get('features', 0):,} images, not of"
                f" {asked['features']:,}: give another output_dir, or remove it"
            )
        if asked["images"] not in (None, kept.get("images")):
            raise ValueError(
                f"{folder} has a measurement without its images as {asked['images']}: give another output_dir, or"
                " remove it"
            )
        remove_parts(folder)
        return True
    if settings_file.is_file():
        # without a part nothing hangs on the settings, and the call may have been stopped because they are wrong
        if find_parts(parts):
            before = json.loads(settings_file.read_text(encoding="utf-8"))
            _check_same(folder, "an unfinished measurement", before, header)
            if before["kept"]["images"] != header["kept"]["images"]:
                raise ValueError(
                    f"{folder} has a measurement that was begun with keep_images {before['kept']['images']}, not"
                    f" {header['kept']['images']}: give another output_dir, or remove it"
                )
            return False
    elif folder.is_dir():
        others = [file for file in folder.iterdir() if file.name[0] != "." and file != parts]
        if others or (parts.is_dir() and find_parts(parts)):
            raise ValueError(f"output_dir is {folder}, which holds other files: name a new or an empty folder")
    with atomic_file(settings_file) as writing:
        writing.write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    return False


def _check_same(folder: Path, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compares what decides the numbers; names, places, devices and versions of libraries do not."""
    image_entries = sorted({*before["images"], *now["images"]}.difference(_TOLD))
    for part, entries in (("protocol", COMPARED_ENTRIES), ("images", image_entries)):
        for entry in entries:
            one, other = before[part].get(entry), now[part].get(entry)
            if one != other:
                of = next((f" of {before['images'][name]}" for name in _NAMES if name in before["images"]), "")
                raise ValueError(
                    f"{folder} has {what}{of} with {entry} {_shown(one)}, not {_shown(other)}: give another"
                    " output_dir, or remove it"
                )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def _remove_if_nothing_was_done(folder: Path) -> None:
    """A call that failed at once, such as by a wrong option, leaves nothing behind."""
    parts = folder / PARTS_NAME
    if parts.is_dir() and not find_parts(parts):
        remove_parts(folder)
        with contextlib.suppress(OSError):
            # only where it is empty
            folder.rmdir()
