"""How fast random batches come from a prepared folder, beside PNG files, which image datasets usually are, and a plain
numpy memory map, which is about what the machine can do. The page cache is warm."""

import pickle
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from performance_page import publish
from report import alternate, parse_options, timer

from imagenet64_diffusion.data.dataset import PreparedImages
from imagenet64_diffusion.data.preparation import write_prepared
from imagenet64_diffusion.data.published_source import PublishedSource


BATCH_SIZE, ROUNDS = 128, 5


def measure(folder: Path, num_images: int, seconds: float) -> dict[str, float]:
    """Writes the images in each form and reads them; returns form -> images per second."""
    generator = np.random.default_rng(0)
    # noise, which PNG cannot make smaller
    pixels = generator.integers(0, 256, (num_images, 3 * 64 * 64), dtype=np.uint8)
    labels = [index % 1000 + 1 for index in range(num_images)]
    (folder / "train_data_batch_1").write_bytes(pickle.dumps({"data": pixels, "labels": labels}, protocol=4))
    write_prepared(folder / "prepared", PublishedSource([folder]))
    np.save(folder / "pixels.npy", pixels)
    mapped = np.load(folder / "pixels.npy", mmap_mode="r")
    # PNG is slow to write too, and a tenth of the images is as random
    few = num_images // 10
    arrays = pixels[:few].reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1)
    png = datasets.Dataset.from_generator(
        lambda: ({"image": array} for array in arrays),
        features=datasets.Features({"image": datasets.Image()}),
        cache_dir=str(folder / "cache"),
    )

    def read_png(indices: list[int]) -> torch.Tensor:
        images = png[[index % few for index in indices]]["image"]
        return torch.from_numpy(np.stack([np.asarray(image) for image in images]))

    readers: dict[str, Callable[[list[int]], object]] = {
        "prepared folder": PreparedImages(folder / "prepared").__getitems__,
        "prepared folder, in memory": PreparedImages(folder / "prepared", in_memory=True).__getitems__,
        "Image column (PNG)": read_png,
        "numpy memory map": lambda indices: torch.from_numpy(mapped[indices]),
    }
    batches = generator.integers(0, num_images, (200, BATCH_SIZE)).tolist()

    def rate(read: Callable[[list[int]], object]) -> float:
        count, begin = 0, timer()
        while timer() - begin < seconds / ROUNDS:
            read(batches[count % len(batches)])
            count += 1
        return count * BATCH_SIZE / (timer() - begin)

    found = alternate({name: lambda read=read: rate(read) for name, read in readers.items()}, ROUNDS)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    options = parse_options(
        __doc__, num_images=("images of 12 KB", 50_000, 500), seconds=("how long to read each form", 5.0, 0.05)
    )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(Path(folder), options.num_images, options.seconds)
    about = f"Random batches of {BATCH_SIZE} of {options.num_images:,} images of 64x64x3, one process:"
    ratios = {name: rates["prepared folder"] / rate for name, rate in rates.items()}
    columns = {"images/s": rates, "relative speed of the prepared folder": ratios}
    publish("data", options, [about, ("", columns)], ("datasets", "numpy", "pillow", "pyarrow"))


if __name__ == "__main__":
    main()
