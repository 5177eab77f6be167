"""How long the Frechet distance takes at the size of Inception features, beside clean-fid (extra "eval")."""

import warnings
from functools import partial

import numpy as np
from cleanfid import fid
from performance_page import publish
from report import alternate_seconds, parse_options, ratios_to, spread

from imagenet64_diffusion.evaluation import FeatureStatistics, frechet_distance


def make_features(num_images: int, num_features: int, seed: int) -> np.ndarray:
    """Normal features, float32 (images, features), the variances of whose directions fall off by a power."""
    rng = np.random.default_rng(seed)
    deviations = np.arange(1, num_features + 1) ** -0.7
    mixing = (rng.standard_normal((num_features, num_features)) * deviations / num_features**0.5).astype(np.float32)
    features = rng.standard_normal((num_images, num_features), dtype=np.float32) @ mixing.T
    return features + 0.1 * rng.standard_normal(num_features, dtype=np.float32)


def main() -> None:
    options = parse_options(
        __doc__,
        num_images=("images of each set", 10_000, 500),
        num_features=("numbers of each feature", 2048, 32),
        rounds=("times that each function is called", 3),
    )
    # clean-fid passes an argument to scipy that scipy will drop
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="cleanfid")
    moments: list[np.ndarray] = []
    for seed in (0, 1):
        gathered = FeatureStatistics(options.num_features)
        gathered.update(make_features(options.num_images, options.num_features, seed))
        moments += (gathered.mean, gathered.covariance)
    calls = {"ours": partial(frechet_distance, *moments), "clean-fid": partial(fid.frechet_distance, *moments)}
    values = {name: call() for name, call in calls.items()}
    seconds = alternate_seconds(calls, options.rounds, warmup=0)
    ratio, difference = ratios_to("ours", seconds)["clean-fid"], abs(values["ours"] / values["clean-fid"] - 1)
    blocks = [
        f"The distance of two sets of {options.num_features} features of {options.num_images:,} images. The relative"
        f" difference of the values is {difference:.1e}.",
        (
            "",
            {"seconds": {name: spread(each) for name, each in seconds.items()}, "relative time": {"clean-fid": ratio}},
        ),
    ]
    publish("frechet", options, blocks, ("clean-fid", "numpy", "scipy"))


if __name__ == "__main__":
    main()
