"""The Inception Score: how sure a classifier is of each image, and how evenly the images use its classes."""

from typing import NamedTuple

import numpy as np

from .feature_arrays import FeatureRows, checked_blocks


# float16 probabilities of a thousand classes add up to 1 within this
_SUM_TOLERANCE = 1e-2


class InceptionScore(NamedTuple):
    """A score over splits.

    Attributes:
        mean: The mean over the splits, from 1 to the number of classes.
        standard_deviation: The standard deviation over the splits (divided by their number).
    """

    mean: float
    standard_deviation: float


def inception_score(
    predictions: FeatureRows, num_splits: int = 10, from_logits: bool = False, seed: int = 0
) -> InceptionScore:
    """Computes how far the class distribution of an image is from that of all images.

    Salimans et al. 2016 (https://arxiv.org/abs/1606.03498), section 4: ``exp(E_x KL(p(y|x) || p(y)))``, the
    mean over splits of equal size. Most programs split in the order of the file. Images that come class by
    class, as they usually do here, would then have few classes in each split and a score far too low. So the
    images are dealt out to the splits by a permutation that only the seed decides. The score of a split
    depends on its size: compare scores of the same number of images and splits only.

    Memory maps may be larger than memory: rows are read once, in blocks of 1024, and summed up in float64.

    Args:
        predictions: (images, classes), of any floating type: class probabilities, each row of which adds up
            to 1 (what rounding leaves is divided out), or logits.
        num_splits: At least 1 and at most the number of images.
        from_logits: Whether the rows are logits, of which the softmax is taken in float64.
        seed: Of the permutation.

    Returns:
        The mean and the standard deviation over the splits.

    Raises:
        ValueError: There are fewer images than splits, or a row is not finite or no probabilities.
    """
    if predictions.ndim != 2 or predictions.shape[1] == 0:
        shape = tuple(predictions.shape)
        raise ValueError(f"predictions must have the shape (images, classes), but have {shape}")
    num_images, num_classes = predictions.shape
    if not 1 <= num_splits <= num_images:
        raise ValueError(f"num_splits must be from 1 to the number of images ({num_images}), but is {num_splits}")
    split_of_image = np.random.default_rng(seed).permutation(num_images) % num_splits

    # KL of a split's images = mean of sum(p log p) - sum(q log q), where q is the mean of p: one pass is
    # enough
    negative_entropy = np.zeros(num_splits)
    class_sums = np.zeros((num_splits, num_classes))
    for start, block in checked_blocks(predictions, "predictions"):
        probabilities = _softmax(block) if from_logits else _normalize(block, start)
        split = split_of_image[start : start + len(block)]
        negative_entropy += np.bincount(split, _sum_p_log_p(probabilities), minlength=num_splits)
        class_sums += (split == np.arange(num_splits)[:, None]).astype(np.float64) @ probabilities
    sizes = np.bincount(split_of_image, minlength=num_splits)
    divergence = negative_entropy / sizes - _sum_p_log_p(class_sums / sizes[:, None])
    # it is no less than 0, but for rounding
    scores = np.exp(np.maximum(divergence, 0))
    return InceptionScore(float(scores.mean()), float(scores.std()))


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _normalize(probabilities: np.ndarray, first_index: int) -> np.ndarray:
    sums = probabilities.sum(axis=1)
    wrong = (probabilities < 0).any(axis=1) | (np.abs(sums - 1) > _SUM_TOLERANCE)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"predictions must be probabilities that add up to 1, but row {first_index + row} goes from "
            f"{probabilities[row].min():.3g} to {probabilities[row].max():.3g} and adds up to {sums[row]:.3g}; "
            "of logits say from_logits=True"
        )
    return probabilities / sums[:, None]


def _sum_p_log_p(probabilities: np.ndarray) -> np.ndarray:
    """``sum(p log p)`` of each row, where 0 log 0 is 0."""
    logarithms = np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    return (probabilities * logarithms).sum(axis=1)
