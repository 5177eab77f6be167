"""The Frechet distance between two normal distributions, which on Inception features is called FID."""

from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from .statistics import FeatureStatistics


Array: TypeAlias = np.ndarray | torch.Tensor

# How far float32 rounds a matrix from symmetry, or eigenvalues from 0, relative to its largest value.
_FLOAT32_ROUNDING = 1e-5
# How far the sum of the logarithms of the roots may be from the logarithm of the determinant. Where it was
# nearer, for condition numbers to 3e12, their sum was that of the singular values to 1e-10 of the traces.
_LOG_DETERMINANT_TOLERANCE = 1e-3


def frechet_distance(mean_a: Array, covariance_a: Array, mean_b: Array, covariance_b: Array) -> float:
    """Computes ``|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2))`` of two normal distributions.

    It is the squared 2-Wasserstein distance of Dowson and Landau, "The Frechet distance between multivariate
    normal distributions" (1982), and FID, eq. 6 of Heusel et al. 2017 (https://arxiv.org/abs/1706.08500).

    The trace of the root needs no root: with ``A = F F^T`` and ``B = G G^T`` it is the sum of the singular
    values of ``F^T G``. The factors come from Cholesky, or, where a covariance is singular (fewer images than
    features), from its eigenvectors without those whose eigenvalue is rounding. So singular, zero and equal
    covariances are exact to rounding, and nothing is added to a diagonal.

    Args:
        mean_a: (features,).
        covariance_a: (features, features), symmetric, without negative eigenvalues but for rounding.
        mean_b: As ``mean_a``.
        covariance_b: As ``covariance_a``. All four may be numpy arrays or tensors of any floating type and on
            any device; the work is done in float64 on the CPU.

    Returns:
        The distance, in squared units of the features. It is at least 0: where rounding makes that of two
        equal distributions negative, by about 1e-15 of the traces, it is 0.

    Raises:
        ValueError: Shapes do not fit, or a covariance is not finite, not symmetric or has a negative
            eigenvalue.
    """
    mean_a, covariance_a = _check_moments("a", mean_a, covariance_a)
    mean_b, covariance_b = _check_moments("b", mean_b, covariance_b)
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"mean_a has {len(mean_a)} features and mean_b has {len(mean_b)}: statistics of one extractor are needed"
        )
    factor_a = _factorize(covariance_a, "covariance_a")
    factor_b = _factorize(covariance_b, "covariance_b")
    trace_of_root = _sum_singular_values(
        factor_a.matrix.T @ factor_b.matrix, factor_a.log_determinant + factor_b.log_determinant
    )
    difference = mean_a - mean_b
    distance = difference.dot(difference) + covariance_a.trace() + covariance_b.trace() - 2 * trace_of_root
    return max(0.0, distance.item())


def distance_of_statistics(reference: FeatureStatistics, model: FeatureStatistics) -> float:
    """`frechet_distance` of two sets of features."""
    return frechet_distance(reference.mean, reference.covariance, model.mean, model.covariance)


class _Factor(NamedTuple):
    """What a covariance is the square of (features, rank), and the logarithm of its determinant, -inf if singular."""

    matrix: torch.Tensor
    log_determinant: float


def _check_moments(side: str, mean: Array, covariance: Array) -> tuple[torch.Tensor, torch.Tensor]:
    mean, covariance = _to_tensor(mean), _to_tensor(covariance)
    if mean.ndim != 1 or len(mean) == 0:
        raise ValueError(f"mean_{side} must have the shape (features,), but has {tuple(mean.shape)}")
    if covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"covariance_{side} must have the shape {(len(mean), len(mean))}, as mean_{side} has {len(mean)} "
            f"features, but has {tuple(covariance.shape)}"
        )
    for name, value in (("mean", mean), ("covariance", covariance)):
        if not value.isfinite().all():
            raise ValueError(f"{name}_{side} has a NaN or an infinity")
    asymmetry = (covariance - covariance.T).abs().max()
    if asymmetry > _FLOAT32_ROUNDING * covariance.abs().max():
        raise ValueError(
            f"covariance_{side} is not symmetric: two values that should be equal differ by {asymmetry:.3g}"
        )
    return mean, (covariance + covariance.T) / 2


def _to_tensor(values: Array) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach().to(device="cpu", dtype=torch.float64)
    # a copy, because torch takes no array that is read-only, such as a memory map
    return torch.from_numpy(np.array(values, dtype=np.float64))


def _factorize(covariance: torch.Tensor, name: str) -> _Factor:
    """Takes a covariance apart, by Cholesky where its rank is full, which is much faster than eigenvectors."""
    rounding = len(covariance) * torch.finfo(torch.float64).eps
    triangle, failed_at = torch.linalg.cholesky_ex(covariance)
    pivots = triangle.diagonal()
    if failed_at == 0 and pivots.min().square() > rounding * covariance.diagonal().max():
        return _Factor(triangle, pivots.log().sum().item())
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    largest = eigenvalues.abs().max()
    if eigenvalues[0] < -_FLOAT32_ROUNDING * largest:
        raise ValueError(
            f"{name} is no covariance: it has the negative eigenvalue {eigenvalues[0]:.3g} "
            f"(the largest is {eigenvalues[-1]:.3g})"
        )
    kept = eigenvalues > rounding * largest
    return _Factor(eigenvectors[:, kept] * eigenvalues[kept].sqrt(), float("-inf"))


def _sum_singular_values(matrix: torch.Tensor, log_determinant: float) -> torch.Tensor:
    """Adds up singular values, as roots of the eigenvalues of the square where that is as good.

    It takes half the time of singular values, but may lose those below 1e-8 of the largest. With the largest
    columns first the small ones usually survive, and the determinant, which is known, shows whether they did.
    """
    if log_determinant > float("-inf"):
        graded = matrix[:, matrix.norm(dim=0).argsort(descending=True)]
        squares = torch.linalg.eigvalsh(graded.T @ graded)
        # one that came out as 0 or negative makes the sum -inf or NaN, which is not near
        if abs(squares.log().sum() / 2 - log_determinant) < _LOG_DETERMINANT_TOLERANCE:
            return squares.sqrt().sum()
    return torch.linalg.svdvals(matrix).sum()
