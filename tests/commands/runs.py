"""Running the command lines as their users do."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from imagenet64_diffusion.prepare_imagenet64 import PrepareOptions, prepare


ROOT = Path(__file__).parents[2]


def run_script(name: str, *arguments, processes: int = 1, **options) -> subprocess.CompletedProcess:
    """Runs a script of the root in a process of its own, under accelerate where there are to be several."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable]
    if processes > 1:
        # accelerate launch --cpu starts one process whatever --num_processes says, unless it is given MPI. Its
        # launcher of several processes is called --multi_gpu, and with ACCELERATE_USE_CPU they are CPU processes.
        environment["ACCELERATE_USE_CPU"] = "true"
        launcher += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_port", "0"]
    command = [*launcher, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, **{"check": False, **options}
    )


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
