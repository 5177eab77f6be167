"""How long the Frechet distance takes at the size of Inception features, and the statistics that go into it.

Ours and clean-fid's function (the extra "eval") get the same arrays alternately in one process: the covariances of
10,000 correlated random features of 2048 numbers. OMP_NUM_THREADS sets the threads of both. Writes
benchmarks/results/frechet-<processor>.json.
"""

import statistics
import warnings
from functools import partial

import numpy as np
from cleanfid import fid
from performance_page import publish
from report import alternate, parse_options, seconds_of

from imagenet64_diffusion.evaluation import FeatureStatistics, frechet_distance


BATCH_SIZES = (64, 256, 512)


def make_features(num_images: int, num_features: int, seed: int) -> np.ndarray:
    """Normal features, float32 (images, features), the variances of whose directions fall off by a power."""
    rng = np.random.default_rng(seed)
    deviations = np.arange(1, num_features + 1) ** -0.7
    mixing = (rng.standard_normal((num_features, num_features)) * deviations / num_features**0.5).astype(np.float32)
    features = rng.standard_normal((num_images, num_features), dtype=np.float32) @ mixing.T
    return features + 0.1 * rng.standard_normal(num_features, dtype=np.float32)


def statistics_of(features: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance, gathered by the batch."""
    gathered = FeatureStatistics(features.shape[1])
    for first in range(0, len(features), batch_size):
        gathered.update(features[first : first + batch_size])
    return gathered.mean, gathered.covariance


def main() -> None:
    """The command line."""
    options = parse_options(
        __doc__,
        num_images=(10_000, 500, "images of each set"),
        num_features=(2048, 32, "numbers of each feature"),
        rounds=(3, 3, "times that each function is called"),
    )
    # clean-fid passes an argument to scipy that scipy will drop
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="cleanfid")
    features = [make_features(options.num_images, options.num_features, seed) for seed in (0, 1)]
    moments = [moment for each in features for moment in statistics_of(each, 512)]
    functions = {"ours": frechet_distance, "clean-fid": fid.frechet_distance}
    values = {name: function(*moments) for name, function in functions.items()}
    calls = {name: partial(seconds_of, partial(function, *moments)) for name, function in functions.items()}
    seconds = alternate(calls, options.rounds, warmup=0)
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["clean-fid"], strict=True)]
    gathering = alternate(
        {str(size): partial(seconds_of, partial(statistics_of, features[0], size)) for size in BATCH_SIZES}, rounds=5
    )
    figures = {
        "num_features": options.num_features,
        "num_images": options.num_images,
        "seconds": {name: [round(value, 3) for value in each] for name, each in seconds.items()},
        "ratio_of_clean_fid_to_ours": {
            "median": round(statistics.median(ratios), 2),
            "smallest": round(min(ratios), 2),
            "largest": round(max(ratios), 2),
        },
        "relative_difference": float(f"{abs(values['ours'] / values['clean-fid'] - 1):.2g}"),
        "statistics_images_per_second": {
            size: round(options.num_images / statistics.median(each)) for size, each in gathering.items()
        },
    }
    publish("frechet", figures, options, ["clean-fid", "numpy", "scipy"])


if __name__ == "__main__":
    main()
