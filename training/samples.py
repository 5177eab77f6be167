"""The sample grid of a training run: the same classes and the same noise every time, so that grids can be compared."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from PIL import Image

from ..pipelines.image_grid import image_grid, to_image
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from .options import TrainOptions


def sample_grid(
    pipeline: ClassConditionalPipeline, options: TrainOptions, accelerator: Accelerator
) -> Image.Image | None:
    """Generates the grid, each rank its share; None but in the main process."""
    num_classes = pipeline.unet.config.num_class_embeds
    count = min(options.num_sample_classes, num_classes or options.num_sample_classes)
    classes = [None if num_classes is None else index * num_classes // count for index in range(count)]
    labels = [label for label in classes for _ in range(options.num_samples_per_class)]
    mine = range(len(labels))[accelerator.process_index :: accelerator.num_processes]
    images: list[tuple[int, Image.Image]] = []
    for start in range(0, len(mine), options.train_batch_size):
        batch = mine[start : start + options.train_batch_size]
        generated: Any = pipeline(
            [labels[index] for index in batch],
            guidance_scale=options.guidance_scale,
            num_inference_steps=min(options.num_inference_steps, cast(int, options.num_train_timesteps)),
            # on the CPU, where the noise is the same on every machine
            generator=[torch.Generator().manual_seed(options.seed + index) for index in batch],
            output_type="np",
        ).images
        # the first three channels, or one
        channels = 3 if generated.shape[-1] >= 3 else 1
        pixels = (generated[..., :channels] * 255).round().astype("uint8")
        images.extend(zip(batch, map(to_image, pixels), strict=True))
    images = sorted(gather_object(images), key=lambda pair: pair[0])
    if not accelerator.is_main_process:
        return None
    names = pipeline.config.id2label or {}
    captions = [names.get(label, "") for label in labels]
    return image_grid([image for _, image in images], captions, columns=options.num_samples_per_class)


@contextlib.contextmanager
def ema_weights(unet: torch.nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """Inside, the network has the EMA weights, if there are any, and evaluates."""
    parameters = list(unet.parameters())
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    unet.eval()
    try:
        yield
    finally:
        unet.train()
        if ema is not None:
            ema.restore(parameters)
