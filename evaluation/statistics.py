"""Rows of features as the metrics take them, and their mean and covariance as they stream by."""

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from ..utils.atomic_write import atomic_file


FeatureRows: TypeAlias = np.ndarray | torch.Tensor

# a block of 2048 features in float64 is 16 MB
BLOCK_ROWS = 1024
_FORMAT = {"name": "imagenet64_diffusion.feature_statistics", "version": 1}


def to_float64(rows: FeatureRows) -> np.ndarray:
    """Gives rows (rows, features) of any floating type and device as a numpy array of float64.

    Raises:
        ValueError: They are not two-dimensional, or not floating-point numbers.
    """
    if rows.ndim != 2:
        raise ValueError(f"features must have the shape (images, features), but have {tuple(rows.shape)}")
    is_floating = (
        rows.is_floating_point() if isinstance(rows, torch.Tensor) else np.issubdtype(rows.dtype, np.floating)
    )
    if not is_floating:
        raise ValueError(f"features must be floating-point numbers, but are {rows.dtype}")
    if isinstance(rows, torch.Tensor):
        # first to the CPU: half-precision features make a smaller transfer
        return rows.detach().cpu().to(torch.float64).numpy()
    return np.asarray(rows, dtype=np.float64)


def check_finite(rows: np.ndarray, name: str = "features", first_index: int = 0) -> None:
    """Raises ValueError, with the index of the first, if one of rows (rows, columns) has a NaN or an infinity."""
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name} must be finite, but row {first_index + int(finite.argmin())} is not")


def checked_blocks(rows: FeatureRows, name: str = "features") -> Iterator[tuple[int, np.ndarray]]:
    """Reads rows in blocks, in order: the index of the first and the rows in float64; ValueError if not finite."""
    for start in range(0, len(rows), BLOCK_ROWS):
        block = to_float64(rows[start : start + BLOCK_ROWS])
        check_finite(block, name, start)
        yield start, block


def check_pair(features_a: FeatureRows, features_b: FeatureRows, name_a: str, name_b: str, min_rows: int) -> None:
    """Raises ValueError if shapes do not fit each other, or a set has fewer than ``min_rows`` rows."""
    for name, features in ((name_a, features_a), (name_b, features_b)):
        if features.ndim != 2 or features.shape[1] == 0:
            raise ValueError(f"{name} must have the shape (images, features), but has {tuple(features.shape)}")
        if len(features) < min_rows:
            raise ValueError(f"{name} has {len(features)} images, but at least {min_rows} are needed")
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"{name_a} has {features_a.shape[1]} features an image and {name_b} has {features_b.shape[1]}: "
            "features of one extractor are needed"
        )


class FeatureStatistics:
    """Mean and covariance in float64 of features that come in batches.

    Rows are gathered in blocks of 1024; each block joins those before by the pairwise update of Chan, Golub and
    LeVeque (1983), which stays exact where the mean is far from 0. The size of the batches changes nothing at all, the
    order of rows and merging the last digits only. 2048 features take 140 MB.

    Args:
        num_features: Features an image, at least 1.

    Attributes:
        num_features: The same.
        header: What :meth:`load` found beside the statistics, as JSON values.
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
        self._waiting = np.empty((BLOCK_ROWS, num_features))
        self._num_waiting = 0

    @property
    def count(self) -> int:
        """How many rows there were."""
        return self._count + self._num_waiting

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
        """Takes in a batch.

        Args:
            features: (images, features), of any floating type and on any device; any number of images.

        Raises:
            ValueError: The shape or type is wrong, or a row is not finite. Nothing of the batch is taken in then.
        """
        rows = to_float64(features)
        if rows.shape[1] != self.num_features:
            raise ValueError(f"these statistics are of {self.num_features} features, but there are {rows.shape[1]}")
        check_finite(rows)
        while len(rows) > 0:
            taken = rows[: BLOCK_ROWS - self._num_waiting]
            self._waiting[self._num_waiting : self._num_waiting + len(taken)] = taken
            self._num_waiting += len(taken)
            rows = rows[len(taken) :]
            if self._num_waiting == BLOCK_ROWS:
                self._join_waiting()

    def merge(self, other: "FeatureStatistics") -> None:
        """Takes in the rows that another one has seen, which stays as it is; ValueError for other features."""
        if other.num_features != self.num_features:
            raise ValueError(
                f"these statistics are of {self.num_features} features, but the others are of {other.num_features}"
            )
        other._join_waiting()
        self._join(other._count, other._mean, other._scatter)

    def save(self, file: str | Path, header: Mapping[str, Any] | None = None) -> None:
        """Writes an .npz file atomically: ``mean``, ``covariance``, ``count``, and JSON ``format`` and ``header``.

        Args:
            file: The place; what is there is replaced.
            header: What the statistics are of, as JSON values; None for that of the file they were loaded from.

        Raises:
            ValueError: The header is not JSON.
        """
        self._join_waiting()
        try:
            text = json.dumps(dict(self.header if header is None else header), allow_nan=False, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the header of statistics must be of JSON values: {error}") from error
        arrays = {
            "format": np.array(json.dumps(_FORMAT)),
            "header": np.array(text),
            "count": np.array(self._count, dtype=np.int64),
            "mean": self._mean,
            # one row has no spread, so that nothing is lost by writing zeros
            "covariance": self.covariance if self._count > 1 else np.zeros_like(self._scatter),
        }
        with atomic_file(file) as writing, zipfile.ZipFile(writing, "w") as archive:
            for key, array in arrays.items():
                # not by numpy.savez, which puts in the time: equal statistics make equal files
                with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    @classmethod
    def load(cls, file: str | Path) -> "FeatureStatistics":
        """Reads what :meth:`save` wrote; more rows can be taken in.

        Raises:
            ValueError: The file is damaged or is another kind of file, or its values cannot be. The message names it.
            FileNotFoundError: There is none.
        """
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
        if count.shape != () or count.dtype != np.int64 or count < 0:
            raise ValueError(f"{file}: count must be one int64 number that is at least 0")
        if mean.dtype != np.float64 or covariance.dtype != np.float64:
            raise ValueError(f"{file}: mean and covariance must be of float64, not {mean.dtype}, {covariance.dtype}")
        if mean.ndim != 1 or mean.size < 1 or covariance.shape != 2 * mean.shape:
            raise ValueError(
                f"{file}: mean and covariance must have the shapes (features,) and (features, features), "
                f"but have {mean.shape} and {covariance.shape}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(f"{file}: mean or covariance has a NaN or an infinity")
        if not np.array_equal(covariance, covariance.T) or covariance.diagonal().min() < 0:
            raise ValueError(f"{file}: covariance is not symmetric, or has a negative variance")
        if (count < 2 and covariance.any()) or (count < 1 and mean.any()):
            raise ValueError(f"{file}: count is {count}, but mean or covariance is not 0")
        statistics = cls(len(mean))
        statistics.header, statistics._count, statistics._mean = header, int(count), mean
        statistics._scatter = covariance * max(int(count) - 1, 0)
        return statistics

    def _join_waiting(self) -> None:
        rows = self._waiting[: self._num_waiting]
        if len(rows):
            mean = rows.mean(axis=0)
            centred = rows - mean
            self._join(len(rows), mean, centred.T @ centred)
            self._num_waiting = 0

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if count == 0:
            return
        total = self._count + count
        difference = mean - self._mean
        # from no rows at all the weight is 0, and the mean becomes the other's
        weight = self._count * count / total
        self._scatter += scatter
        self._scatter += np.multiply.outer(weight * difference, difference)
        self._mean += difference * (count / total)
        self._count = total
