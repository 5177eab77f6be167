"""What several tests of the commands train on."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from imagenet64_diffusion.prepare_imagenet64 import PrepareOptions, prepare


ROOT = Path(__file__).parents[2]


def prepare_noise(folder: Path, size: int, channels: int, num_images: int = 12) -> Path:
    """Prepares images of noise of three classes."""
    shape = (num_images, size, size, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8).squeeze()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [Image.fromarray(image) for image in pixels], "label": [index % 3 for index in range(num_images)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "images")
    return prepare(
        PrepareOptions(
            source="dataset",
            input=[str(folder / "images")],
            output_dir=str(folder / "data"),
            resolution=size,
            color_mode="rgb" if channels == 3 else "grayscale",
        )
    )
