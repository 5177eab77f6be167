"""Metrics of sets of features or of class probabilities: KID, the Inception Score, class accuracy, precision, recall,
density and coverage.

The work is done in float64. Features may be memory maps; KID and the Inception Score read them in blocks, the
manifolds keep both sets in float64 on their device (0.8 GB for 50,000 images of 2048 features).
"""

from typing import NamedTuple

import numpy as np
import torch

from ..utils.devices import find_device
from .statistics import FeatureRows, check_finite, check_pair, checked_blocks, to_float64


class Estimate(NamedTuple):
    """The mean over random subsets of the images, and the standard deviation over them (divided by their number).

    The latter is the spread of one subset's value, not the error of the mean.
    """

    mean: float
    standard_deviation: float


class PrecisionRecall(NamedTuple):
    """Shares from 0 to 1: of generated images in the manifold of the real ones, and of real ones in theirs."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """In how many balls around real images a generated one lies, divided by k (about 1 for equal distributions); and
    the share of real images, from 0 to 1, whose ball has a generated image in it."""

    density: float
    coverage: float


def kernel_distance(
    features_a: FeatureRows,
    features_b: FeatureRows,
    num_subsets: int = 100,
    max_subset_size: int = 1000,
    seed: int = 0,
) -> Estimate:
    """KID: the squared maximum mean discrepancy under the kernel ``(x . y / features + 1)^3``.

    Binkowski et al. 2018 (https://arxiv.org/abs/1801.01401), section 4: the unbiased estimator, which may be negative,
    as the mean over random subsets of ``min(max_subset_size, images)`` images of either set. Where that is all of
    both, one subset is taken. Only the subsets are read.

    Args:
        features_a: (images, features), at least 2 images, of any floating type.
        features_b: The same number of features, at least 2 images.
        num_subsets: At least 1.
        max_subset_size: At least 2.
        seed: Of the subsets; one seed, one result.

    Raises:
        ValueError: Shapes do not fit, a number is too small, or a row that was read is not finite.
    """
    check_pair(features_a, features_b, "features_a", "features_b", min_rows=2)
    for name, value, least in (("num_subsets", num_subsets, 1), ("max_subset_size", max_subset_size, 2)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, but is {value}")
    size = min(len(features_a), len(features_b), max_subset_size)
    if len(features_a) == len(features_b) == size:
        num_subsets = 1
    rng = np.random.default_rng(seed)

    def subset(features: FeatureRows, name: str) -> np.ndarray:
        # in the order of the file, which a disk reads faster
        rows = to_float64(features[np.sort(rng.choice(len(features), size, replace=False))])
        check_finite(rows, f"a subset of {name}")
        return rows

    def sum_kernel(products: np.ndarray) -> float:
        return ((products / features_a.shape[1] + 1) ** 3).sum()

    def sum_of_pairs(rows: np.ndarray) -> float:
        """Without the pairs of an image with itself."""
        return sum_kernel(rows @ rows.T) - sum_kernel((rows**2).sum(axis=1))

    estimates = []
    for _ in range(num_subsets):
        a, b = subset(features_a, "features_a"), subset(features_b, "features_b")
        within = (sum_of_pairs(a) + sum_of_pairs(b)) / (size * (size - 1))
        estimates.append(within - 2 * sum_kernel(a @ b.T) / size**2)
    return Estimate(float(np.mean(estimates)), float(np.std(estimates)))


def inception_score(
    predictions: FeatureRows, num_splits: int = 10, from_logits: bool = False, seed: int = 0
) -> Estimate:
    """Inception Score: ``exp(E_x KL(p(y|x) || p(y)))``, the mean over splits of equal size.

    Salimans et al. 2016 (https://arxiv.org/abs/1606.03498), section 4. Images that come class by class would have few
    classes in each split, so they are dealt out to the splits by a permutation that only the seed decides. Compare
    scores of the same number of images and splits only.

    Args:
        predictions: (images, classes), of any floating type: probabilities, which add up to 1, or logits.
        num_splits: At least 1 and at most the number of images.
        from_logits: Whether the rows are logits.
        seed: Of the permutation.

    Returns:
        The mean, from 1 to the number of classes, and the standard deviation over the splits.

    Raises:
        ValueError: There are fewer images than splits, or a row is not finite or no probabilities.
    """
    if predictions.ndim != 2 or predictions.shape[1] == 0:
        raise ValueError(f"predictions must have the shape (images, classes), but have {tuple(predictions.shape)}")
    num_images, num_classes = predictions.shape
    if not 1 <= num_splits <= num_images:
        raise ValueError(f"num_splits must be from 1 to the number of images ({num_images}), but is {num_splits}")
    split_of_image = np.random.default_rng(seed).permutation(num_images) % num_splits
    # KL of a split = mean of sum(p log p) - sum(q log q), where q is the mean of p: one pass is enough
    negative_entropy, class_sums = np.zeros(num_splits), np.zeros((num_splits, num_classes))
    for start, block in checked_blocks(predictions, "predictions"):
        if from_logits:
            block = np.exp(block - block.max(axis=1, keepdims=True))
        sums = block.sum(axis=1)
        # float16 probabilities of a thousand classes add up to 1 within this
        wrong = (block < 0).any(axis=1) | (np.abs(sums - 1) > 1e-2)
        if wrong.any() and not from_logits:
            row = int(wrong.argmax())
            raise ValueError(
                f"predictions must be probabilities that add up to 1, but row {start + row} goes from "
                f"{block[row].min():.3g} to {block[row].max():.3g} and adds up to {sums[row]:.3g}; "
                "of logits say from_logits=True"
            )
        probabilities = block / sums[:, None]
        split = split_of_image[start : start + len(block)]
        negative_entropy += np.bincount(split, _sum_p_log_p(probabilities), minlength=num_splits)
        class_sums += (split == np.arange(num_splits)[:, None]).astype(np.float64) @ probabilities
    sizes = np.bincount(split_of_image, minlength=num_splits)
    divergence = negative_entropy / sizes - _sum_p_log_p(class_sums / sizes[:, None])
    # it is no less than 0, but for rounding
    scores = np.exp(np.maximum(divergence, 0))
    return Estimate(float(scores.mean()), float(scores.std()))


def _sum_p_log_p(probabilities: np.ndarray) -> np.ndarray:
    """``sum(p log p)`` of each row, where 0 log 0 is 0."""
    logarithms = np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    return (probabilities * logarithms).sum(axis=1)


def class_accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The share of images (from 0 to 1) whose most probable class is the one that was asked for.

    Args:
        probabilities: (images, classes).
        labels: (images,); images of label -1 were asked for without a class and do not count.
    """
    labels = np.asarray(labels)
    return float((np.asarray(probabilities).argmax(axis=1) == labels)[labels >= 0].mean())


def precision_and_recall(
    real_features: FeatureRows, generated_features: FeatureRows, k: int = 3, device: str | torch.device = "cpu"
) -> PrecisionRecall:
    """Improved precision and recall, Kynkaanniemi et al. 2019 (https://arxiv.org/abs/1904.06991), section 2.

    A set's manifold is the union of closed balls around its points that reach as far as the k-th nearest neighbour.
    Neighbours are exact. Compare equal numbers of images only (the paper has 50,000 of each).

    Args:
        real_features: (images, features), of any floating type, more than k images.
        generated_features: The same number of features, more than k images.
        k: Which neighbour gives the radius; the paper's is 3.
        device: Where distances are computed.

    Raises:
        ValueError: Shapes do not fit, there are too few images, or a row is not finite.
    """
    real, generated = _open_sets(real_features, generated_features, k, device, k + 1)
    in_real, _ = _count_balls(generated, real, real.squared_radii(k))
    in_generated, _ = _count_balls(real, generated, generated.squared_radii(k))
    return PrecisionRecall(float((in_real > 0).mean()), float((in_generated > 0).mean()))


def density_and_coverage(
    real_features: FeatureRows, generated_features: FeatureRows, k: int = 5, device: str | torch.device = "cpu"
) -> DensityCoverage:
    """Density and coverage, Naeem et al. 2020 (https://arxiv.org/abs/2002.09797), section 3.

    Args:
        real_features: (images, features), of any floating type, more than k images.
        generated_features: The same number of features, at least one image.
        k: Which neighbour gives the radius; the paper's is 5.
        device: Where distances are computed.

    Raises:
        ValueError: Shapes do not fit, there are too few images, or a row is not finite.
    """
    real, generated = _open_sets(real_features, generated_features, k, device, 1)
    balls_of_image, images_of_ball = _count_balls(generated, real, real.squared_radii(k))
    return DensityCoverage(float(balls_of_image.mean() / k), float((images_of_ball > 0).mean()))


class _FeatureSet:
    """Centred features, of which squared distances in float64 are taken block by block."""

    # relative to |x|^2 + |y|^2: more than float64 rounds a product, and less than float32 features do
    TOLERANCE = 1e-13

    def __init__(self, features: FeatureRows, name: str, centre: np.ndarray, device: torch.device):
        self.rows = torch.empty(features.shape, dtype=torch.float64, device=device)
        for start, block in checked_blocks(features, name):
            self.rows[start : start + len(block)] = torch.from_numpy(block - centre).to(device)
        self.squares = self.rows.square().sum(dim=1)

    def distances(self, block: slice, others: "_FeatureSet") -> tuple[torch.Tensor, torch.Tensor]:
        """Squared distances (rows of the block, others), and how far rounding may have moved them."""
        sums = self.squares[block, None] + others.squares
        return torch.addmm(sums, self.rows[block], others.rows.T, alpha=-2).clamp_(min=0), sums.mul_(self.TOLERANCE)

    def blocks(self) -> list[slice]:
        return [slice(start, start + BLOCK) for start in range(0, len(self.rows), BLOCK)]

    def squared_radii(self, k: int) -> torch.Tensor:
        """Squared distance of each point from its k-th nearest neighbour (points,); the nearest is itself."""
        radii = [self.distances(block, self)[0].kthvalue(k + 1, dim=1).values for block in self.blocks()]
        return torch.cat(radii)


BLOCK = 256


def _open_sets(
    real: FeatureRows, generated: FeatureRows, k: int, device: str | torch.device, least_generated: int
) -> tuple[_FeatureSet, _FeatureSet]:
    if k < 1:
        raise ValueError(f"k must be at least 1, but is {k}")
    check_pair(real, generated, "real_features", "generated_features", min_rows=1)
    for name, features, least in (
        ("real_features", real, k + 1),
        ("generated_features", generated, least_generated),
    ):
        if len(features) < least:
            raise ValueError(f"{name} must have more than k = {k} images, but has {len(features)}")
    device = find_device(device)
    # Apple's GPUs have no float64
    device = torch.device("cpu") if device.type == "mps" else device
    # the median of some stays among the many even where a few outliers pull the mean far away
    centre = np.median(to_float64(real[:: -(-len(real) // 2048)]), axis=0)
    sets = [
        _FeatureSet(*each, centre, device) for each in ((real, "real_features"), (generated, "generated_features"))
    ]
    return sets[0], sets[1]


def _count_balls(
    points: _FeatureSet, centres: _FeatureSet, squared_radii: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """In how many balls each point lies, int64 (points,), and how many points each ball has, int64 (centres,)."""
    balls_of_point, points_of_ball = [], torch.zeros(len(centres.rows), dtype=torch.int64, device=centres.rows.device)
    for block in points.blocks():
        distances, rounding = points.distances(block, centres)
        # balls are closed: a point at exactly the radius is inside
        inside = distances <= squared_radii + rounding
        balls_of_point.append(inside.sum(dim=1))
        points_of_ball += inside.sum(dim=0)
    return torch.cat(balls_of_point).cpu().numpy(), points_of_ball.cpu().numpy()
