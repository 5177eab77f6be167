"""The Frechet distance between two normal distributions, which on Inception features is called FID."""

from typing import TypeAlias

import numpy as np
import torch

from .statistics import FeatureStatistics


Array: TypeAlias = np.ndarray | torch.Tensor

# how far float32 rounds a matrix from symmetry, or eigenvalues from 0, relative to its largest value
_FLOAT32_ROUNDING = 1e-5


def frechet_distance(mean_a: Array, covariance_a: Array, mean_b: Array, covariance_b: Array) -> float:
    """Computes ``|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2))`` of two normal distributions.

    FID, eq. 6 of Heusel et al. 2017 (https://arxiv.org/abs/1706.08500); Dowson and Landau 1982. With ``A = F F^T`` and
    ``B = G G^T`` the trace of the root is the sum of the singular values of ``F^T G``. So singular, zero and equal
    covariances are exact to rounding, and nothing is added to a diagonal.

    Args:
        mean_a: (features,).
        covariance_a: (features, features), symmetric, without negative eigenvalues but for rounding.
        mean_b: As ``mean_a``.
        covariance_b: As ``covariance_a``. All are numpy arrays or tensors of any floating type and on any device; the
            work is done in float64 on the CPU.

    Returns:
        The distance, in squared units of the features, at least 0.

    Raises:
        ValueError: Shapes do not fit, or a covariance is not finite, not symmetric or has a negative eigenvalue.
    """
    mean_a, covariance_a = _check_moments("a", mean_a, covariance_a)
    mean_b, covariance_b = _check_moments("b", mean_b, covariance_b)
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"mean_a has {len(mean_a)} features and mean_b has {len(mean_b)}: statistics of one extractor are needed"
        )
    root = _factor(covariance_a, "covariance_a").T @ _factor(covariance_b, "covariance_b")
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace()
    # rounding makes that of equal distributions negative, by about 1e-15 of the traces
    return max(0.0, (distance - 2 * _sum_singular_values(root)).item())


def distance_of_statistics(reference: FeatureStatistics, model: FeatureStatistics) -> float:
    """`frechet_distance` of two sets of features."""
    return frechet_distance(reference.mean, reference.covariance, model.mean, model.covariance)


def _check_moments(side: str, *moments: Array) -> tuple[torch.Tensor, torch.Tensor]:
    # a copy of arrays, because torch takes none that is read-only, such as a memory map
    mean, covariance = (
        values.detach().cpu().double() if isinstance(values, torch.Tensor) else torch.tensor(np.array(values, float))
        for values in moments
    )
    if mean.ndim != 1 or len(mean) == 0:
        raise ValueError(f"mean_{side} must have the shape (features,), but has {tuple(mean.shape)}")
    if covariance.shape != 2 * mean.shape:
        raise ValueError(
            f"covariance_{side} must have the shape {tuple(2 * mean.shape)}, as mean_{side} has {len(mean)} features,"
            f" but has {tuple(covariance.shape)}"
        )
    for name, value in (("mean", mean), ("covariance", covariance)):
        if not value.isfinite().all():
            raise ValueError(f"{name}_{side} has a NaN or an infinity")
    asymmetry = (covariance - covariance.T).abs().max()
    if asymmetry > _FLOAT32_ROUNDING * covariance.abs().max():
        raise ValueError(f"covariance_{side} is not symmetric: values that should be equal differ by {asymmetry:.3g}")
    return mean, (covariance + covariance.T) / 2


def _factor(covariance: torch.Tensor, name: str) -> torch.Tensor:
    """F with ``covariance = F F^T``, (features, rank): by Cholesky where the rank is full, else by eigenvectors."""
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


def _sum_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """Adds up singular values, as roots of the eigenvalues of the square where that is as good.

    That takes half the time, but may lose those below 1e-8 of the largest, which the determinant shows: where their
    logarithms agreed to 1e-3, the sum was right to 1e-10. With the largest columns first small ones mostly survive.
    """
    if 0 < matrix.shape[0] == matrix.shape[1]:
        graded = matrix[:, matrix.norm(dim=0).argsort(descending=True)]
        squares = torch.linalg.eigvalsh(graded.T @ graded)
        # one that came out as 0 or negative makes the sum -inf or NaN, which is not near
        if abs(squares.log().sum() / 2 - torch.linalg.slogdet(matrix).logabsdet) < 1e-3:
            return squares.sqrt().sum()
    return torch.linalg.svdvals(matrix).sum()
