"""The kernel distance between two sets of features, which on Inception features is called KID."""

from typing import NamedTuple

import numpy as np

from .feature_arrays import FeatureRows, check_finite, check_pair, to_float64


class KernelDistance(NamedTuple):
    """An estimate over random subsets.

    Attributes:
        mean: The mean over the subsets. The estimate is unbiased, so that between equal distributions it is
            around 0 and may be negative.
        standard_deviation: The standard deviation over the subsets (divided by their number), 0 for one
            subset. It is the spread of one subset's estimate and not the error of the mean, which cannot be
            told from subsets that share images.
    """

    mean: float
    standard_deviation: float


def kernel_distance(
    features_a: FeatureRows,
    features_b: FeatureRows,
    num_subsets: int = 100,
    max_subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """Estimates the squared maximum mean discrepancy under the kernel ``(x . y / features + 1)^3``.

    It is the KID of Binkowski et al. 2018 (https://arxiv.org/abs/1801.01401), section 4: the unbiased
    estimator of the squared MMD, the mean over random subsets. Each subset takes ``min(max_subset_size,
    images)`` images of either set, the same number of both, without replacement. Where that is all of both,
    one subset is enough and one is taken.

    Only the subsets are read, so that memory maps may be larger than memory; with 2048 features the memory is
    about 70 MB for subsets of 1000. The work is done in float64.

    Args:
        features_a: (images, features), at least 2 images, of any floating type.
        features_b: The same number of features, at least 2 images.
        num_subsets: At least 1.
        max_subset_size: At least 2.
        seed: Of the subsets; one seed, one result.

    Returns:
        The mean and the standard deviation over the subsets.

    Raises:
        ValueError: Shapes do not fit, a number is too small, or a row that was read has a NaN or an infinity.
    """
    check_pair(features_a, features_b, "features_a", "features_b", min_rows=2)
    if num_subsets < 1:
        raise ValueError(f"num_subsets must be at least 1, but is {num_subsets}")
    if max_subset_size < 2:
        raise ValueError(f"max_subset_size must be at least 2, but is {max_subset_size}")
    subset_size = min(len(features_a), len(features_b), max_subset_size)
    if len(features_a) == len(features_b) == subset_size:
        num_subsets = 1
    generator = np.random.default_rng(seed)
    estimates = []
    for _ in range(num_subsets):
        subset_a = _draw_rows(features_a, subset_size, generator, "features_a")
        subset_b = _draw_rows(features_b, subset_size, generator, "features_b")
        estimates.append(_unbiased_estimate(subset_a, subset_b))
    return KernelDistance(float(np.mean(estimates)), float(np.std(estimates)))


def _draw_rows(features: FeatureRows, size: int, generator: np.random.Generator, name: str) -> np.ndarray:
    # in the order of the file, which a disk reads faster; the estimate does not depend on it
    indices = np.sort(generator.choice(len(features), size, replace=False))
    rows = to_float64(features[indices])
    check_finite(rows, f"a subset of {name}")
    return rows


def _unbiased_estimate(rows_a: np.ndarray, rows_b: np.ndarray) -> float:
    """The squared MMD of two sets of one size, without the pairs of an image with itself."""
    size, num_features = rows_a.shape

    def sum_kernel(products: np.ndarray) -> float:
        return ((products / num_features + 1) ** 3).sum()

    def sum_of_pairs(rows: np.ndarray) -> float:
        return sum_kernel(rows @ rows.T) - sum_kernel((rows**2).sum(axis=1))

    within = (sum_of_pairs(rows_a) + sum_of_pairs(rows_b)) / (size * (size - 1))
    return within - 2 * sum_kernel(rows_a @ rows_b.T) / size**2
