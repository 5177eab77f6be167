"""The sample grid of a training run: the same classes and the same noise every time, so that grids can be compared."""

from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from ..pipelines.image_grid import image_grid
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from .options import TrainOptions


def draw_sample_grid(
    pipeline: ClassConditionalPipeline, options: TrainOptions, accelerator: Accelerator
) -> Image.Image | None:
    """Draws the grid, each process its share.

    Returns:
        The grid in the main process, None in the others.
    """
    labels = _labels(pipeline, options)
    mine = range(len(labels))[accelerator.process_index :: accelerator.num_processes]
    images: list[tuple[int, Image.Image]] = []
    for start in range(0, len(mine), options.train_batch_size):
        batch = mine[start : start + options.train_batch_size]
        # drawn on the CPU, the noise is the same on every machine
        generators = [torch.Generator().manual_seed(options.seed + index) for index in batch]
        drawn: Any = pipeline(
            [labels[index] for index in batch],
            guidance_scale=options.guidance_scale,
            num_inference_steps=min(options.num_inference_steps, cast(int, options.num_train_timesteps)),
            generator=generators,
            output_type="np",
        ).images
        images.extend(zip(batch, _to_pictures(drawn), strict=True))
    images = sorted(gather_object(images), key=lambda pair: pair[0])
    if not accelerator.is_main_process:
        return None
    names = pipeline.config.id2label or {}
    captions = [names.get(label, "") for label in labels]
    return image_grid([image for _, image in images], captions, columns=options.num_samples_per_class)


def _to_pictures(images: np.ndarray) -> list[Image.Image]:
    """Pictures of images in [0, 1], (images, height, width, channels): grey, or of the first three channels."""
    channels = images.shape[-1]
    shown = images[..., :3] if channels >= 3 else images[..., :1].repeat(3, axis=-1)
    return [Image.fromarray(image) for image in (shown * 255).round().astype(np.uint8)]


def _labels(pipeline: ClassConditionalPipeline, options: TrainOptions) -> list[int | None]:
    """Classes spread evenly over all, each as often as the grid has columns."""
    num_classes = pipeline.unet.config.num_class_embeds
    if num_classes is None:
        return [None] * (options.num_sample_classes * options.num_samples_per_class)
    count = min(options.num_sample_classes, num_classes)
    classes = [index * num_classes // count for index in range(count)]
    return [label for label in classes for _ in range(options.num_samples_per_class)]
