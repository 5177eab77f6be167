"""How fast random batches of 128 come from a prepared folder, in one process with the page cache warm.

Beside it, in the same run on the same images: an Image column of PNG files, which is what image datasets usually are,
and a plain numpy memory map, which is about what the machine can do. The pixels are noise, which PNG cannot make
smaller. Figures of different machines compare only as ratios. Prints a table and writes
benchmarks/results/data-<processor>.json.
"""

import argparse
import pathlib
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable

import datasets
import numpy as np
import torch
from report import add_options, choose_sizes, results_dir, write_result

from imagenet64_diffusion.data.dataset import PreparedImages
from imagenet64_diffusion.data.preparation import write_prepared
from imagenet64_diffusion.data.published_source import PublishedSource


BATCH_SIZE = 128


def images_per_second(read: Callable[[list[int]], object], num_images: int, seconds: float) -> float:
    """Returns the median over five stretches of reading batches of random indices."""
    generator = np.random.default_rng(0)
    batches = [generator.integers(0, num_images, BATCH_SIZE).tolist() for _ in range(200)]
    for indices in batches[:20]:
        read(indices)
    rates = []
    for _ in range(5):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds / 5:
            read(batches[count % len(batches)])
            count += 1
        rates.append(count * BATCH_SIZE / (time.perf_counter() - start))
    return statistics.median(rates)


def measure(folder: pathlib.Path, num_images: int, seconds: float) -> dict[str, float]:
    """Writes the images in each form and reads them.

    Returns:
        Form -> images per second.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (num_images, 3 * 64 * 64), dtype=np.uint8)
    labels = [index % 1000 + 1 for index in range(num_images)]
    with (folder / "train_data_batch_1").open("wb") as file:
        pickle.dump({"data": pixels, "labels": labels}, file, protocol=4)
    write_prepared(folder / "prepared", PublishedSource([folder]))

    np.save(folder / "pixels.npy", pixels)
    mapped = np.load(folder / "pixels.npy", mmap_mode="r")

    # PNG is slow to write too, and a tenth of the images is as random
    few = num_images // 10
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    arrays = pixels[:few].reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1)
    png = datasets.Dataset.from_generator(
        lambda: ({"image": array, "label": 0} for array in arrays),
        features=features,
        cache_dir=str(folder / "cache"),
    )

    def read_png(indices: list[int]) -> torch.Tensor:
        images = png[[index % few for index in indices]]["image"]
        return torch.from_numpy(np.stack([np.asarray(image) for image in images]))

    readers = {
        "prepared folder": PreparedImages(folder / "prepared").__getitems__,
        "prepared folder, in memory": PreparedImages(folder / "prepared", in_memory=True).__getitems__,
        "Image column (PNG)": read_png,
        "numpy memory map": lambda indices: torch.from_numpy(mapped[indices]),
    }
    return {name: images_per_second(read, num_images, seconds) for name, read in readers.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=int, help="images to write (default: 50000, 0.6 GB)")
    parser.add_argument("--seconds", type=float, help="how long to read each form (default: 5)")
    add_options(parser)
    options = parser.parse_args()
    choose_sizes(options, num_images=(50_000, 500), seconds=(5.0, 0.05))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(pathlib.Path(folder), options.num_images, options.seconds)
    reference = rates["prepared folder"]
    print(f"{'random batches of 128, 64x64x3':30} {'images/s':>10} {'prepared folder is':>20}")
    for name, rate in rates.items():
        print(f"{name:30} {rate:10,.0f} {reference / rate:16.2f} x")
    result = {
        "batch_size": BATCH_SIZE,
        "num_images": options.num_images,
        "images_per_second": {name: round(rate) for name, rate in rates.items()},
        "ratio_of_prepared_folder_to": {name: round(reference / rate, 3) for name, rate in rates.items()},
    }
    write_result("data", result, ("datasets", "numpy", "pillow", "pyarrow", "torch"), results_dir(options))


if __name__ == "__main__":
    main()
