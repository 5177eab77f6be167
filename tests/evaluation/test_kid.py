"""KID against the estimator written out, and against clean-fid's function."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from cleanfid import fid

from imagenet64_diffusion.evaluation import kernel_distance


def random_features(num_images, shift=0.0, seed=0, num_features=12):
    return np.random.default_rng(seed).standard_normal((num_images, num_features)) + shift


def brute_force(rows_a, rows_b):
    """The unbiased estimator of the KID paper, one pair after the other."""

    def kernel(x, y):
        return (sum(float(a) * float(b) for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3

    size = len(rows_a)
    total = 0.0
    for i, j in product(range(size), repeat=2):
        if i != j:
            total += (kernel(rows_a[i], rows_a[j]) + kernel(rows_b[i], rows_b[j])) / (size * (size - 1))
        total -= 2 * kernel(rows_a[i], rows_b[j]) / size**2
    return total


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_estimator(shift):
    a, b = random_features(25, seed=1), random_features(25, shift, seed=2)
    estimate = kernel_distance(a, b)
    assert estimate.mean == pytest.approx(brute_force(a, b), abs=1e-12)
    assert estimate.standard_deviation == 0


def test_clean_fid_of_the_whole_set():
    a, b = random_features(200, seed=1, num_features=64), random_features(200, 0.1, seed=2, num_features=64)
    assert kernel_distance(a, b).mean == pytest.approx(fid.kernel_distance(a, b, num_subsets=1), rel=1e-10)


def test_subsets():
    """Each takes its images without replacement, of both sets, and the mean and the spread are over them."""
    a, b = random_features(9, seed=1), random_features(7, 0.4, seed=2)
    rng = np.random.default_rng(5)
    each = []
    for _ in range(6):
        rows_a = a[rng.choice(9, 4, replace=False)]
        rows_b = b[rng.choice(7, 4, replace=False)]
        each.append(brute_force(rows_a, rows_b))
    estimate = kernel_distance(a, b, num_subsets=6, max_subset_size=4, seed=5)
    assert estimate.mean == pytest.approx(np.mean(each), abs=1e-12)
    assert estimate.standard_deviation == pytest.approx(np.std(each), abs=1e-12)


def test_subsets_estimate_the_distance_without_bias():
    """Between normal distributions it is known, by the moments of a product of two normal numbers."""
    a, b = random_features(4000, seed=1), random_features(4000, seed=2)
    estimate = kernel_distance(a, b, num_subsets=200, max_subset_size=50)
    assert abs(estimate.mean) < 4 * estimate.standard_deviation / math.sqrt(200)
    # y = x' + s in each of D features: with p = x.y/D, E (1 + p)^3 = 1 + 3 E p + 3 E p^2 + E p^3
    features, shift = 12, 0.5

    def expected_kernel(mean_x, mean_y):
        """Of x ~ N(mean_x 1, I) and y ~ N(mean_y 1, I): x.y is a sum of D independent products."""
        first = mean_x * mean_y
        second = (1 + mean_x**2) * (1 + mean_y**2)
        third = (mean_x**3 + 3 * mean_x) * (mean_y**3 + 3 * mean_y)
        variance = second - first**2
        skew = third - 3 * first * second + 2 * first**3
        mean_p, variance_p, skew_p = first, variance / features, skew / features**2
        moment_2 = variance_p + mean_p**2
        moment_3 = skew_p + 3 * mean_p * variance_p + mean_p**3
        return 1 + 3 * mean_p + 3 * moment_2 + moment_3

    expected = expected_kernel(0, 0) + expected_kernel(shift, shift) - 2 * expected_kernel(0, shift)
    estimate = kernel_distance(a, b + shift, num_subsets=200, max_subset_size=200)
    assert estimate.mean == pytest.approx(expected, rel=0.1)


def test_seed():
    a, b = random_features(50, seed=1), random_features(60, 0.3, seed=2)
    options = {"num_subsets": 5, "max_subset_size": 20}
    assert kernel_distance(a, b, **options) == kernel_distance(a, b, **options, seed=0)
    assert kernel_distance(a, b, **options, seed=1) != kernel_distance(a, b, **options, seed=0)


def test_memory_maps_and_tensors(tmp_path):
    a, b = (random_features(80, seed=seed).astype(np.float32) for seed in (1, 2))
    options = {"num_subsets": 3, "max_subset_size": 30}
    expected = kernel_distance(a.astype(np.float64), b.astype(np.float64), **options)
    np.save(tmp_path / "a.npy", a)
    assert kernel_distance(np.load(tmp_path / "a.npy", mmap_mode="r"), torch.from_numpy(b), **options) == expected


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (np.ones((9, 11)), {}, "features_a has 12 features an image and features_b has 11"),
        (np.ones((1, 12)), {}, "features_b has 1 images, but at least 2 are needed"),
        (np.ones(12), {}, r"features_b must have the shape"),
        (np.full((9, 12), np.nan), {}, "a subset of features_b must be finite"),
        (np.ones((9, 12)), {"num_subsets": 0}, "num_subsets must be at least 1"),
        (np.ones((9, 12)), {"max_subset_size": 1}, "max_subset_size must be at least 2"),
    ],
)
def test_what_is_refused(features, options, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(random_features(9), features, **options)
