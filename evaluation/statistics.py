"""Rows of features as the metrics take them, and their mean and covariance as they stream by."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from ..utils.atomic_write import atomic_file


FeatureRows: TypeAlias = np.ndarray | torch.Tensor

# a block of 2048 features in float64 is 16 MB
_BLOCK_ROWS = 1024
_FORMAT = {"name": "imagenet64_diffusion.feature_statistics", "version": 1}


def to_float64(rows: FeatureRows, name: str = "features") -> np.ndarray:
    """Rows (images, features) of any floating type and device as numpy's float64; ValueError if one is not finite."""
    if isinstance(rows, torch.Tensor):
        is_floating, array = rows.is_floating_point(), rows.detach().cpu().double().numpy()
    else:
        is_floating, array = np.issubdtype(rows.dtype, np.floating), np.asarray(rows, np.float64)
    if array.ndim != 2 or array.shape[1] == 0 or not is_floating:
        found = f"{rows.dtype} {tuple(rows.shape)}"
        raise ValueError(f"{name} must be floating-point numbers (images, features), but are {found}")
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name} must be finite, but row {finite.argmin()} is not")
    return array


def check_pair(min_images: int, **features: FeatureRows) -> None:
    """Raises ValueError unless two sets, given by name, have equally many features, and ``min_images`` at least."""
    (name_a, a), (name_b, b) = features.items()
    if not (a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and min(len(a), len(b)) >= min_images):
        raise ValueError(
            f"{name_a} and {name_b} must be (images, features), at least {min_images} images with as many features,"
            f" but have the shapes {tuple(a.shape)} and {tuple(b.shape)}"
        )


class FeatureStatistics:
    """Mean and covariance in float64 of features that come in batches.

    Blocks of 1024 rows join by the pairwise update of Chan, Golub and LeVeque (1983), which stays exact where the mean
    is far from 0. The size of batches changes nothing, the order of rows the last digits only. 2048 features take
    140 MB. ``header`` is what :meth:`load` found beside the statistics, as JSON values.
    """

    def __init__(self, num_features: int):
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, but is {num_features}")
        self.num_features = num_features
        self.header: dict[str, Any] = {}
        self._count = 0
        self._mean = np.zeros(num_features)
        # the sum of (row - mean) (row - mean)^T
        self._scatter = np.zeros((num_features, num_features))
        self._waiting: list[np.ndarray] = []

    @property
    def count(self) -> int:
        """How many rows there were."""
        return self._count + sum(map(len, self._waiting))

    @property
    def mean(self) -> np.ndarray:
        """The mean, float64 (features,); ValueError without a row."""
        if self.count == 0:
            raise ValueError("a mean needs at least one image, but there was none")
        self._join_waiting()
        return self._mean.copy()

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance, float64 (features, features), exactly symmetric; ValueError below two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, but count is {self.count}")
        self._join_waiting()
        return (self._scatter + self._scatter.T) / (2 * (self._count - 1))

    def update(self, features: FeatureRows) -> None:
        """Takes in a batch, (images, features), of any floating type and on any device; or none of it: ValueError."""
        rows = to_float64(features)
        if rows.shape[1] != self.num_features:
            raise ValueError(f"these statistics are of {self.num_features} features, but there are {rows.shape[1]}")
        while len(rows):
            missing = _BLOCK_ROWS - sum(map(len, self._waiting))
            self._waiting.append(rows[:missing].copy())
            if len(rows) >= missing:
                self._join_waiting()
            rows = rows[missing:]

    def merge(self, other: "FeatureStatistics") -> None:
        """Takes in the rows that another one has seen, which stays as it is; ValueError for other features."""
        if other.num_features != self.num_features:
            told = f"these statistics are of {self.num_features} features"
            raise ValueError(f"{told}, but the others are of {other.num_features}")
        other._join_waiting()
        self._join(other._count, other._mean, other._scatter)

    def save(self, file: str | Path, header: Mapping[str, Any] | None = None) -> None:
        """Writes an .npz file atomically: ``mean``, ``covariance``, ``count``, and JSON ``format`` and ``header``.

        The header is by default that of the file they were loaded from. Equal statistics make equal files.
        """
        try:
            text = json.dumps(dict(self.header if header is None else header), allow_nan=False, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the header of statistics must be of JSON values: {error}") from error
        self._join_waiting()
        # one row has no spread, so that nothing is lost by writing zeros
        covariance = self.covariance if self._count > 1 else np.zeros_like(self._scatter)
        arrays: dict[str, Any] = {"format": np.array(json.dumps(_FORMAT)), "header": np.array(text)}
        arrays |= {"count": np.array(self._count, np.int64), "mean": self._mean, "covariance": covariance}
        with atomic_file(file) as writing, writing.open("wb") as opened:
            np.savez(opened, **arrays)

    @classmethod
    def load(cls, file: str | Path) -> "FeatureStatistics":
        """Reads what :meth:`save` wrote; ValueError, with its name, for a damaged file or one of another kind."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                found, header = (json.loads(str(arrays[name])) for name in ("format", "header"))
                count, mean, covariance = arrays["count"], arrays["mean"], arrays["covariance"]
        except (FileNotFoundError, PermissionError):
            raise
        # numpy and zipfile have no common class for what damaged files make them raise
        except Exception as error:
            raise ValueError(f"{file} holds no whole feature statistics ({error})") from error
        if found != _FORMAT or not isinstance(header, dict):
            raise ValueError(f"{file} must be of the format {json.dumps(_FORMAT)}, but says {json.dumps(found)[:200]}")
        try:
            statistics = cls.from_moments(mean, covariance, count)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        statistics.header = header
        return statistics

    @classmethod
    def from_moments(cls, mean: np.ndarray, covariance: np.ndarray, count: int | np.ndarray) -> "FeatureStatistics":
        """Those of ``count`` images with this mean and unbiased covariance, float64; ValueError if they are none."""
        kinds = [(each.dtype.name, each.shape) for each in (np.asarray(count), mean, covariance)]
        if not (
            kinds == [("int64", ()), ("float64", (mean.size,)), ("float64", (mean.size, mean.size))]
            and mean.size > 0
            and np.isfinite(mean).all()
            and np.isfinite(covariance).all()
            and np.array_equal(covariance, covariance.T)
            and covariance.diagonal().min() >= 0
            and count >= (2 if covariance.any() else int(mean.any()))
        ):
            raise ValueError(
                f"count, mean and covariance are {kinds}, {count} images, but must be int64 (), float64"
                " (features,) and (features, features), finite, symmetric and without negative variances"
            )
        statistics = cls(len(mean))
        statistics._count, statistics._mean = int(count), mean
        statistics._scatter = covariance * max(int(count) - 1, 0)
        return statistics

    def _join_waiting(self) -> None:
        if self._waiting:
            rows = np.concatenate(self._waiting)
            mean = rows.mean(axis=0)
            self._join(len(rows), mean, (rows - mean).T @ (rows - mean))
            self._waiting = []

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self._count + count
        if total == 0:
            return
        difference = mean - self._mean
        # from no rows at all the weight is 0, and the mean becomes the other's
        weight = self._count * count / total
        self._scatter += scatter
        self._scatter += np.multiply.outer(weight * difference, difference)
        self._mean += difference * (count / total)
        self._count = total
