"""Metrics of two sets of features by their nearest neighbours: precision, recall, density and coverage.

A set's manifold is taken to be the union of balls around its points, each of which reaches as far as the
point's k-th nearest neighbour in the same set. Balls are closed: a point at exactly the radius is inside.

Neighbours are exact, not approximate. Distances come from products in float32, of features that are centred
first and thereby lose little in ``|x|^2 + |y|^2 - 2 x.y``. Radii, and distances so near to one that rounding
could decide, are computed again in float64 from the differences, so that the counts are those of float64.

Features are read in blocks of 2048 rows, so that they may be memory maps larger than memory. With 2048
features the memory on the CPU, or on the device and the CPU together, is about 0.5 GB and 24 bytes for each
image.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from ..utils.devices import find_device
from .feature_arrays import FeatureRows, check_pair, checked_blocks, to_float64
from .float32_precision import full_float32


_BLOCK_ROWS = 2048
# So many candidates for the k nearest, beyond k, are measured in float64. Where they are not enough, because
# rounding in float32 is larger than the differences between neighbours, it is noticed.
_SPARE_NEIGHBOURS = 8
# pairs that are measured in float64 at once; of 2048 features two blocks of 16 MB
_PAIRS_AT_ONCE = 1024


class PrecisionRecall(NamedTuple):
    """Shares from 0 to 1.

    Attributes:
        precision: Of the generated images that lie in the manifold of the real ones: how good they are.
        recall: Of the real images that lie in the manifold of the generated ones: how varied those are.
    """

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Two numbers that a few outliers among the real images change little.

    Attributes:
        density: In how many balls around real images a generated one lies, divided by k: about 1 for equal
            distributions, and more where generated images crowd together among many real ones.
        coverage: Share, from 0 to 1, of the real images whose ball has a generated image in it.
    """

    density: float
    coverage: float


def precision_and_recall(
    real_features: FeatureRows, generated_features: FeatureRows, k: int = 3, device: str | torch.device = "cpu"
) -> PrecisionRecall:
    """Computes improved precision and recall.

    Kynkaanniemi et al. 2019 (https://arxiv.org/abs/1904.06991), section 2.

    Args:
        real_features: (images, features), of any floating type, more than k images.
        generated_features: The same number of features, more than k images. Both values depend on the
            numbers of images: compare those of equal numbers only (the paper has 50,000 of each).
        k: Which neighbour gives the radius; the paper's is 3.
        device: Where the products are computed.

    Returns:
        Precision and recall.

    Raises:
        ValueError: Shapes do not fit, there are too few images, or a row has a NaN or an infinity.
    """
    real, generated = _open_sets(real_features, generated_features, k, device, needs_generated_radii=True)
    balls_with_generated = _count_balls(generated, real, _squared_radii(real, k)).balls_of_point
    balls_with_real = _count_balls(real, generated, _squared_radii(generated, k)).balls_of_point
    return PrecisionRecall(float((balls_with_generated > 0).mean()), float((balls_with_real > 0).mean()))


def density_and_coverage(
    real_features: FeatureRows, generated_features: FeatureRows, k: int = 5, device: str | torch.device = "cpu"
) -> DensityCoverage:
    """Computes density and coverage.

    Naeem et al. 2020 (https://arxiv.org/abs/2002.09797), section 3.

    Args:
        real_features: (images, features), of any floating type, more than k images.
        generated_features: The same number of features, at least one image.
        k: Which neighbour gives the radius; the paper's is 5. Coverage depends on it and on the numbers of
            images.
        device: Where the products are computed.

    Returns:
        Density and coverage.

    Raises:
        ValueError: Shapes do not fit, there are too few images, or a row has a NaN or an infinity.
    """
    real, generated = _open_sets(real_features, generated_features, k, device, needs_generated_radii=False)
    counts = _count_balls(generated, real, _squared_radii(real, k))
    return DensityCoverage(float(counts.balls_of_point.mean() / k), float((counts.points_of_ball > 0).mean()))


class _Block(NamedTuple):
    """Rows of a set: their indices, and in float32 the rows centred and scaled and their squared lengths."""

    indices: slice
    rows: torch.Tensor
    squares: torch.Tensor


class _FeatureSet:
    """Features with what is taken from all of them before products are formed."""

    def __init__(self, features: FeatureRows, centre: np.ndarray, scale: float, device: torch.device):
        self.features, self.scale = features, scale
        self._centre, self._device = centre, device

    def __len__(self) -> int:
        return len(self.features)

    def blocks(self) -> Iterator[_Block]:
        for start in range(0, len(self), _BLOCK_ROWS):
            read = to_float64(self.features[start : start + _BLOCK_ROWS])
            rows = torch.from_numpy((read - self._centre) / self.scale)
            squares = rows.square().sum(dim=1)
            on_device = (tensor.to(self._device, torch.float32) for tensor in (rows, squares))
            yield _Block(slice(start, start + len(rows)), *on_device)

    def read_rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows in float64 as they are; each that is asked for more than once is read once."""
        unique, inverse = np.unique(indices, return_inverse=True)
        return to_float64(self.features[unique])[inverse.reshape(indices.shape)]


def _open_sets(
    real: FeatureRows, generated: FeatureRows, k: int, device: str | torch.device, needs_generated_radii: bool
) -> tuple[_FeatureSet, _FeatureSet]:
    if k < 1:
        raise ValueError(f"k must be at least 1, but is {k}")
    check_pair(real, generated, "real_features", "generated_features", min_rows=1)
    for name, features, needs_radii in (
        ("real_features", real, True),
        ("generated_features", generated, needs_generated_radii),
    ):
        if needs_radii and len(features) <= k:
            raise ValueError(f"{name} must have more than k = {k} images, but has {len(features)}")
    # the median stays among the many even where a few outliers pull the mean far away
    centre = np.median(to_float64(real[:: -(-len(real) // _BLOCK_ROWS)]), axis=0)
    # with lengths of at most 1 nothing overflows in float32
    squares = [
        np.square(block - centre).sum(axis=1).max()
        for name, features in (("real_features", real), ("generated_features", generated))
        for _, block in checked_blocks(features, name)
    ]
    scale = max(squares) ** 0.5 or 1.0
    device = find_device(device)
    return _FeatureSet(real, centre, scale, device), _FeatureSet(generated, centre, scale, device)


def _squared_distances(points: _Block, others: _Block) -> torch.Tensor:
    """Squared distances (points, others) in float32; one near 0 may come out negative."""
    distances = torch.addmm(others.squares[None], points.rows, others.rows.T, alpha=-2)
    return distances.add_(points.squares[:, None])


def _rounding(points: _Block, others: _Block) -> torch.Tensor:
    """How far squared distances in float32 may be from the true ones (points, others).

    The bound of the theory grows with the number of features. Errors of random sign grow with its root, and
    the largest that were measured are a third of what is given here.
    """
    relative = torch.finfo(torch.float32).eps * max(16.0, 2 * points.rows.shape[1] ** 0.5)
    return relative * (points.squares[:, None] + others.squares)


def _squared_radii(points: _FeatureSet, k: int) -> np.ndarray:
    """Squared distance of each point from its k-th nearest neighbour, in float64 (points,)."""
    num_candidates = min(k + 1 + _SPARE_NEIGHBOURS, len(points))
    radii = np.empty(len(points))
    with full_float32():
        for block in points.blocks():
            bounds = block.rows.new_empty(len(block.rows), 0)
            candidates = torch.empty_like(bounds, dtype=torch.int64)
            for others in points.blocks():
                # the least that a distance may be in truth
                lowest = _squared_distances(block, others).sub_(_rounding(block, others))
                among, positions = lowest.topk(min(num_candidates, lowest.shape[1]), largest=False)
                bounds = torch.cat([bounds, among], dim=1)
                candidates = torch.cat([candidates, positions + others.indices.start], dim=1)
                bounds, positions = bounds.topk(min(num_candidates, bounds.shape[1]), largest=False)
                candidates = candidates.gather(1, positions)
            exact = _radii_of_candidates(points, block.indices, candidates.cpu().numpy(), k)
            if num_candidates < len(points):
                # what is no candidate is at least as far away as the last bound, and nothing is nearer than 0
                last_bound = bounds.max(dim=1).values.cpu().numpy().astype(np.float64) * points.scale**2
                for row in ((exact > last_bound) & (exact > 0)).nonzero()[0]:
                    exact[row] = _radius_of_all(points, block.indices.start + row, k)
            radii[block.indices] = exact
    return radii


def _radii_of_candidates(points: _FeatureSet, block: slice, candidates: np.ndarray, k: int) -> np.ndarray:
    own = np.arange(block.start, block.stop)
    rows = np.repeat(own, candidates.shape[1])
    squared = _exact_squared_distances(points, rows, points, candidates.reshape(-1)).reshape(candidates.shape)
    # a point is no neighbour of its own
    squared[candidates == own[:, None]] = np.inf
    return np.partition(squared, k - 1, axis=1)[:, k - 1]


def _radius_of_all(points: _FeatureSet, index: int, k: int) -> float:
    """The radius of a point whose neighbours float32 does not tell from others: to all points in float64."""
    own = points.read_rows(np.array([index]))
    squared = [np.square(rows - own).sum(axis=1) for _, rows in checked_blocks(points.features)]
    # the nearest of all is the point itself
    return np.partition(np.concatenate(squared), k)[k]


class _BallCounts(NamedTuple):
    """In how many balls a point lies, int64 (points,), and how many points a ball has, int64 (balls,)."""

    balls_of_point: np.ndarray
    points_of_ball: np.ndarray


def _count_balls(points: _FeatureSet, centres: _FeatureSet, squared_radii: np.ndarray) -> _BallCounts:
    balls_of_point = np.zeros(len(points), dtype=np.int64)
    points_of_ball = np.zeros(len(centres), dtype=np.int64)
    with full_float32():
        for block in points.blocks():
            for balls in centres.blocks():
                radii = torch.from_numpy(squared_radii[balls.indices] / centres.scale**2).to(block.rows)
                excess = _squared_distances(block, balls).sub_(radii)
                inside = excess <= 0
                doubtful = excess.abs_() <= _rounding(block, balls)
                inside &= ~doubtful
                balls_of_point[block.indices] += inside.sum(dim=1).cpu().numpy()
                points_of_ball[balls.indices] += inside.sum(dim=0).cpu().numpy()

                point, ball = doubtful.nonzero().cpu().numpy().T
                point, ball = point + block.indices.start, ball + balls.indices.start
                is_inside = _exact_squared_distances(points, point, centres, ball) <= squared_radii[ball]
                np.add.at(balls_of_point, point[is_inside], 1)
                np.add.at(points_of_ball, ball[is_inside], 1)
    return _BallCounts(balls_of_point, points_of_ball)


def _exact_squared_distances(
    points: _FeatureSet, point_indices: np.ndarray, others: _FeatureSet, other_indices: np.ndarray
) -> np.ndarray:
    """Squared distances in float64 of pairs (pairs,), the same for (x, y) and (y, x)."""
    squared = np.empty(len(point_indices))
    for start in range(0, len(squared), _PAIRS_AT_ONCE):
        pairs = slice(start, start + _PAIRS_AT_ONCE)
        difference = points.read_rows(point_indices[pairs]) - others.read_rows(other_indices[pairs])
        squared[pairs] = np.square(difference).sum(axis=1)
    return squared
