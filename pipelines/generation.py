"""Generating images to a folder, and resuming that: the images themselves tell how far a run came."""

import contextlib
import functools
import hashlib
import json
import platform
import shutil
import signal
import threading
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image
from tqdm.auto import tqdm

from ..utils.atomic_write import atomic_file, only_writer, write_json
from ..utils.command_line import StoppedBySignalError
from ..utils.devices import best_device, find_device, keep_freed_memory
from ..utils.distributed import distributed_state, on_every_process, on_main_process
from ..version import __version__
from .generation_options import GenerateOptions, Sampler
from .image_grid import image_grid, save_animation, to_image
from .loading import load_pipeline
from .pipeline_class_conditional import ClassConditionalPipeline


MANIFEST_NAME = "manifest.json"
GRID_NAME, ANIMATION_NAME = "grid.png", "denoising.gif"
_FRAMES_NAME = ".frames"  # what the animation is made of, until it is: the way of each batch from noise
_MAX_IMAGES_IN_GRID = 144  # more would be neither looked at nor held in memory with comfort
# May change when a run is resumed: they make no other images beyond rounding.
_MAY_DIFFER = {"unfinished", "versions", "device", "batch_size", "output_dir"}


def generate(options: GenerateOptions) -> Path:
    """Generates the images that the options ask for, on all ranks, or resumes that; returns their folder."""
    on_cpu = (options.device or best_device()) == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    folder = Path(options.output_dir)

    def stop(number: int, frame: Any) -> None:
        message = f"stopped by {signal.Signals(number).name}; the images in {folder} stay: the same command resumes"
        raise StoppedBySignalError(number, message if state.is_main_process else "")

    with distributed_state(on_cpu) as state, contextlib.ExitStack() as stack:
        # at once: every file is written atomically, so nothing need be saved; only the main thread may set handlers
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                stack.callback(signal.signal, number, signal.signal(number, stop))
        run = on_every_process(state, lambda: _Run(options, state))

        def take_folder() -> list[range] | None:
            stack.enter_context(only_writer(folder))
            stack.callback(run.remove_if_empty)
            return run.missing_batches()

        missing = on_main_process(state, take_folder)
        if missing is not None:
            run.generate_batches(missing)
            on_main_process(state, run.finish)
        if state.is_main_process:
            files = ", ".join([f"{len(run.labels)} images", *run.manifest["files"]])
            print(f"{files} and {MANIFEST_NAME} {'were' if missing is None else 'are'} in {folder}", flush=True)
    return folder


class _Run:
    """What the options ask for, and how much of it is in the folder."""

    def __init__(self, options: GenerateOptions, state: PartialState):
        device = options.device or (state.device if state.num_processes > 1 else best_device())
        self.options, self.state, self.folder = options, state, Path(options.output_dir)
        self.pipeline = open_model(options.model, options, device, getattr(torch, options.dtype))
        self.labels = requested_class_ids(self.pipeline, options)
        self.captions = [class_caption(self.pipeline, label) for label in self.labels[:_MAX_IMAGES_IN_GRID]]
        self.manifest = make_manifest(self.pipeline, options, self.labels)
        self.image_files = [self.folder / image["file"] for image in self.manifest["images"]]
        self.frames_folder, self.has_begun = self.folder / _FRAMES_NAME, False
        size, num_animated = options.batch_size, len(self.captions) if options.animation else 0
        self.frames_files = {
            start: self.frames_folder / f"{start:05d}+{size}.npy" for start in range(0, num_animated, size)
        }

    def missing_batches(self) -> list[range] | None:
        """Takes the folder, on the main process; the batches to be generated, None where everything is there."""
        present, earlier = _names(self.folder), _read_manifest(self.folder / MANIFEST_NAME)
        if earlier is None:
            if any(not name.startswith((".writing.", _FRAMES_NAME)) for name in present):
                raise ValueError(f"output_dir is {self.folder}, which holds other files: name an empty folder")
        else:
            images = {image["file"] for image in earlier["images"]}
            written, difference = {*earlier["files"], *images}, _difference(earlier, self.manifest)
            if difference is None and "unfinished" not in earlier and written <= present:
                return None
            if difference is not None and "unfinished" in earlier and images & present:
                held = f"an unfinished run with {difference}: give that to resume it, or another output_dir"
                raise ValueError(f"output_dir is {self.folder}, which holds {held}")
            if difference is not None:
                for name in written:
                    (self.folder / Path(name).name).unlink(missing_ok=True)
                shutil.rmtree(self.frames_folder, ignore_errors=True)
        write_json(self.folder / MANIFEST_NAME, self.manifest | {"unfinished": True})
        self.has_begun = True
        self.frames_folder.mkdir(exist_ok=True)

        present = _names(self.folder) | _names(self.frames_folder)
        size, total = self.options.batch_size, len(self.labels)
        # the same ones in every run, so that resuming makes no image different by rounding
        batches = [range(start, min(start + size, total)) for start in range(0, total, size)]

        def is_missing(batch: range) -> bool:
            needed = [self.image_files[index].name for index in batch]
            if batch.start in self.frames_files and ANIMATION_NAME not in present:
                needed.append(self.frames_files[batch.start].name)
            return not present.issuperset(needed)

        return list(filter(is_missing, batches))

    def remove_if_empty(self) -> None:
        """Leaves nothing of a run that failed before its first image, so that any other may take its place."""
        if self.has_begun and not any(file.exists() for file in self.image_files):
            shutil.rmtree(self.frames_folder, ignore_errors=True)
            (self.folder / MANIFEST_NAME).unlink()
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def finish(self) -> None:
        """Writes the grid and the animation of the first images, and says that everything is there."""
        grid, animation, columns = self.folder / GRID_NAME, self.folder / ANIMATION_NAME, self.options.columns
        if not grid.exists():
            images = [Image.open(file) for file in self.image_files[: len(self.captions)]]
            with atomic_file(grid) as writing:
                image_grid(images, self.captions, columns).save(writing)
        if self.options.animation and not animation.exists():
            ways = [np.load(file, mmap_mode="r") for file in self.frames_files.values()]
            steps = ([to_image(image) for batch in step for image in batch] for step in zip(*ways, strict=True))
            save_animation([image_grid(step, self.captions, columns) for step in steps], animation, self.options.fps)
        shutil.rmtree(self.frames_folder)
        write_json(self.folder / MANIFEST_NAME, self.manifest)

    def generate_batches(self, batches: list[range]) -> None:
        """Generates the batches, one on each rank at a time: where one fails, no rank begins another."""
        rank, world_size = self.state.process_index, self.state.num_processes
        num_steps = len(batches[rank::world_size]) * self.pipeline.num_timesteps
        with tqdm(total=num_steps, desc="generating", unit="step", disable=rank != 0) as progress_bar:
            for start in range(0, len(batches), world_size):
                batch = next(iter(batches[start : start + world_size][rank:]), range(0))
                on_every_process(self.state, functools.partial(self._generate_batch, batch, progress_bar))

    def _generate_batch(self, batch: range, progress_bar: tqdm) -> None:
        if not batch:
            return
        frames: list[np.ndarray] = []

        def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
            progress_bar.update()
            if batch.start in self.frames_files:
                frames.append(to_pixels(pipeline, tensors["latents"][: len(self.captions) - batch.start]))

        labels, seed = self.labels[batch.start : batch.stop], self.options.seed + batch.start
        try:
            images = sample_images(self.pipeline, self.options, labels, seed, callback_on_step_end=on_step_end)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"memory is too small for {len(batch)} images at a time: lower batch_size") from error
        # an image is there when it has its file, so its way from noise is written before
        if frames:
            with atomic_file(self.frames_files[batch.start]) as writing:
                np.save(writing, np.stack(frames))
        for file, image in zip(self.image_files[batch.start : batch.stop], images, strict=True):
            if not file.exists():
                with atomic_file(file) as writing:
                    image.save(writing)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def _read_manifest(file: Path) -> dict[str, Any] | None:
    """The manifest of an earlier run; None where there is none, or a file of another program."""
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        manifest["options"] = dict(manifest.get("options", {}))
        "".join([*manifest["files"], *(image["file"] for image in manifest["images"])])  # names, or a TypeError
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest


def _difference(earlier: dict[str, Any], manifest: dict[str, Any]) -> str | None:
    """The first setting in which two runs differ, as "name value"; None where they make the same images."""
    manifest = json.loads(json.dumps(manifest))
    # options first: the rest follows from them
    for one, other in ((earlier["options"], manifest["options"]), (earlier, manifest)):
        for name in sorted((one | other).keys() - _MAY_DIFFER - {"options"}):
            if one.get(name) != other.get(name):
                return f"{name} {str(one.get(name))[:200]} instead of {str(other.get(name))[:200]}"
    return None


def open_model(
    model: str, sampler: Sampler, device: torch.device | str, dtype: torch.dtype = torch.float32, **hub_options: Any
) -> ClassConditionalPipeline:
    """The pipeline of a folder or Hub id on a device, with the sampler's scheduler; raises as `load_pipeline`."""
    device = find_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    pipeline = load_pipeline(model, dtype=dtype, **hub_options).to(device)
    pipeline.set_progress_bar_config(disable=True)
    sampler.prepare(pipeline)
    return pipeline


def sample_images(
    pipeline: ClassConditionalPipeline, sampler: Sampler, labels: Sequence[int | None], seed: int, **options: Any
) -> Any:
    """Image i of class ``labels[i]``, None for the null class, from ``seed + i``; options are those of the call."""
    # the noise is made on the CPU, so that every device has the same
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(labels))]
    return pipeline(labels, generator=generators, **sampler.arguments(pipeline), **options).images


_DIGESTS: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()


def weights_digest(unet: torch.nn.Module) -> str:
    """SHA-256 of a network's weights, which tells models of one name apart; computed once, so they must not change."""
    if unet not in _DIGESTS:
        digest = hashlib.sha256()
        for name, tensor in sorted(unet.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        _DIGESTS[unet] = digest.hexdigest()
    return _DIGESTS[unet]


def pipeline_digest(pipeline: ClassConditionalPipeline) -> str:
    """The digest of the network, and of those that guide it where there are any."""
    networks = filter(None, (pipeline.unet, pipeline.guidance_unet, pipeline.classifier))
    return "+".join(map(weights_digest, networks))


def to_pixels(pipeline: ClassConditionalPipeline, latents: torch.Tensor) -> np.ndarray:
    """What images look like between two denoising steps: uint8 (images, height, width, channels)."""
    return (pipeline.image_processor.postprocess(latents, output_type="np") * 255).round().astype(np.uint8)


def requested_class_ids(pipeline: ClassConditionalPipeline, options: GenerateOptions) -> list[int | None]:
    """The class of each image that the options ask for, None for the null class."""
    num_classes, asked = pipeline.num_classes, options.class_labels
    if num_classes is None:
        if asked not in (["random"], ["null"]):
            raise ValueError(f"class_labels is {' '.join(asked)}, but the model has no classes: leave it out")
        return [None] * (options.num_images if asked == ["random"] else options.num_images_per_label)
    if asked == ["random"]:
        labels = np.random.default_rng(options.seed).integers(num_classes, size=options.num_images).tolist()
    elif asked == ["all"]:
        labels = list(range(num_classes))
    else:
        labels = [class_id(pipeline, label, num_classes) for label in asked]
    return [label for label in labels for _ in range(options.num_images_per_label)]


def class_id(pipeline: ClassConditionalPipeline, label: str, num_classes: int) -> int | None:
    """The id of a class that is given by its id or its name; None for ``null``."""
    if label == "null":
        return None
    if not label.removeprefix("-").isdecimal():
        return pipeline.get_label_ids(label)[0]
    if not 0 <= int(label) < num_classes:
        raise ValueError(f"class label {label} is out of range: ids go from 0 to {num_classes - 1}")
    return int(label)


def class_caption(pipeline: ClassConditionalPipeline, label: int | None) -> str:
    """The name of a class, or its id where it has none; empty for the null class."""
    return "" if label is None else (pipeline.config.id2label or {}).get(label, str(label))


def make_manifest(
    pipeline: ClassConditionalPipeline, options: GenerateOptions, labels: Sequence[int | None]
) -> dict[str, Any]:
    """How images of these classes are generated and what is written, as JSON values."""
    digits, arguments = max(5, len(str(len(labels)))), options.arguments(pipeline)
    chosen: dict[str, Any] = {key: arguments.get(key) for key in ("num_inference_steps", "timesteps", "clip_sample")}
    return {
        "versions": {
            "imagenet64_diffusion": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "model": options.model,
        "weights_sha256": pipeline_digest(pipeline),
        "device": pipeline.unet.device.type,
        "options": asdict(options),
        "scheduler": {"class": type(pipeline.scheduler).__name__, "config": plain_config(pipeline.scheduler.config)},
        "timesteps": list(map(float, pipeline.prepare_scheduler(**chosen).timesteps)),
        "note": "each image begins with noise of torch.Generator().manual_seed(seed) on the CPU",
        "files": [GRID_NAME, ANIMATION_NAME] if options.animation else [GRID_NAME],
        "images": [
            {
                "file": f"{index:0{digits}d}.png",
                "class_label": label,
                "class_name": class_caption(pipeline, label),
                "seed": options.seed + index,
            }
            for index, label in enumerate(labels)
        ],
    }


def plain_config(config: Any) -> dict[str, Any]:
    """A config as JSON holds it, without diffusers' own entries."""
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    return json.loads(json.dumps(own, default=str))
