"""Drawing images to a folder: numbered PNGs, a labelled grid, an animation, and a manifest to draw each one again."""

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..utils.atomic_write import atomic_file
from ..utils.devices import best_device, find_device
from ..utils.memory import keep_freed_memory
from ..version import __version__
from .generation_options import GenerateOptions
from .image_grid import image_grid, save_animation, to_image
from .loading import load_pipeline
from .pipeline_class_conditional import ClassConditionalPipeline
from .sampler import Sampler


MANIFEST_NAME = "manifest.json"
# A grid or an animation of more would be neither looked at nor held in memory with comfort.
_MAX_IMAGES_IN_GRID = 144


def generate(options: GenerateOptions) -> Path:
    """Draws the images that the options ask for, see `GenerateOptions`.

    Every image is drawn from its own seed, on the CPU, and so does not depend on batch size, place or device beyond
    rounding.

    Returns:
        The folder of the images.

    Raises:
        ValueError: If an option does not fit the model, or the folder holds something else.
    """
    output_dir = Path(options.output_dir)
    _make_room(output_dir)

    device = find_device(options.device or best_device())
    if device.type == "cpu":
        keep_freed_memory()
    pipeline = load_pipeline(options.model, dtype=getattr(torch, options.dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    sampler = Sampler.from_options(options)
    sampler.prepare(pipeline)
    labels = requested_class_ids(pipeline, options)
    names = [class_caption(pipeline, label) for label in labels]

    drawn = _Recorder(pipeline, options, sampler, num_animated=min(len(labels), _MAX_IMAGES_IN_GRID))
    output_dir.mkdir(parents=True, exist_ok=True)
    digits = max(5, len(str(len(labels))))
    images: list[dict[str, Any]] = []
    for image, label, name in zip(drawn.images(labels), labels, names, strict=True):
        number = len(images)
        file = output_dir / f"{number:0{digits}d}.png"
        with atomic_file(file) as writing:
            image.save(writing)
        images.append({"file": file.name, "class_label": label, "class_name": name, "seed": options.seed + number})

    files = []
    if len(drawn.kept) > 0:
        with atomic_file(output_dir / "grid.png") as writing:
            image_grid(drawn.kept, names[: len(drawn.kept)], options.columns).save(writing)
        files.append("grid.png")
    if options.animation:
        frames = [image_grid(frame, names[: len(frame)], options.columns) for frame in drawn.frames()]
        save_animation(frames, output_dir / "denoising.gif", options.fps)
        files.append("denoising.gif")
    manifest = make_manifest(pipeline, options, drawn.timesteps, device) | {"files": files, "images": images}
    with atomic_file(output_dir / MANIFEST_NAME) as writing:
        writing.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    what = " and ".join(["the grid", "the animation"][: len(files)])
    print(f"{len(images)} images, {what} and {MANIFEST_NAME} are in {output_dir}")
    return output_dir


class _Recorder:
    """Draws images batch by batch and keeps the first ones, with their way from noise, for grid and animation."""

    def __init__(
        self, pipeline: ClassConditionalPipeline, options: GenerateOptions, sampler: Sampler, num_animated: int
    ):
        self.pipeline = pipeline
        self.options = options
        self.sampler = sampler
        self.kept: list[Image.Image] = []
        self.timesteps: list[float] = []
        self._num_animated = num_animated
        # for each step uint8 (images, height, width, channels) of each batch
        self._frames: list[list[np.ndarray]] = []

    def images(self, labels: list[int | None]) -> Iterator[Image.Image]:
        """The images in order."""
        options = self.options
        arguments = self.sampler.arguments(self.pipeline)
        num_batches = -(-len(labels) // options.batch_size)
        with tqdm(desc="drawing", unit="step") as progress_bar:
            for start in range(0, len(labels), options.batch_size):
                batch = labels[start : start + options.batch_size]

                def on_step_end(
                    pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any], start: int = start
                ) -> None:
                    progress_bar.total = num_batches * pipeline.num_timesteps
                    progress_bar.update()
                    self._record(step, start, tensors["latents"])

                output = self.pipeline(
                    batch,
                    generator=[torch.Generator().manual_seed(options.seed + start + i) for i in range(len(batch))],
                    callback_on_step_end=on_step_end,
                    **arguments,
                )
                self.kept.extend(output.images[: self._num_animated - len(self.kept)])
                yield from output.images
        self.timesteps = [float(timestep) for timestep in self.pipeline.scheduler.timesteps]

    def _record(self, step: int, start: int, latents: torch.Tensor) -> None:
        count = min(len(latents), self._num_animated - start)
        if not self.options.animation or count <= 0:
            return
        if step == len(self._frames):
            self._frames.append([])
        self._frames[step].append(to_pixels(self.pipeline, latents[:count]))

    def frames(self) -> Iterator[list[Image.Image]]:
        """The images after each step."""
        for batches in self._frames:
            yield [to_image(pixels) for batch in batches for pixels in batch]


def to_pixels(pipeline: ClassConditionalPipeline, latents: torch.Tensor) -> np.ndarray:
    """What images look like in the middle of drawing: uint8 (images, height, width, channels)."""
    pixels = pipeline.image_processor.postprocess(latents, output_type="np")
    return (pixels * 255).round().astype(np.uint8)


def requested_class_ids(pipeline: ClassConditionalPipeline, options: GenerateOptions) -> list[int | None]:
    """The class of each image that the options ask for; None is the null class.

    Raises:
        ValueError: If the model has no such class.
    """
    num_classes = pipeline.unet.config.num_class_embeds
    asked = options.class_labels
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
    """The id of a class that is given by its id or its name; None for null.

    Raises:
        ValueError: If there is none.
    """
    if label == "null":
        return None
    try:
        number = int(label)
    except ValueError:
        return pipeline.get_label_ids(label)[0]
    if not 0 <= number < num_classes:
        raise ValueError(f"class label {number} is out of range: ids go from 0 to {num_classes - 1}")
    return number


def class_caption(pipeline: ClassConditionalPipeline, label: int | None) -> str:
    """The name of a class, or its id where it has none; empty for the null class."""
    if label is None:
        return ""
    return (pipeline.config.id2label or {}).get(label, str(label))


def _make_room(output_dir: Path) -> None:
    """Removes what an earlier call wrote; refuses a folder with other things in it."""
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise ValueError(f"output_dir is {output_dir}, which is a file: name a folder")
    manifest_file = output_dir / MANIFEST_NAME
    if manifest_file.is_file():
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        earlier = [*manifest["files"], *(image["file"] for image in manifest["images"])]
        for name in earlier:
            (output_dir / Path(name).name).unlink(missing_ok=True)
        manifest_file.unlink()
    elif any(output_dir.iterdir()):
        raise ValueError(f"output_dir is {output_dir}, which holds other files: name a new or an empty folder")


def make_manifest(
    pipeline: ClassConditionalPipeline, options: GenerateOptions, timesteps: list[float], device: torch.device
) -> dict[str, Any]:
    """How the images were drawn, as JSON values; the images themselves are not in it yet."""
    return {
        "versions": {
            "imagenet64_diffusion": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "model": options.model,
        "device": str(device),
        "options": asdict(options),
        "scheduler": {"class": type(pipeline.scheduler).__name__, "config": plain_config(pipeline.scheduler.config)},
        "timesteps": timesteps,
        "note": "each image is drawn from noise of torch.Generator().manual_seed(seed) on the CPU",
    }


def plain_config(config: Any) -> dict[str, Any]:
    """A config as JSON holds it, without diffusers' own entries."""
    return json.loads(
        json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, default=str)
    )
