"""Evaluating images, real ones or those that a model generates, by many ranks.

What is extracted goes to ``parts``: ``{start}-{stop}.npz`` for each stretch of images, 4 bytes an image for each
feature and class probability. At the end they become arrays of equally many rows, ``features.npy``,
``probabilities.npy``, ``labels.npy`` and ``indices.npy`` (which images the rows are), the images if they are kept
(``images/``, or ``images.npz`` as guided-diffusion reads it, label -1 for the null class), of an Inception
``spatial_statistics.npz`` for sFID, and ``statistics.npz``. It comes last: a folder that has it is whole.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import PartialState

from ..pipelines.image_grid import to_image
from ..utils.atomic_write import atomic_file, atomic_folder, only_writer, write_json
from ..utils.distributed import distributed_state, on_every_process, on_main_process
from ..utils.file_digest import file_digest
from ..utils.progress import progress_bar
from ..version import __version__
from .extractors import FeatureExtractor, make_extractor, published_header
from .images import RESIZE_FILTER, GeneratedImages, ImageBatch, ImageBatches, count_classes, find_revision, open_images
from .options import ExtractionOptions, ModelOptions, ReferenceOptions
from .protocols import COMPARED_ENTRIES, PUBLISHED
from .published import read_published
from .statistics import FeatureStatistics


STATISTICS_NAME, SPATIAL_STATISTICS_NAME = "statistics.npz", "spatial_statistics.npz"
_PARTS_NAME = "parts"
_ROW_ARRAYS = ("features", "probabilities", "labels")
_PART = re.compile(r"(\d+)-(\d+)\.npz")
# names, places and commits, beside which stand digests of what is there
_NOT_COMPARED = {"source", "model", "revision"}


@dataclass
class Evaluation:
    """An evaluated set of images.

    The header says how features are made (``protocol``), which ``images`` these are, what is ``kept``, and
    ``versions``. Arrays are mapped from the disk, and None if not kept: float32 (rows, features) and (rows, classes),
    and int64 labels (rows,), -1 for none.
    """

    folder: Path
    statistics: FeatureStatistics
    header: dict[str, Any]
    features: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    labels: np.ndarray | None = None
    spatial_statistics: FeatureStatistics | None = None

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        """Opens a folder, or its ``statistics.npz`` alone, by whatever name; ValueError if there is no whole one."""
        path = Path(path)
        file = path / STATISTICS_NAME if path.is_dir() else path
        folder = file.parent
        if not file.is_file():
            unfinished = ", which is not finished" if (folder / _PARTS_NAME).is_dir() else ""
            raise ValueError(f"{path} is not an evaluation{unfinished}: give a folder with {STATISTICS_NAME}")
        statistics = FeatureStatistics.load(file)
        if not all(isinstance(statistics.header.get(part), dict) for part in ("protocol", "images")):
            raise ValueError(f"{file} does not say by which protocol its features were made, and of which images")
        # beside a file of another name is what belongs to others
        names = {path.name for path in folder.iterdir()} if file.name == STATISTICS_NAME else set()
        rows = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ROW_ARRAYS if f"{name}.npy" in names}
        lengths = {name: len(array) for name, array in rows.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{folder} has arrays of different lengths: {lengths}")
        if SPATIAL_STATISTICS_NAME in names:
            rows["spatial_statistics"] = FeatureStatistics.load(folder / SPATIAL_STATISTICS_NAME)
        return cls(folder, statistics, statistics.header, **rows)

    @property
    def known_labels(self) -> np.ndarray | None:
        """The labels, if some are classes and those are the extractor's, by name where both have names; else None."""
        if self.labels is None or self.probabilities is None or (np.asarray(self.labels) < 0).all():
            return None
        protocol, images = self.header["protocol"], self.header["images"]
        ours, theirs = images.get("id2label"), protocol.get("id2label")
        same = ours == theirs
        if ours is None or theirs is None:
            same = protocol.get("num_classes") == images.get("num_classes") == self.probabilities.shape[1]
        return self.labels if same else None


def evenly_spread(count: int, total: int) -> np.ndarray:
    """Indices of count of total things, from the first to the last, rising; int64 (min(count, total),)."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


class _EvenlySpread(ImageBatches):
    """Some of the images, evenly spread over all, because sets are often sorted by class."""

    def __init__(self, images: ImageBatches, count: int):
        self._images, self._indices = images, evenly_spread(count, len(images)).tolist()
        self.image_size, self._num_images = images.image_size, len(self._indices)

    def read(self, start: int, stop: int) -> ImageBatch:
        batches = [self._images.read(index, index + 1) for index in self._indices[start:stop]]
        labels = [batch.labels for batch in batches if batch.labels is not None]
        return ImageBatch(torch.cat([batch.pixels for batch in batches]), torch.cat(labels) if labels else None)


def evaluate_reference(options: ReferenceOptions) -> Path:
    """Evaluates real images and returns the folder; ValueError or OSError if that cannot be."""
    with distributed_state(cpu=options.device == "cpu") as state:
        if options.protocol in PUBLISHED and on_main_process(state, lambda: _keep_published(options)):
            return Path(options.output_dir)
        if options.num_images is not None:
            raise ValueError(
                f"num_images is {options.num_images}, but of {options.source} the protocol {options.protocol} takes"
                " images, not statistics: leave it out"
            )
        images = on_every_process(
            state, lambda: open_images(options.source, options.split, options.resolution, options.color_mode)
        )
        count = min(options.max_images or len(images), len(images))
        chosen = images if count == len(images) else _EvenlySpread(images, count)
        facts: dict[str, Any] = {
            **{name: getattr(options, name) for name in ("source", "split", "resolution")},
            "resize_filter": None if options.resolution is None else RESIZE_FILTER,
            # of a folder of images all files are read for it, once for all ranks
            "fingerprint": on_main_process(state, lambda: images.fingerprint),
            "image_size": list(images.image_size),
            "of": len(images),
            "num_images": count,
        }
        return _evaluate(chosen, facts, options, state)


def _keep_published(options: ReferenceOptions) -> bool:
    """Makes published statistics the evaluation of the images that they are of; whether the source has any."""
    published = read_published(options.source, options.num_images)
    if published is None:
        return False
    for name in ("split", "resolution", "max_images"):
        if (value := getattr(options, name)) is not None:
            raise ValueError(f"{name} is {value}, but {options.source} holds statistics and no images: leave it out")
    statistics, spatial = published
    protocol = published_header(options.protocol)
    if options.weights is not None:
        protocol = make_extractor(options.protocol, options.weights).header
    fingerprint = file_digest(Path(options.source).expanduser())
    facts = {"source": options.source, "fingerprint": fingerprint, "num_images": statistics.count}
    folder, header = Path(options.output_dir), _make_header({**protocol, "id2label": None}, facts)
    with only_writer(folder):
        if not prepare_folder(folder, header):
            if spatial is not None:
                spatial.save(folder / SPATIAL_STATISTICS_NAME, header)
            statistics.save(folder / STATISTICS_NAME, header)
            shutil.rmtree(folder / _PARTS_NAME)
    print(f"published statistics of {statistics.count:,} images for {options.protocol}: {folder}")
    return True


def _make_header(
    protocol: Mapping[str, Any], facts: Mapping[str, Any], num_features: int = 0, keep_images: str | None = None
) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "images": facts,
        "kept": {"features": num_features, "images": keep_images},
        "versions": {"imagenet64_diffusion": __version__}
        | {library.__name__: library.__version__ for library in (torch, diffusers, np)},
    }


def evaluate_model(
    options: ModelOptions,
    state: PartialState | None = None,
    extractor: FeatureExtractor | None = None,
    revision: str | None = None,
) -> Path:
    """Generates images with a model, evaluates them and returns the folder; raises as `evaluate_reference`.

    A sweep gives its ranks, the extractor of the options, and the commit of a Hub repository.
    """
    if state is None:
        with distributed_state(cpu=options.device == "cpu") as state:
            return evaluate_model(options, state)
    # one for all ranks, whatever is pushed meanwhile
    commit = revision or on_main_process(state, lambda: find_revision(options.model))

    def open_generated() -> GeneratedImages:
        counts = None if options.train_data_dir is None else count_classes(options.train_data_dir)
        return GeneratedImages(options, options.device or state.device, commit, counts)

    images = on_every_process(state, open_generated)
    return _evaluate(images, images.description, options, state, extractor)


def open_extractor(options: ExtractionOptions, channels: int, state: PartialState) -> FeatureExtractor:
    """The extractor that the options name, in every rank, for images of so many channels."""
    return on_every_process(
        state,
        lambda: make_extractor(
            options.protocol,
            weights=options.weights,
            device=options.device or state.device,
            dtype=options.extractor_dtype,
            batch_size=options.batch_size,
            **({"channels": channels} if options.protocol == "pixels" and channels != 1 else {}),
        ),
    )


def _evaluate(
    images: ImageBatches,
    facts: Mapping[str, Any],
    options: ExtractionOptions,
    state: PartialState,
    given: FeatureExtractor | None = None,
) -> Path:
    """Evaluates images, or resumes that, or finds that it is done; ``facts`` is all that they depend on, as JSON."""
    folder, keep_images = Path(options.output_dir), getattr(options, "keep_images", None)
    extractor = given or open_extractor(options, images.image_size[0], state)
    num_images, num_rows = len(images), min(options.num_features, len(images))
    header = _make_header({**extractor.header, "id2label": extractor.id2label}, facts, num_rows, keep_images)
    with contextlib.ExitStack() as stack:

        def begin() -> bool:
            stack.enter_context(only_writer(folder))
            is_done = prepare_folder(folder, header)
            stack.callback(_remove_if_nothing_was_done, folder)
            return is_done

        done = on_main_process(state, begin)
        try:
            if not done:
                extract_parts(images, extractor, folder, options.batch_size, keep_images is not None, state)
                on_main_process(state, lambda: write_evaluation(folder, header, num_images, num_rows, keep_images))
        except OSError as error:
            reason = error if error.errno is None else f"could not write {folder} ({error.strerror})"
            raise OSError(f"{reason}; what has been evaluated stays, and the same call resumes") from error
    # a sweep says it in its own words
    if state.is_main_process and given is None:
        what = "evaluated already" if done else f"evaluated {num_images:,} images with {options.protocol}"
        print(f"{what}: {folder}")
    return folder


def extract_parts(
    images: ImageBatches,
    extractor: FeatureExtractor,
    folder: Path,
    batch_size: int,
    keep_pixels: bool,
    state: PartialState,
) -> None:
    """Sees to it that every image is in a part; what has none is cut into batches and shared out among the ranks."""
    parts = folder / _PARTS_NAME
    # tells the other ranks that one of them cannot go on
    failed = parts / "failed"

    def find_missing() -> list[tuple[int, int]]:
        failed.unlink(missing_ok=True)
        return list(missing_batches(parts, len(images), batch_size))

    batches = on_main_process(state, find_missing)

    def extract_mine() -> None:
        done = len(images) - sum(stop - start for start, stop in batches)
        shown = {"desc": "evaluating", "unit": "image", "disable": not state.is_main_process}
        with progress_bar(total=len(images), initial=done, **shown) as bar:
            for start, stop in batches[state.process_index :: state.num_processes]:
                if failed.exists():
                    return
                try:
                    pixels, labels = images.read(start, stop)
                    found = {**extractor(pixels)._asdict(), "labels": labels}
                    found["pixels"] = pixels if keep_pixels else None
                    arrays = {name: tensor.cpu().numpy() for name, tensor in found.items() if tensor is not None}
                    with atomic_file(parts / f"{start:09d}-{stop:09d}.npz") as writing:
                        np.savez(writing, **arrays)
                except Exception as error:
                    failed.touch()
                    if isinstance(error, torch.OutOfMemoryError):
                        raise ValueError(f"memory is too small for batch_size {stop - start}: lower it") from error
                    raise
                # the others do as much in the same time
                bar.update(min((stop - start) * state.num_processes, len(images) - bar.n))

    on_every_process(state, extract_mine)


def _remove_if_nothing_was_done(folder: Path) -> None:
    """A call that failed at once, such as by a wrong option, leaves nothing behind."""
    parts = folder / _PARTS_NAME
    if parts.is_dir() and not find_parts(parts):
        shutil.rmtree(parts)
        with contextlib.suppress(OSError):
            # only where it is empty
            folder.rmdir()


def find_parts(folder: Path) -> list[tuple[int, int, Path]]:
    """The parts in a folder, (start, stop, file), in the order of their images."""
    matches = [(_PART.fullmatch(file.name), file) for file in folder.glob("*.npz")]
    return sorted((int(match[1]), int(match[2]), file) for match, file in matches if match)


def missing_batches(folder: Path, num_images: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of stretches of at most batch_size images that no part in a folder holds, in their order."""
    position = 0
    for start, stop, _ in [*find_parts(folder), (num_images, num_images, folder)]:
        for begin in range(position, start, batch_size):
            yield begin, min(begin + batch_size, start)
        position = max(position, stop)


def prepare_folder(folder: Path, header: Mapping[str, Any]) -> bool:
    """Readies a folder for an evaluation; whether it is there already. ValueError if the folder has something else."""
    parts, settings = folder / _PARTS_NAME, folder / _PARTS_NAME / "settings.json"
    is_done = (folder / STATISTICS_NAME).is_file()
    if is_done:
        before = Evaluation.load(folder).header
    # without a part nothing hangs on the settings, and the call may have been stopped because they are wrong
    elif settings.is_file() and find_parts(parts):
        before = json.loads(settings.read_text(encoding="utf-8"))
    elif not settings.is_file() and any(path.is_file() for path in folder.rglob("[!.]*")):
        raise ValueError(f"output_dir is {folder}, which holds other files: name a new or an empty folder")
    else:
        write_json(settings, header)
        return False
    # what decides the numbers, beside names, places, devices and versions; parts have the features of all images
    header = json.loads(json.dumps(header))
    entries = [("protocol", entry) for entry in COMPARED_ENTRIES]
    entries += [("images", entry) for entry in sorted({*before["images"], *header["images"]} - _NOT_COMPARED)]
    kept, asked = before.get("kept", {}), header["kept"]
    entries += [("kept", "features")] if is_done and asked["features"] > kept.get("features", 0) else []
    entries += [("kept", "images")] if asked["images"] is not None else []
    for part, entry in entries:
        one, other = (json.dumps(each.get(part, {}).get(entry), sort_keys=True) for each in (before, header))
        if one != other:
            what = "an evaluation" if is_done else "an unfinished evaluation"
            of = before["images"].get("source", before["images"].get("model"))
            name = f"kept {entry}" if part == "kept" else entry
            raise ValueError(
                f"{folder} has {what} of {of} with {name} {one[:200]}, not {other[:200]}: give another output_dir, or"
                " remove it"
            )
    if is_done:
        # left by a call that was killed at its very end
        shutil.rmtree(parts, ignore_errors=True)
    return is_done


def read_parts(folder: Path, num_images: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(number of its first image, arrays) of each part, so that each image comes once; ValueError if one is missing.

    Parts overlap where one rank alone was killed, and the others wrote a last part beside those of the next run.
    """
    position = 0
    for start, stop, file in [*find_parts(folder), (num_images, num_images, folder)]:
        if start > position:
            raise ValueError(f"{folder} has no part with image {position}: remove it and evaluate again")
        if stop > position:
            with np.load(file) as arrays:
                yield position, {name: arrays[name][position - start :] for name in arrays.files}
            position = stop


def write_evaluation(
    folder: Path, header: Mapping[str, Any], num_images: int, num_rows: int, keep_images: str | None = None
) -> None:
    """Puts the parts together, and removes them unless that fails; keeps ``num_rows`` rows, evenly spread."""
    parts, indices = folder / _PARTS_NAME, evenly_spread(num_rows, num_images)
    statistics, spatial = FeatureStatistics(header["protocol"]["num_features"]), None
    images: dict[str, list[np.ndarray]] = {"arr_0": [], "arr_1": []}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in _ROW_ARRAYS}
    for start, part in read_parts(parts, num_images):
        statistics.update(part["features"])
        if "spatial_features" in part:
            spatial = spatial or FeatureStatistics(part["spatial_features"].shape[1])
            spatial.update(part["spatial_features"])
        kept = indices[(indices >= start) & (indices < start + len(part["features"]))] - start
        for name in part.keys() & rows.keys():
            rows[name].append(part[name][kept])
        if keep_images is not None:
            images["arr_0"].append(part["pixels"].transpose(0, 2, 3, 1))
            images["arr_1"] += [part["labels"]] if "labels" in part else []
    arrays: dict[str, Any] = {name: np.concatenate(found) for name, found in images.items() if found}
    if keep_images == "npz":
        with atomic_file(folder / "images.npz") as writing:
            np.savez(writing, **arrays)
    elif keep_images == "png":
        with atomic_folder(folder / "images") as writing:
            for index, image in enumerate(arrays["arr_0"]):
                to_image(image).save(writing / f"{index:0{max(5, len(str(num_images)))}d}.png")
    for name, found in {**rows, "indices": [indices]}.items():
        # what a call that was killed here has written may be of another number of rows
        (folder / f"{name}.npy").unlink(missing_ok=True)
        if found and len(indices):
            with atomic_file(folder / f"{name}.npy") as writing:
                np.save(writing, np.concatenate(found))
    # parts of an earlier version have none
    if spatial is not None and spatial.count == num_images:
        spatial.save(folder / SPATIAL_STATISTICS_NAME, header)
    statistics.save(folder / STATISTICS_NAME, header)
    shutil.rmtree(parts)
