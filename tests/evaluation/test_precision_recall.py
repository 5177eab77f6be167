"""Precision, recall, density and coverage against their definitions and on sets with known answers."""

import numpy as np
import pytest
import torch

from imagenet64_diffusion.evaluation import density_and_coverage, feature_metrics, precision_and_recall


def normal(num_images, num_features=16, shift=0.0, seed=0):
    return np.random.default_rng(seed).standard_normal((num_images, num_features)) + shift


def squared_distances(a, b):
    return np.stack([np.square(row - b).sum(axis=1) for row in a])


def squared_radii(points, k):
    """To the k-th nearest neighbour; the nearest of all is the point."""
    return np.sort(squared_distances(points, points), axis=1)[:, k]


def brute_force(real, generated, k):
    """Precision, recall, density and coverage by the equations of their papers."""
    real, generated = real.astype(np.float64), generated.astype(np.float64)
    in_real = squared_distances(generated, real) <= squared_radii(real, k)
    in_generated = squared_distances(real, generated) <= squared_radii(generated, k)
    return (
        in_real.any(axis=1).mean(),
        in_generated.any(axis=1).mean(),
        in_real.sum() / (k * len(generated)),
        in_real.any(axis=0).mean(),
    )


def all_four(real, generated, k=5, **options):
    return (*precision_and_recall(real, generated, k, **options), *density_and_coverage(real, generated, k, **options))


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks, of unequal sizes, of few images."""
    monkeypatch.setattr(feature_metrics, "BLOCK", 64)


@pytest.mark.parametrize(("k", "dtype"), [(1, np.float64), (3, np.float32), (5, np.float16)])
@pytest.mark.usefixtures("small_blocks")
def test_definitions(k, dtype):
    real, generated = normal(300, seed=1).astype(dtype), normal(250, shift=0.3, seed=2).astype(dtype)
    expected = brute_force(real, generated, k)
    assert all(0 < value < 2 for value in expected)
    assert all_four(real, generated, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("small_blocks")
def test_equal_sets():
    """Each point lies in its own ball and in those of k others, sometimes at the very edge."""
    points = normal(150).astype(np.float32)
    assert all_four(points, points) == pytest.approx((1, 1, 6 / 5, 1), abs=1e-12)
    assert all_four(points, points[::-1].copy()) == pytest.approx((1, 1, 6 / 5, 1), abs=1e-12)


def test_disjoint_sets():
    assert all_four(normal(100, seed=1), normal(120, shift=100, seed=2)) == (0, 0, 0, 0)


def test_dropped_mode():
    """Generated images of one of two modes: all good, and half of the variety."""
    real = np.concatenate([normal(200, seed=1), normal(200, shift=50, seed=2)])
    generated = normal(400, seed=3)
    precision, recall = precision_and_recall(real, generated)
    density, coverage = density_and_coverage(real, generated)
    assert precision > 0.6
    assert 0.3 < recall <= 0.5
    assert 0.8 < density < 1.2
    assert 0.4 < coverage <= 0.5


def test_real_outlier():
    """The example of Naeem et al.: one outlier's ball takes in all that lies far off."""
    real = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [12.0, 0.0]])
    generated = np.array([[6.0, 0.1 * number] for number in range(10)])
    # the outlier's radius is about 11, the others' is 1, and the generated images are 6 from the outlier
    assert precision_and_recall(real, generated, k=1).precision == 1
    density, coverage = density_and_coverage(real, generated, k=1)
    assert density == 1
    assert coverage == pytest.approx(1 / 5)
    density, _ = density_and_coverage(real, generated, k=2)
    assert density == pytest.approx(1 / 2)


def test_generated_outlier():
    """One generated image far off makes recall perfect, and leaves coverage, whose balls are real, at 0."""
    real = normal(100, num_features=2, seed=1)
    generated = np.concatenate([normal(50, num_features=2, shift=30, seed=2), [[-40.0, -40.0]]])
    assert precision_and_recall(real, generated, k=3) == (0, 1)
    assert density_and_coverage(real, generated) == (0, 0)


@pytest.mark.parametrize(("scale", "offset"), [(1, 1e3), (1, 1e6), (1e-25, 0), (1e25, 0)])
def test_features_far_from_zero_tiny_and_huge(scale, offset):
    """Without centring, |x|^2 + |y|^2 - 2 x.y would lose its digits."""
    real, generated = normal(100, seed=1), normal(100, shift=0.3, seed=2)
    expected = brute_force(real, generated, 5)
    assert all_four(scale * real + offset, scale * generated + offset) == pytest.approx(expected, abs=1e-12)


def test_two_modes_far_apart():
    """No centre suits both."""
    real = np.concatenate([normal(200, seed=1), normal(180, shift=500, seed=2)])
    generated = np.concatenate([normal(150, seed=3), normal(150, shift=500.2, seed=4)])
    assert all_four(real, generated) == pytest.approx(brute_force(real, generated, 5), abs=1e-12)


@pytest.mark.usefixtures("small_blocks")
def test_duplicates():
    """Radii of 0 and distances of 0: the balls are closed."""
    real = np.repeat(normal(20, seed=1), 12, axis=0)
    generated = np.concatenate([normal(20, seed=1), normal(20, seed=2)])
    expected = brute_force(real, generated, 5)
    assert expected[0] == 0.5
    assert all_four(real, generated) == pytest.approx(expected, abs=1e-12)
    same = np.ones((70, 16))
    assert all_four(same, same) == pytest.approx((1, 1, 70 / 5, 1))


@pytest.mark.usefixtures("small_blocks")
def test_lattice():
    """Distances that are equal by the dozen, at the edge of the balls."""
    points = np.stack(np.meshgrid(*[np.arange(5.0)] * 3), axis=-1).reshape(-1, 3) + 0.1
    generated = points + np.array([0.5, 0, 0])
    assert all_four(points, generated, 4) == pytest.approx(brute_force(points, generated, 4), abs=1e-12)


@pytest.mark.usefixtures("small_blocks")
def test_memory_maps_and_tensors(tmp_path):
    real, generated = normal(100, seed=1).astype(np.float32), normal(90, shift=0.2, seed=2).astype(np.float32)
    np.save(tmp_path / "real.npy", real)
    mapped = np.load(tmp_path / "real.npy", mmap_mode="r")
    expected = brute_force(real, generated, 5)
    assert all_four(mapped, torch.from_numpy(generated)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_device(precision):
    real, generated = normal(3000, 256, seed=1), normal(2500, 256, shift=0.05, seed=2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert all_four(real, generated, device="cuda") == pytest.approx(brute_force(real, generated, 5), abs=1e-12)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def late_nan():
    """In the second block that is read."""
    features = np.ones((1500, 4))
    features[1200, 2] = np.nan
    return features


@pytest.mark.parametrize(
    ("real", "generated", "k", "message"),
    [
        (np.ones((9, 4)), np.ones((9, 5)), 3, "real_features has 4 features an image and generated_features has 5"),
        (np.ones((3, 4)), np.ones((9, 4)), 3, "real_features must have more than k = 3 images, but has 3"),
        (np.ones((9, 4)), np.ones((3, 4)), 3, "generated_features must have more than k = 3 images, but has 3"),
        (np.ones((9, 4)), np.full((9, 4), np.inf), 3, "generated_features must be finite, but row 0 is not"),
        (np.full((9, 4), np.nan), np.ones((9, 4)), 3, "real_features must be finite, but row 0 is not"),
        (np.ones((9, 4)), late_nan(), 3, "generated_features must be finite, but row 1200 is not"),
        (np.ones((9, 4)), np.ones((9, 4)), 0, "k must be at least 1, but is 0"),
        (np.ones((9, 4)), np.ones((9, 4), dtype=np.int64), 3, "floating-point numbers, but are int64"),
    ],
)
def test_what_is_refused(real, generated, k, message):
    with pytest.raises(ValueError, match=message):
        precision_and_recall(real, generated, k)


def test_one_generated_image_for_density():
    real, generated = normal(50, seed=1), normal(1, seed=2) / 2
    inside = squared_distances(generated, real) <= squared_radii(real, 3)
    assert inside.any()
    assert density_and_coverage(real, generated, k=3) == pytest.approx((inside.sum() / 3, inside.mean()), abs=1e-12)
