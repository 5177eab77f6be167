"""The metrics, in float64, of features that may be memory maps.

Precision, recall, density and coverage keep both sets on their device (0.8 GB for 50,000 images of 2048 features).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..utils.devices import find_device
from .statistics import FeatureRows, FeatureStatistics, check_pair, to_float64


# rows whose distances to all others are in memory at a time
BLOCK = 256
# of squared distances, relative to |x|^2 + |y|^2: more than float64 rounds a product, less than float32 features do
_ROUNDING = 1e-13
# how far float32 rounds a matrix from symmetry, or eigenvalues from 0, relative to its largest value
_FLOAT32_ROUNDING = 1e-5


class Estimate(NamedTuple):
    """The mean over random subsets of the images, and the standard deviation of a subset's value (not of the mean)."""

    mean: float
    standard_deviation: float


class PrecisionRecall(NamedTuple):
    """Shares from 0 to 1: of generated images in the manifold of the real ones, and of real ones in theirs."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """How many real images' balls hold a generated one, over k (about 1 for equal distributions); and the share of
    real images, from 0 to 1, whose ball holds one."""

    density: float
    coverage: float


def frechet_distance(
    mean_a: FeatureRows, covariance_a: FeatureRows, mean_b: FeatureRows, covariance_b: FeatureRows
) -> float:
    """Computes ``|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2))`` of two normal distributions.

    FID, eq. 6 of Heusel et al. 2017 (https://arxiv.org/abs/1706.08500); Dowson and Landau 1982. With ``A = F F^T`` and
    ``B = G G^T`` the trace of the root is the sum of the singular values of ``F^T G``. So singular, zero and equal
    covariances are exact to rounding, and nothing is added to a diagonal.

    Args:
        mean_a, mean_b: (features,), arrays or tensors of any floating type and on any device.
        covariance_a, covariance_b: (features, features), symmetric, without negative eigenvalues but for rounding.

    Returns:
        The distance, in squared units of the features, at least 0.

    Raises:
        ValueError: Shapes do not fit, or values are not finite or are no covariance.
    """
    # a copy of arrays, because torch takes none that is read-only, such as a memory map
    moments = [
        values.detach().cpu().double() if isinstance(values, Tensor) else torch.tensor(np.array(values, float))
        for values in (mean_a, covariance_a, mean_b, covariance_b)
    ]
    shapes, size = [tuple(values.shape) for values in moments], moments[0].numel()
    if size == 0 or shapes != [(size,), (size, size)] * 2:
        raise ValueError(
            "mean_a, covariance_a, mean_b and covariance_b must have the shapes (features,) and (features, features),"
            f" twice, but have {shapes}: statistics of one extractor are needed"
        )
    mean_a, covariance_a, mean_b, covariance_b = moments
    root = _factor(covariance_a, "covariance_a").T @ _factor(covariance_b, "covariance_b")
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace()
    if not distance.isfinite():
        raise ValueError("mean_a or mean_b has a NaN or an infinity")
    # rounding makes that of equal distributions negative, by about 1e-15 of the traces
    return max(0.0, (distance - 2 * _sum_singular_values(root)).item())


def distance_of_statistics(reference: FeatureStatistics, model: FeatureStatistics) -> float:
    """`frechet_distance` of two sets of features."""
    return frechet_distance(reference.mean, reference.covariance, model.mean, model.covariance)


def kernel_distance(
    features_a: FeatureRows,
    features_b: FeatureRows,
    num_subsets: int = 100,
    max_subset_size: int = 1000,
    seed: int = 0,
) -> Estimate:
    """KID: the squared maximum mean discrepancy under the kernel ``(x . y / features + 1)^3``.

    Binkowski et al. 2018 (https://arxiv.org/abs/1801.01401), section 4: the unbiased estimator, which may be negative,
    as the mean over random subsets of ``min(max_subset_size, images)`` of either set, or over one that is all of both.

    Args:
        features_a, features_b: (images, features), at least 2 images, of any floating type.
        num_subsets: At least 1.
        max_subset_size: At least 2.
        seed: Of the subsets; one seed, one result.

    Raises:
        ValueError: Shapes do not fit, a number is too small, or a row that was read is not finite.
    """
    check_pair(2, features_a=features_a, features_b=features_b)
    if num_subsets < 1 or max_subset_size < 2:
        raise ValueError(
            f"num_subsets is {num_subsets} and max_subset_size is {max_subset_size}, but must be at least 1 and 2"
        )
    size = min(len(features_a), len(features_b), max_subset_size)
    if len(features_a) == len(features_b) == size:
        num_subsets = 1
    rng = np.random.default_rng(seed)

    def subset(features: FeatureRows, name: str) -> np.ndarray:
        # in the order of the file, which a disk reads faster
        return to_float64(features[np.sort(rng.choice(len(features), size, replace=False))], f"a subset of {name}")

    def kernel(rows_a: np.ndarray, rows_b: np.ndarray) -> np.ndarray:
        return (rows_a @ rows_b.T / rows_a.shape[1] + 1) ** 3

    estimates = []
    for _ in range(num_subsets):
        a, b = subset(features_a, "features_a"), subset(features_b, "features_b")
        # without the pairs of an image with itself
        within = sum(matrix.sum() - matrix.trace() for matrix in (kernel(a, a), kernel(b, b))) / (size * (size - 1))
        estimates.append(within - 2 * kernel(a, b).mean())
    return Estimate(float(np.mean(estimates)), float(np.std(estimates)))


def inception_score(
    predictions: FeatureRows, num_splits: int = 10, from_logits: bool = False, seed: int = 0
) -> Estimate:
    """Inception Score: ``exp(E_x KL(p(y|x) || p(y)))``, from 1 to the number of classes, over splits of equal size.

    Salimans et al. 2016 (https://arxiv.org/abs/1606.03498), section 4. A permutation deals out the images to the
    splits, as they often come class by class. Compare scores of the same number of images and splits only.

    Args:
        predictions: (images, classes), of any floating type: probabilities, which add up to 1, or logits.
        num_splits: At least 1 and at most the number of images.
        from_logits: Whether the rows are logits.
        seed: Of the permutation.

    Raises:
        ValueError: There are fewer images than splits, or a row is not finite or no probabilities.
    """
    num_images = len(predictions)
    if not 1 <= num_splits <= num_images:
        raise ValueError(f"num_splits must be from 1 to the number of images ({num_images}), but is {num_splits}")
    split_of_image = np.random.default_rng(seed).permutation(num_images) % num_splits
    scores = []
    for split in range(num_splits):
        rows = torch.from_numpy(to_float64(predictions[split_of_image == split], "predictions"))
        rows = rows.softmax(dim=1) if from_logits else rows
        sums = rows.sum(dim=1, keepdim=True)
        # float16 probabilities of a thousand classes add up to 1 within this
        if rows.min() < 0 or (sums - 1).abs().max() > 1e-2:
            raise ValueError(
                f"predictions must be probabilities that add up to 1, but the smallest is {rows.min():.3g} and rows"
                f" add up to {sums.min():.3g} to {sums.max():.3g}; of logits say from_logits=True"
            )
        rows = rows / sums
        entropies = torch.special.entr(rows).sum(dim=1)
        # it is no less than 0, but for rounding
        divergence = (torch.special.entr(rows.mean(dim=0)).sum() - entropies.mean()).clamp(min=0)
        scores.append(divergence.exp().item())
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


def class_accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The share of images, from 0 to 1, whose most probable class is their label; those of label -1 do not count."""
    labels = np.asarray(labels)
    return float((np.asarray(probabilities).argmax(axis=1) == labels)[labels >= 0].mean())


def precision_and_recall(
    real_features: FeatureRows, generated_features: FeatureRows, k: int = 3, device: str | torch.device = "cpu"
) -> PrecisionRecall:
    """Improved precision and recall, Kynkaanniemi et al. 2019 (https://arxiv.org/abs/1904.06991), section 2.

    A set's manifold is the union of closed balls around its points that reach as far as the k-th nearest neighbour.
    Neighbours are exact. Compare equal numbers of images only (the paper has 50,000 of each).

    Args:
        real_features, generated_features: (images, features), of any floating type, more than k images.
        k: Which neighbour gives the radius; the paper's is 3.
        device: Where distances are computed.

    Raises:
        ValueError: Shapes do not fit, there are too few images, or a row is not finite.
    """
    real, generated = _to_device(real_features, generated_features, device)
    balls_of_generated, _ = _count_balls(generated, real, k, "real_features")
    balls_of_real, _ = _count_balls(real, generated, k, "generated_features")
    return PrecisionRecall(*((balls > 0).double().mean().item() for balls in (balls_of_generated, balls_of_real)))


def density_and_coverage(
    real_features: FeatureRows, generated_features: FeatureRows, k: int = 5, device: str | torch.device = "cpu"
) -> DensityCoverage:
    """Density and coverage, Naeem et al. 2020 (https://arxiv.org/abs/2002.09797), section 3.

    As `precision_and_recall`, but for k, which is 5 in the paper, and that one generated image is enough.
    """
    real, generated = _to_device(real_features, generated_features, device)
    balls_of_generated, generated_in_ball = _count_balls(generated, real, k, "real_features")
    density = balls_of_generated.double().mean().item() / k
    return DensityCoverage(density, (generated_in_ball > 0).double().mean().item())


def _factor(covariance: Tensor, name: str) -> Tensor:
    """F with ``covariance = F F^T``, (features, rank): by Cholesky where the rank is full, else by eigenvectors."""
    # NaN where a value is not finite
    asymmetry = (covariance - covariance.T).abs().max()
    if not asymmetry <= _FLOAT32_ROUNDING * covariance.abs().max():
        raise ValueError(
            f"{name} must be finite and symmetric, but values that should be equal differ by {asymmetry:.3g}"
        )
    covariance = (covariance + covariance.T) / 2
    rounding = len(covariance) * torch.finfo(torch.float64).eps
    triangle, failed_at = torch.linalg.cholesky_ex(covariance)
    if failed_at == 0 and triangle.diagonal().min().square() > rounding * covariance.diagonal().max():
        return triangle
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    largest = eigenvalues.abs().max()
    if eigenvalues[0] < -_FLOAT32_ROUNDING * largest:
        raise ValueError(f"{name} is no covariance: it has the negative eigenvalue {eigenvalues[0]:.3g}")
    kept = eigenvalues > rounding * largest
    return eigenvectors[:, kept] * eigenvalues[kept].sqrt()


def _sum_singular_values(matrix: Tensor) -> Tensor:
    """By roots of the eigenvalues of the square, in half the time, unless the determinant shows that small ones are
    lost: where logarithms agreed to 1e-3, the sum was right to 1e-10. Largest columns first, they mostly survive."""
    if 0 < matrix.shape[0] == matrix.shape[1]:
        graded = matrix[:, matrix.norm(dim=0).argsort(descending=True)]
        squares = torch.linalg.eigvalsh(graded.T @ graded)
        # one that came out as 0 or negative makes the sum -inf or NaN, which is not near
        if abs(squares.log().sum() / 2 - torch.linalg.slogdet(matrix).logabsdet) < 1e-3:
            return squares.sqrt().sum()
    return torch.linalg.svdvals(matrix).sum()


def _to_device(real: FeatureRows, generated: FeatureRows, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Both sets in float64, centred, so that products lose no digits to a mean far from 0."""
    check_pair(1, real_features=real, generated_features=generated)
    device = find_device(device)
    # Apple's GPUs have no float64
    device = torch.device("cpu") if device.type == "mps" else device
    real, generated = to_float64(real, "real_features"), to_float64(generated, "generated_features")
    # the median of some stays among the many even where a few outliers pull the mean far away
    centre = np.median(real[:: -(-len(real) // 2048)], axis=0)
    return torch.from_numpy(real - centre).to(device), torch.from_numpy(generated - centre).to(device)


def _squared_distances(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances (rows, others), and how far rounding may have moved them."""
    sums = rows.square().sum(dim=1)[:, None] + others.square().sum(dim=1)
    return torch.addmm(sums, rows, others.T, alpha=-2).clamp_(min=0), sums * _ROUNDING


def _count_balls(points: Tensor, centres: Tensor, k: int, name: str) -> tuple[Tensor, Tensor]:
    """How many balls, which reach to the k-th nearest other centre, hold a point, and how many points a ball holds."""
    if not 1 <= k < len(centres):
        raise ValueError(f"k must be at least 1 and below the {len(centres)} images of {name}, but is {k}")
    # the nearest of all is the centre itself
    radii = [_squared_distances(block, centres)[0].kthvalue(k + 1, dim=1).values for block in centres.split(BLOCK)]
    squared_radii = torch.cat(radii)
    balls_of_point, points_of_ball = [], torch.zeros_like(squared_radii, dtype=torch.int64)
    for block in points.split(BLOCK):
        distances, rounding = _squared_distances(block, centres)
        # balls are closed: a point at exactly the radius is inside
        inside = distances <= squared_radii + rounding
        balls_of_point.append(inside.sum(dim=1))
        points_of_ball += inside.sum(dim=0)
    return torch.cat(balls_of_point), points_of_ball
