"""Each metric against its definition, other programs and known answers."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid import fid

from imagenet64_diffusion.evaluation import (
    density_and_coverage,
    feature_metrics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_and_recall,
)


def normal(num_images, num_features=16, shift=0.0, seed=0):
    return np.random.default_rng(seed).standard_normal((num_images, num_features)) + shift


# ---------------------------------------------------------------------- Frechet distance


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


def test_moments_of_other_types(full_rank):
    distance = frechet_distance(*full_rank)
    assert frechet_distance(*full_rank[2:], *full_rank[:2]) == pytest.approx(distance, rel=1e-12)
    assert frechet_distance(*(torch.from_numpy(value).requires_grad_() for value in full_rank)) == distance
    assert frechet_distance(*(value.astype(np.float32) for value in full_rank)) == pytest.approx(distance, rel=1e-4)
    for value in full_rank:
        value.setflags(write=False)
    assert frechet_distance(*full_rank) == distance


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, c, d: (a[:-1], b, c, d), r"must have the shapes .* but have \[\(95,\), \(96, 96\)"),
        (lambda a, b, c, d: (a, b, c[None], d), r"but have .*\(1, 96\), \(96, 96\)\]"),
        (lambda a, b, c, d: (a, b, c[:9], d[:9, :9]), r"but have .*\(96, 96\), \(9,\), \(9, 9\)\]: statistics of one"),
        (lambda a, b, c, d: (a, np.triu(b), c, d), "covariance_a must be finite and symmetric"),
        (lambda a, b, c, d: (a, b, c, d * np.nan), "covariance_b must be finite and .* differ by nan"),
        (lambda a, b, c, d: (a * np.inf, b, c, d), "mean_a or mean_b has a NaN"),
        (lambda a, b, c, d: (a, b, c, d - 1e-3 * np.trace(d) * np.eye(96)), "covariance_b .* negative eigenvalue -0"),
    ],
)
def test_moments_that_are_refused(full_rank, change, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(*change(*full_rank))


# ---------------------------------------------------------------------- KID


def kid_by_pairs(rows_a, rows_b):
    """The unbiased estimator of the KID paper, one pair after the other."""

    def kernel(x, y):
        return (sum(float(a) * float(b) for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3

    size = len(rows_a)
    total = 0.0
    for i, j in itertools.product(range(size), repeat=2):
        if i != j:
            total += (kernel(rows_a[i], rows_a[j]) + kernel(rows_b[i], rows_b[j])) / (size * (size - 1))
        total -= 2 * kernel(rows_a[i], rows_b[j]) / size**2
    return total


def test_kid_is_the_papers_estimator_and_that_of_clean_fid():
    a, b = normal(25, seed=1), normal(25, shift=0.5, seed=2)
    estimate = kernel_distance(a, b)
    assert estimate.mean == pytest.approx(kid_by_pairs(a, b), abs=1e-12)
    assert estimate.standard_deviation == 0
    a, b = normal(200, 64, seed=1), normal(200, 64, shift=0.1, seed=2)
    assert kernel_distance(a, b).mean == pytest.approx(fid.kernel_distance(a, b, num_subsets=1), rel=1e-10)


def test_kid_of_subsets():
    """Each takes its images without replacement, of both sets, and the mean and the spread are over them."""
    a, b = normal(9, seed=1), normal(7, shift=0.4, seed=2)
    rng = np.random.default_rng(5)
    each = [kid_by_pairs(a[rng.choice(9, 4, replace=False)], b[rng.choice(7, 4, replace=False)]) for _ in range(6)]
    options = {"num_subsets": 6, "max_subset_size": 4}
    estimate = kernel_distance(a, b, **options, seed=5)
    assert tuple(estimate) == pytest.approx((np.mean(each), np.std(each)), abs=1e-12)
    assert kernel_distance(a, b, **options, seed=4) != estimate


# ---------------------------------------------------------------------- Inception Score


def random_logits(num_images=2500, num_classes=7, seed=0):
    return 3 * np.random.default_rng(seed).standard_normal((num_images, num_classes))


def softmax(logits):
    return torch.from_numpy(logits).softmax(dim=1).numpy()


@pytest.mark.parametrize("num_splits", [1, 3, 10])
def test_inception_score_by_its_formula(num_splits):
    probabilities = softmax(random_logits())
    split = np.random.default_rng(4).permutation(2500) % num_splits
    each = []
    for rows in (probabilities[split == index] for index in range(num_splits)):
        divergences = [sum(p * np.log(p / q) for p, q in zip(row, rows.mean(axis=0), strict=True)) for row in rows]
        each.append(np.exp(np.mean(divergences)))
    score = inception_score(probabilities, num_splits=num_splits, seed=4)
    assert score.mean == pytest.approx(np.mean(each), rel=1e-12)
    assert score.standard_deviation == pytest.approx(np.std(each), rel=1e-9, abs=1e-12)


def test_inception_score_of_logits_of_half_precision_and_of_classes_in_order():
    logits = random_logits()
    expected = inception_score(softmax(logits))
    assert inception_score(logits, from_logits=True) == pytest.approx(expected, rel=1e-12)
    # exp of these would overflow
    assert inception_score(logits + 1e4, from_logits=True) == pytest.approx(expected, rel=1e-9)
    assert inception_score(1.005 * softmax(logits)) == pytest.approx(expected, rel=1e-12)
    many = softmax(random_logits(num_classes=1000))
    assert inception_score(many.astype(np.float16)).mean == pytest.approx(inception_score(many).mean, rel=1e-3)
    # splits in the order of the file would see one class each and score 1
    assert inception_score(np.repeat(np.eye(10), 1000, axis=0)).mean == pytest.approx(10, rel=0.01)
    # rounding goes either way
    assert all(1 <= inception_score(np.tile(row, (70, 1)), num_splits=1).mean < 1 + 1e-12 for row in many[:50])


# ---------------------------------------------------------------------- precision, recall, density, coverage


def squared_distances(a, b):
    return np.stack([np.square(row - b).sum(axis=1) for row in a])


def brute_force(real, generated, k):
    """Precision, recall, density and coverage by the equations of their papers."""
    real, generated = real.astype(np.float64), generated.astype(np.float64)
    # to the k-th nearest neighbour; the nearest of all is the point
    radii = [np.sort(squared_distances(points, points), axis=1)[:, k] for points in (real, generated)]
    in_real = squared_distances(generated, real) <= radii[0]
    in_generated = squared_distances(real, generated) <= radii[1]
    return (
        in_real.any(axis=1).mean(),
        in_generated.any(axis=1).mean(),
        in_real.sum() / (k * len(generated)),
        in_real.any(axis=0).mean(),
    )


def all_four(real, generated, k=5, **options):
    return (*precision_and_recall(real, generated, k, **options), *density_and_coverage(real, generated, k, **options))


def lattice(offset):
    return np.stack(np.meshgrid(*[np.arange(5.0)] * 3), axis=-1).reshape(-1, 3) + offset


TWINS = np.repeat(normal(20, seed=1), 12, axis=0), np.concatenate([normal(20, seed=1), normal(20, seed=2)])


@pytest.mark.parametrize(
    ("real", "generated", "k"),
    [
        *((normal(300, seed=1).astype(f"f{k + 1}"), normal(250, shift=0.3, seed=2).astype(f"f{k + 1}"), k)
          for k in (1, 3, 7)),
        # each point lies in its own ball and at the edge of others; and none in any
        (normal(150), normal(150)[::-1].copy(), 5),
        (normal(100, seed=1), normal(120, shift=100, seed=2), 5),
        # radii of 0 and distances of 0: the balls are closed
        (*TWINS, 5),
        # distances that are equal by the dozen, at the edge of the balls
        (lattice(0.1), lattice(np.array([0.6, 0.1, 0.1])), 4),
        # two modes far apart, so that no centre suits both
        (np.concatenate([normal(200, seed=1), normal(180, shift=500, seed=2)]),
         np.concatenate([normal(150, seed=3), normal(150, shift=500.2, seed=4)]), 5),
        # tiny, huge, and so far from zero that |x|^2 + |y|^2 - 2 x.y would lose its digits without centring
        *((scale * normal(100, seed=1) + offset, scale * normal(100, shift=0.3, seed=2) + offset, 5)
          for scale, offset in [(1, 1e3), (1, 1e6), (1e-25, 0), (1e25, 0)]),
    ],
)  # fmt: skip
def test_manifolds_by_their_definitions(real, generated, k, monkeypatch):
    # several blocks, of unequal sizes, of few images
    monkeypatch.setattr(feature_metrics, "BLOCK", 64)
    assert all_four(real, generated, k) == pytest.approx(brute_force(real, generated, k), abs=1e-12)


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


# ---------------------------------------------------------------------- all of them


def test_memory_maps_and_tensors(tmp_path):
    a, b = normal(100, seed=1).astype(np.float32), normal(90, shift=0.2, seed=2).astype(np.float32)
    probabilities = softmax(random_logits(100)).astype(np.float32)
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "probabilities.npy", probabilities)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert all_four(mapped, torch.from_numpy(b)) == pytest.approx(brute_force(a, b, 5), abs=1e-12)
    expected = kernel_distance(a.astype(np.float64), b.astype(np.float64), 3, 30)
    assert kernel_distance(mapped, torch.from_numpy(b), 3, 30) == expected
    expected = inception_score(probabilities)
    assert inception_score(np.load(tmp_path / "probabilities.npy", mmap_mode="r")) == expected
    assert inception_score(torch.from_numpy(probabilities)) == expected


ONES, ONE_HOT = np.ones((9, 4)), np.tile(np.eye(4), (5, 1))


@pytest.mark.parametrize(
    ("metric", "arguments", "message"),
    [
        (kernel_distance, (ONES, np.ones((9, 5))), r"features_b must be .* as many features.* \(9, 4\) and \(9, 5\)"),
        (kernel_distance, (ONES, np.ones((1, 4))), r"at least 2 images .* \(9, 4\) and \(1, 4\)"),
        (kernel_distance, (ONES, np.ones(4)), r"\(images, features\), .* \(9, 4\) and \(4,\)"),
        (kernel_distance, (ONES, ONES * np.nan), "a subset of features_b must be finite"),
        (kernel_distance, (ONES, ONES, 0), "num_subsets is 0 and .* at least 1 and 2"),
        (kernel_distance, (ONES, ONES, 1, 1), "max_subset_size is 1, but must be at least 1 and 2"),
        (inception_score, (3 * ONE_HOT,), "add up to 3 to 3; of logits say from_logits=True"),
        (inception_score, (np.concatenate([ONE_HOT, [[1.5, -0.5, 0, 0]]]), 1), "but the smallest is -0.5"),
        (inception_score, (np.concatenate([ONE_HOT, [[np.nan] * 4]]), 1), "must be finite, but row 20 is not"),
        (inception_score, (ONE_HOT[:9],), r"from 1 to the number of images \(9\), but is 10"),
        (inception_score, (ONE_HOT[0], 1), r"predictions must be .* but are float64 \(4,\)"),
        (precision_and_recall, (ONES, ONES[:3]), "below the 3 images of generated_features, but is 3"),
        (precision_and_recall, (ONES, ONES * np.inf), "generated_features must be finite, but row 0 is not"),
        (precision_and_recall, (ONES, ONES, 0), "k must be at least 1 .* but is 0"),
        (precision_and_recall, (ONES, ONES.astype(int)), "floating-point numbers .* but are int64"),
        (density_and_coverage, (ONES, ONES[:0]), "real_features and generated_features must be .* at least 1 images"),
    ],
)
def test_what_is_refused(metric, arguments, message):
    with pytest.raises(ValueError, match=message):
        metric(*arguments)
