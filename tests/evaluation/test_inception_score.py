"""The Inception Score against closed forms and the formula written out."""

import numpy as np
import pytest
import torch

from imagenet64_diffusion.evaluation import inception_score


def random_logits(num_images=2500, num_classes=7, seed=0):
    return 3 * np.random.default_rng(seed).standard_normal((num_images, num_classes))


def softmax(logits):
    return torch.from_numpy(logits).softmax(dim=1).numpy()


def brute_force(probabilities):
    """exp of the mean Kullback-Leibler divergence, one image after the other."""
    marginal = probabilities.mean(axis=0)
    divergences = [sum(p * np.log(p / q) for p, q in zip(row, marginal, strict=True)) for row in probabilities]
    return np.exp(np.mean(divergences))


def test_uniform_predictions():
    score = inception_score(np.full((100, 8), 1 / 8))
    assert score.mean == pytest.approx(1, abs=1e-14)
    assert score.mean >= 1
    assert score.standard_deviation == pytest.approx(0, abs=1e-14)


def test_sure_and_even_predictions():
    """A one-hot row for each class: the number of classes."""
    assert inception_score(np.eye(8), num_splits=1).mean == pytest.approx(8, rel=1e-14)
    assert inception_score(np.tile(np.eye(8), (50, 1)), num_splits=1).mean == pytest.approx(8, rel=1e-13)
    assert inception_score(np.tile(np.eye(8)[:1], (50, 1))).mean == pytest.approx(1, rel=1e-14)


def test_sure_of_one_of_two_halves():
    """Each image leaves half of the classes: KL = log 2."""
    halves = np.repeat([[0.25] * 4 + [0.0] * 4, [0.0] * 4 + [0.25] * 4], 20, axis=0)
    assert inception_score(halves, num_splits=1).mean == pytest.approx(2, rel=1e-13)


@pytest.mark.parametrize("num_splits", [1, 3, 10])
def test_formula(num_splits):
    probabilities = softmax(random_logits())
    split = np.random.default_rng(4).permutation(2500) % num_splits
    each = [brute_force(probabilities[split == index]) for index in range(num_splits)]
    score = inception_score(probabilities, num_splits=num_splits, seed=4)
    assert score.mean == pytest.approx(np.mean(each), rel=1e-12)
    assert score.standard_deviation == pytest.approx(np.std(each), rel=1e-9, abs=1e-12)


def test_classes_in_order_of_the_file():
    """Splits in the order of the file would see one class each and score 1."""
    ordered = np.repeat(np.eye(10), 1000, axis=0)
    assert inception_score(ordered).mean == pytest.approx(10, rel=0.01)


def test_logits():
    logits = random_logits()
    expected = inception_score(softmax(logits))
    assert inception_score(logits, from_logits=True) == pytest.approx(expected, rel=1e-12)
    # exp of these would overflow
    assert inception_score(logits + 1e4, from_logits=True) == pytest.approx(expected, rel=1e-9)


def test_equal_rows_score_no_less_than_one():
    """Rounding goes either way."""
    for row in softmax(random_logits(50)):
        assert 1 <= inception_score(np.tile(row, (70, 1)), num_splits=1).mean < 1 + 1e-12


def test_sums_that_are_not_quite_one():
    probabilities = softmax(random_logits())
    assert inception_score(1.005 * probabilities) == pytest.approx(inception_score(probabilities), rel=1e-12)


def test_half_precision_probabilities():
    probabilities = softmax(random_logits(num_classes=1000))
    half = inception_score(probabilities.astype(np.float16))
    assert half.mean == pytest.approx(inception_score(probabilities).mean, rel=1e-3)


def test_memory_map_and_tensor(tmp_path):
    probabilities = softmax(random_logits()).astype(np.float32)
    np.save(tmp_path / "probabilities.npy", probabilities)
    expected = inception_score(probabilities)
    assert inception_score(np.load(tmp_path / "probabilities.npy", mmap_mode="r")) == expected
    assert inception_score(torch.from_numpy(probabilities)) == expected


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda rows: 3 * rows, {}, "row 0 goes from 0 to 3 and adds up to 3; of logits say from_logits=True"),
        (lambda rows: np.concatenate([rows, [[1.5, -0.5, 0, 0]]]), {}, "row 20 goes from -0.5 to 1.5"),
        (lambda rows: np.concatenate([rows, [[np.nan] * 4]]), {}, "predictions must be finite, but row 20 is not"),
        (lambda rows: rows[:9], {}, r"from 1 to the number of images \(9\), but is 10"),
        (lambda rows: rows, {"num_splits": 0}, "but is 0"),
        (lambda rows: rows[0], {}, r"shape \(images, classes\), but have \(4,\)"),
    ],
)
def test_what_is_refused(change, options, message):
    with pytest.raises(ValueError, match=message):
        inception_score(change(np.tile(np.eye(4), (5, 1))), **options)
