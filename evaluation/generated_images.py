"""Images that a model generates, as a source like any other: image i is always the same."""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.dataset import PreparedImages
from ..pipelines.generation import class_id, open_model, plain_config, sample_images, weights_digest
from ..pipelines.loading import download_snapshot
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..pipelines.sampler import Sampler


# keeps the random classes apart from the noise, which comes from the same seed
_CLASS_STREAM = 0xC1A55


class GeneratedImages:
    """Images that a model generates, by their number.

    Image i is made of the noise of ``torch.Generator().manual_seed(seed + i)`` on the CPU and has a class that is a
    function of i. So rank and batch do not matter, beyond what rounding in the network leaves.

    Args:
        model: Pipeline folder or Hub id.
        sampler: How to generate them.
        num_images: How many there are, at least 1.
        class_labels: ``["uniform"]``: image i has class i modulo the number of classes; ``["frequencies"]``: classes
            come as often as ``class_counts`` says; or classes by id or name, of which image i has the i-th, and
            again from the first. ``null`` is the null class.
        class_counts: Images of each class in a dataset, (num_classes,).
        seed: Seed of image 0.
        device: Where to generate them.
        dtype: What the network computes in.
        revision: Commit of the Hub repository, as `find_revision` gives it.

    Attributes:
        pipeline: The model.
        image_size: (channels, height, width) of every image.
        description: All that the images depend on, as JSON values.

    Raises:
        ValueError: If the settings do not fit the model.
        OSError: If the model cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        sampler: Sampler,
        num_images: int,
        *,
        class_labels: Sequence[str] = ("uniform",),
        class_counts: np.ndarray | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
    ):
        self.pipeline, self._sampler = open_model(model, sampler, device, dtype, revision=revision), sampler
        scheduler, config = self.pipeline.scheduler, self.pipeline.unet.config
        if sampler.eta and "eta" not in inspect.signature(scheduler.step).parameters:
            # the number would be known by a setting that it does not depend on
            raise ValueError(f"eta is {sampler.eta:g}, but {type(scheduler).__name__} takes none: leave it 0")
        self.model, self.seed = str(model), seed
        size = config.sample_size
        self.image_size = (config.in_channels, *((size, size) if isinstance(size, int) else size))
        arguments = sampler.arguments(self.pipeline)
        self._labels = _choose_classes(self.pipeline, class_labels, class_counts, num_images, seed)
        counts = class_counts.tolist() if class_counts is not None and list(class_labels) == ["frequencies"] else None
        self.description: dict[str, Any] = {
            "model": self.model,
            "revision": revision,
            "weights_sha256": weights_digest(self.pipeline.unet),
            "scheduler": type(scheduler).__name__,
            "scheduler_config": plain_config(scheduler.config),
            **plain_config(dataclasses.asdict(sampler) | arguments | {"scheduler": type(scheduler).__name__}),
            "class_labels": list(class_labels),
            "class_counts": counts,
            "seed": seed,
            "num_images": num_images,
            "image_size": list(self.image_size),
            "dtype": str(dtype).removeprefix("torch."),
            "num_classes": config.num_class_embeds,
            "id2label": plain_config(self.pipeline.config).get("id2label"),
        }

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Generates the images from start to stop.

        Returns:
            uint8 (stop - start, channels, height, width), and int64 (stop - start,), -1 for the null class; None for a
            model without classes. They are the pixels that generate_images.py writes.

        Raises:
            ValueError: If the model generates something that is not finite, or an option does not fit its scheduler.
        """
        labels = self._labels[start:stop]
        generated = sample_images(self.pipeline, self._sampler, labels, self.seed + start, output_type="pt")
        broken = ~generated.flatten(1).isfinite().all(dim=1)
        if broken.any():
            index = start + int(broken.nonzero()[0])
            scheduler = type(self.pipeline.scheduler).__name__
            raise ValueError(
                f"{self.model} generates image {index} with values that are not finite, under {scheduler}"
            )
        # as they would be read from files
        pixels = (generated.float() * 255).round().to(torch.uint8).cpu()
        if self.pipeline.unet.config.num_class_embeds is None:
            return pixels, None
        return pixels, torch.tensor([-1 if label is None else label for label in labels])


def find_revision(model: str) -> str | None:
    """The commit that a Hub id stands for now; None for a folder.

    Raises:
        OSError: If there is neither such a folder nor such a repository, or it cannot be reached.
    """
    if Path(model).is_dir():
        return None
    # the folder of a snapshot has the name of its commit
    return download_snapshot(model, [ClassConditionalPipeline.config_name]).name


def _choose_classes(
    pipeline: ClassConditionalPipeline,
    asked: Sequence[str],
    class_counts: np.ndarray | None,
    num_images: int,
    seed: int,
) -> list[int | None]:
    """The class of each image; None is the null class."""
    num_classes = pipeline.unet.config.num_class_embeds
    if num_classes is None:
        if list(asked) not in (["uniform"], ["null"]):
            raise ValueError(f"class_labels is {' '.join(asked)}, but the model has no classes: leave it out")
        return [None] * num_images
    if list(asked) == ["uniform"]:
        return [index % num_classes for index in range(num_images)]
    if list(asked) == ["frequencies"]:
        if class_counts is None:
            raise ValueError("class_labels is frequencies, which needs train_data_dir, a prepared dataset")
        if len(class_counts) != num_classes:
            raise ValueError(f"train_data_dir has {len(class_counts)} classes, but the model has {num_classes}")
        # all at once, and so the same whatever part of them is generated
        uniforms = np.random.default_rng([_CLASS_STREAM, seed]).random(num_images)
        cumulative = np.cumsum(class_counts) / np.sum(class_counts)
        # class k where cumulative[k - 1] <= u < cumulative[k]
        return np.searchsorted(cumulative, uniforms, side="right").tolist()
    chosen = [class_id(pipeline, label, num_classes) for label in asked]
    return [chosen[index % len(chosen)] for index in range(num_images)]


def count_classes(folder: str | Path) -> np.ndarray:
    """Images of each class in a prepared dataset, int64 (num_classes,).

    Raises:
        ValueError: If the folder is not a whole prepared dataset.
    """
    images = PreparedImages(folder)
    return np.bincount(images.labels(), minlength=images.num_classes)
