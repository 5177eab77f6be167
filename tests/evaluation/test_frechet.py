"""The Frechet distance against closed forms, clean-fid's function and the original's formula."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid import fid

from imagenet64_diffusion.evaluation import frechet_distance


def rotation(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def random_moments(num_images, num_features, seed):
    """Of correlated features with a spectrum that falls off, as those of networks do."""
    rng = np.random.default_rng(seed)
    mixing = rotation(num_features, seed) * np.arange(1, num_features + 1) ** -0.7
    features = rng.standard_normal((num_images, num_features)) @ mixing.T + rng.standard_normal(num_features)
    return features.mean(axis=0), np.cov(features, rowvar=False)


@pytest.fixture(scope="module")
def full_rank():
    return *random_moments(400, 96, 1), *random_moments(500, 96, 2)


def distance_of_spectra(spectrum_a, spectrum_b):
    """Of two covariances with the same random eigenvectors and no means."""
    vectors, zero = rotation(len(spectrum_a)), np.zeros(len(spectrum_a))
    return frechet_distance(zero, vectors * spectrum_a @ vectors.T, zero, vectors * spectrum_b @ vectors.T)


def test_diagonal_covariances():
    # (2 - 5)^2 + (3 - 7)^2
    assert frechet_distance([2.0], [[9.0]], [5.0], [[49.0]]) == pytest.approx(25.0, rel=1e-14)
    rng = np.random.default_rng(0)
    mean_a, mean_b = rng.standard_normal((2, 50))
    deviation_a, deviation_b = rng.uniform(0.1, 4, (2, 50))
    distance = frechet_distance(mean_a, np.diag(deviation_a**2), mean_b, np.diag(deviation_b**2))
    expected = ((mean_a - mean_b) ** 2).sum() + ((deviation_a - deviation_b) ** 2).sum()
    assert distance == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("decades", [1, 6, 11])
@pytest.mark.parametrize("order", ["same", "reversed", "shuffled"])
def test_covariances_with_the_same_eigenvectors(decades, order):
    spectrum = np.logspace(0, -decades, 80)
    shuffled = np.random.default_rng(1).permutation(spectrum)
    other = {"same": 4 * spectrum, "reversed": spectrum[::-1], "shuffled": shuffled}[order]
    # where values span n decades, rounding of the matrices alone moves the roots of the smallest by 10^(n/2 - 16)
    expected = ((np.sqrt(spectrum) - np.sqrt(other)) ** 2).sum()
    assert distance_of_spectra(spectrum, other) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(1, 1), (1, 40), (10, 40), (25, 25), (39, 40)])
def test_low_rank(rank_a, rank_b):
    """Eigenvalues of exactly 0, as with fewer images than features; at first with no direction in common."""
    spectrum_a, spectrum_b = np.random.default_rng(0).uniform(1, 2, (2, 40))
    spectrum_a[rank_a:] = 0
    spectrum_b[: 40 - rank_b] = 0
    expected = ((np.sqrt(spectrum_a) - np.sqrt(spectrum_b)) ** 2).sum()
    assert distance_of_spectra(spectrum_a, spectrum_b) == pytest.approx(expected, rel=1e-12)


def test_rank_one_and_zero_covariances():
    # trace((a a^T b b^T)^(1/2)) = |a . b|
    a, b = np.random.default_rng(0).standard_normal((2, 30))
    expected, zero = a @ a + b @ b - 2 * abs(a @ b), np.zeros(30)
    assert frechet_distance(zero, np.outer(a, a), zero, np.outer(b, b)) == pytest.approx(expected, rel=1e-12)
    (mean, covariance), zero = random_moments(30, 12, 0), np.zeros((12, 12))
    assert frechet_distance(mean, zero, mean + 2, zero) == pytest.approx(48, rel=1e-14)
    assert frechet_distance(mean, covariance, mean, zero) == pytest.approx(np.trace(covariance), rel=1e-14)


def test_equal_distributions():
    """Rounding goes either way, and is not allowed to make a distance negative."""
    for num_images, seed in itertools.product((5, 60, 61, 500), range(5)):
        mean, covariance = random_moments(num_images, 60, seed)
        assert 0 <= frechet_distance(mean, covariance, mean, covariance) < 1e-13 * np.trace(covariance)
    # half of the singular values are 1e-11 of the others, so that their squares are lost
    spectrum = np.where(np.arange(60) < 30, 1.0, 1e-11)
    assert distance_of_spectra(spectrum, spectrum) < 1e-12
    # rounding in float32 makes zero eigenvalues negative, which is no reason to refuse
    mean, covariance = random_moments(20, 60, 0)
    single = covariance.astype(np.float32)
    assert np.linalg.eigvalsh(single.astype(np.float64))[0] < 0
    assert frechet_distance(mean, single, mean, covariance) < 1e-3 * np.trace(covariance)


@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated")
def test_clean_fid_and_the_originals_formula(full_rank):
    assert frechet_distance(*full_rank) == pytest.approx(fid.frechet_distance(*full_rank), rel=1e-6)
    mean_a, covariance_a, mean_b, covariance_b = full_rank
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(covariance_a + covariance_b - 2 * root)
    assert frechet_distance(*full_rank) == pytest.approx(expected, rel=1e-6)


def test_symmetry_rotation_shift_and_scale(full_rank):
    mean_a, covariance_a, mean_b, covariance_b = full_rank
    distance, turn = frechet_distance(*full_rank), rotation(96, 7)
    for same in (
        (mean_b, covariance_b, mean_a, covariance_a),
        (mean_a + 3, covariance_a, mean_b + 3, covariance_b),
        (turn @ mean_a, turn @ covariance_a @ turn.T, turn @ mean_b, turn @ covariance_b @ turn.T),
    ):
        assert frechet_distance(*same) == pytest.approx(distance, rel=1e-12)
    scaled = (1e-6 * mean_a, 1e-12 * covariance_a, 1e-6 * mean_b, 1e-12 * covariance_b)
    assert frechet_distance(*scaled) == pytest.approx(1e-12 * distance, rel=1e-12)


def test_types(full_rank):
    distance = frechet_distance(*full_rank)
    assert isinstance(distance, float)
    assert frechet_distance(*(torch.from_numpy(value).requires_grad_() for value in full_rank)) == distance
    assert frechet_distance(*(value.astype(np.float32) for value in full_rank)) == pytest.approx(distance, rel=1e-4)
    for value in full_rank:
        value.setflags(write=False)
    assert frechet_distance(*full_rank) == distance


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, c, d: (a[:-1], b, c, d), r"must have the shapes .* but have \(95,\) and \(96, 96\)"),
        (lambda a, b, c, d: (a, b, c[None], d), r"mean_b and .* but have \(1, 96\) and \(96, 96\)"),
        (lambda a, b, c, d: (a, b, c[:9], d[:9, :9]), "mean_a has 96 features and mean_b has 9"),
        (lambda a, b, c, d: (a, np.triu(b), c, d), "mean_a and covariance_a must be finite and symmetric"),
        (lambda a, b, c, d: (a, b, c, d * np.nan), "covariance_b must be finite and .* differ by nan"),
        (lambda a, b, c, d: (a * np.inf, b, c, d), "mean_a and covariance_a must be finite"),
        (lambda a, b, c, d: (a, b, c, d - 1e-3 * np.trace(d) * np.eye(96)), "covariance_b .* negative eigenvalue -0"),
    ],
)
def test_what_is_refused(full_rank, change, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(*change(*full_rank))
