"""How long the Frechet distance takes at the size of Inception features, and the statistics that go into it.

Ours and clean-fid's function (the extra "eval") get the same arrays, alternating, in one process: the
covariances of 10,000 correlated random features of 2048 numbers. OMP_NUM_THREADS sets the threads of both.
Figures of different machines compare only as ratios. Prints a table and writes
benchmarks/results/frechet-<processor>.json.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cleanfid import fid
from report import add_options, results_dir, write_result

from imagenet64_diffusion.evaluation import FeatureStatistics, frechet_distance


BATCH_SIZES = (64, 256, 512)


def make_features(num_images: int, num_features: int, seed: int) -> np.ndarray:
    """Normal features, float32 (images, features), the variances of whose directions fall off by a power."""
    rng = np.random.default_rng(seed)
    deviations = np.arange(1, num_features + 1) ** -0.7
    mixing = (rng.standard_normal((num_features, num_features)) * deviations / num_features**0.5).astype(np.float32)
    features = rng.standard_normal((num_images, num_features), dtype=np.float32) @ mixing.T
    return features + 0.1 * rng.standard_normal(num_features, dtype=np.float32)


def seconds_of(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Returns how long a call took, and its result."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def measure_updates(features: np.ndarray) -> dict[str, int]:
    """Images per second that statistics take in, the median of five passes, for each size of the batches."""
    rates = {}
    for batch_size in BATCH_SIZES:
        each = []
        for _ in range(5):
            gathered = FeatureStatistics(features.shape[1])
            start = time.perf_counter()
            for first in range(0, len(features), batch_size):
                gathered.update(features[first : first + batch_size])
            # the last block joins the others when they are asked for
            _ = gathered.mean
            each.append(len(features) / (time.perf_counter() - start))
        rates[str(batch_size)] = round(statistics.median(each))
    return rates


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=int, help="images of each set (default: 10000)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each function is called (default: 3)")
    add_options(parser)
    options = parser.parse_args()
    num_features = 32 if options.small else 2048
    num_images = options.num_images or (500 if options.small else 10_000)
    # clean-fid passes an argument to scipy that scipy will drop
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="cleanfid")

    moments = []
    for seed in (0, 1):
        gathered = FeatureStatistics(num_features)
        features = make_features(num_images, num_features, seed)
        gathered.update(features)
        moments += [gathered.mean, gathered.covariance]
    updates = measure_updates(features)

    seconds: dict[str, list[float]] = {"ours": [], "clean-fid": []}
    values = {}
    for _ in range(options.rounds):
        for name, function in (("ours", frechet_distance), ("clean-fid", fid.frechet_distance)):
            taken, values[name] = seconds_of(function, *moments)
            seconds[name].append(taken)
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["clean-fid"], strict=True)]
    difference = abs(values["ours"] - values["clean-fid"]) / values["clean-fid"]

    print(f"{f'Frechet distance of {num_features} features':32} {'seconds (median)':>18} {'value':>20}")
    for name, each in seconds.items():
        print(f"{name:32} {statistics.median(each):18.2f} {values[name]:20.12f}")
    spread = f"from {min(ratios):.1f} to {max(ratios):.1f}"
    print(f"ours is {statistics.median(ratios):.1f} times as fast ({spread}); relative difference {difference:.1e}")
    for batch_size, rate in updates.items():
        print(f"{f'statistics, batches of {batch_size}':32} {rate:9,} images/s")
    result = {
        "num_features": num_features,
        "num_images": num_images,
        "threads": torch.get_num_threads(),
        "seconds": {name: [round(value, 3) for value in each] for name, each in seconds.items()},
        "ratio_of_clean_fid_to_ours": {
            "median": round(statistics.median(ratios), 2),
            "smallest": round(min(ratios), 2),
            "largest": round(max(ratios), 2),
        },
        "relative_difference": float(f"{difference:.2g}"),
        "statistics_images_per_second": updates,
    }
    write_result("frechet", result, ("clean-fid", "numpy", "scipy", "torch"), results_dir(options))


if __name__ == "__main__":
    main()
