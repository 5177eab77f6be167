"""Mean and covariance of features that stream by, and the file that keeps them."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..data.errors import DataError
from ..data.npz_arrays import NpzArray, array_keys, open_array
from ..utils.atomic_write import atomic_file
from .feature_arrays import BLOCK_ROWS, FeatureRows, check_finite, to_float64


_FORMAT = "imagenet64_diffusion.feature_statistics"
_FORMAT_VERSION = 1


class FeatureStatistics:
    """Mean and covariance in float64 of features that come in batches.

    Rows are gathered in blocks of 1024, whatever the batches; each block's mean and centred sum of products
    joins those before by the pairwise update of Chan, Golub and LeVeque, "Algorithms for computing the sample
    variance: analysis and recommendations" (1983), which stays exact where the mean is far from 0. So the
    size of the batches changes nothing at all, and the order of the rows and merging change the last digits
    only. Memory is at most three matrices (features, features) and two blocks: 140 MB for 2048 features.

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
        """The mean, float64 (features,).

        Raises:
            ValueError: There was no row.
        """
        if self.count == 0:
            raise ValueError("a mean needs at least one image, but there was none")
        self._join_waiting()
        return self._mean.copy()

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance, divided by count - 1, float64 (features, features), exactly symmetric.

        Raises:
            ValueError: There were fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, but count is {self.count}")
        self._join_waiting()
        return (self._scatter + self._scatter.T) / (2 * (self._count - 1))

    def update(self, features: FeatureRows) -> None:
        """Takes in a batch.

        Args:
            features: (images, features), of any floating type and on any device; any number of images.

        Raises:
            ValueError: The shape or type is wrong, or a row has a NaN or an infinity. Nothing of the batch is
                taken in then.
        """
        rows = to_float64(features)
        if rows.shape[1] != self.num_features:
            found = rows.shape[1]
            raise ValueError(f"these statistics are of {self.num_features} features, but there are {found}")
        check_finite(rows)
        while len(rows) > 0:
            taken = rows[: BLOCK_ROWS - self._num_waiting]
            self._waiting[self._num_waiting : self._num_waiting + len(taken)] = taken
            self._num_waiting += len(taken)
            rows = rows[len(taken) :]
            if self._num_waiting == BLOCK_ROWS:
                self._join_waiting()

    def merge(self, other: "FeatureStatistics") -> None:
        """Takes in the rows that another one has seen; the other stays as it is.

        Raises:
            ValueError: It is of another number of features.
        """
        if other.num_features != self.num_features:
            raise ValueError(
                f"these statistics are of {self.num_features} features, but the others are of {other.num_features}"
            )
        other._join_waiting()
        self._join(other._count, other._mean, other._scatter)

    def save(self, file: str | Path, header: Mapping[str, Any] | None = None) -> None:
        """Writes an .npz file, whole or not at all.

        It holds ``mean``, ``covariance``, ``count`` and, as JSON text, ``format`` and ``header``. No pickles.

        Args:
            file: The place; what is there is replaced.
            header: What the statistics are of, as JSON values; None for that of the file they were loaded
                from.

        Raises:
            ValueError: The header is not JSON.
        """
        file = Path(file)
        self._join_waiting()
        arrays = {
            "format": np.array(json.dumps({"name": _FORMAT, "version": _FORMAT_VERSION})),
            "header": np.array(_encode_header(self.header if header is None else header)),
            "count": np.array(self._count, dtype=np.int64),
            "mean": self._mean,
            # one row has no spread, so that nothing is lost by writing zeros
            "covariance": self.covariance if self._count > 1 else np.zeros_like(self._scatter),
        }
        with atomic_file(file) as writing, zipfile.ZipFile(writing, "w") as archive:
            for key, array in arrays.items():
                # a fixed date instead of the clock's: equal statistics make equal files
                with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    @classmethod
    def load(cls, file: str | Path) -> "FeatureStatistics":
        """Reads what :meth:`save` wrote; more rows can be taken in.

        Raises:
            ValueError: The file is damaged or is another kind of file, or its values are not finite, not
                symmetric or no variances. The message names it.
            FileNotFoundError: There is none.
        """
        file = Path(file)
        name = str(file)
        arrays = _open_arrays(file)
        _check_format(_read_json(arrays["format"]), name)
        header = _read_json(arrays["header"])
        stored = arrays["count"]
        if stored.shape != () or stored.dtype != np.int64:
            raise DataError(f"{stored.name} must be one int64 number, but is {stored.shape} of {stored.dtype}")
        count = int(stored.read())
        stored_mean, stored_covariance = arrays["mean"], arrays["covariance"]
        for array in (stored_mean, stored_covariance):
            if array.dtype != np.float64:
                raise DataError(f"{array.name} must be of float64, but is of {array.dtype}")
        shape = stored_mean.shape
        if len(shape) != 1 or shape[0] < 1 or stored_covariance.shape != 2 * shape:
            raise DataError(
                f"{name}: mean and covariance must have the shapes (features,) and (features, features), "
                f"but have {shape} and {stored_covariance.shape}"
            )
        mean, covariance = stored_mean.read(), stored_covariance.read()
        if count < 0:
            raise DataError(f"{name}: count must be at least 0, but is {count}")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise DataError(f"{name}: mean or covariance has a NaN or an infinity")
        if not np.array_equal(covariance, covariance.T):
            raise DataError(f"{name}: covariance is not symmetric")
        if covariance.diagonal().min() < 0:
            raise DataError(f"{name}: covariance has the negative variance {covariance.diagonal().min():.3g}")
        if (count < 2 and covariance.any()) or (count < 1 and mean.any()):
            raise DataError(f"{name}: count is {count}, but mean or covariance is not 0")

        statistics = cls(len(mean))
        statistics.header = header
        statistics._count = count
        statistics._mean = mean
        statistics._scatter = covariance * max(count - 1, 0)
        return statistics

    def _join_waiting(self) -> None:
        if self._num_waiting == 0:
            return
        rows = self._waiting[: self._num_waiting]
        mean = rows.mean(axis=0)
        centred = rows - mean
        # numpy sees that the factors are one array and computes half of the symmetric product
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


def _encode_header(header: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(header), allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the header of statistics must be of JSON values: {error}") from error
    return text


def _open_arrays(file: Path) -> dict[str, NpzArray]:
    name = str(file)
    wanted = ("format", "header", "count", "mean", "covariance")
    missing = set(wanted) - set(array_keys(file, name))
    if missing:
        raise DataError(f"{name} holds no feature statistics: it has no {', '.join(sorted(missing))}")
    return {key: open_array(file, name, key) for key in wanted}


def _read_json(array: NpzArray) -> dict[str, Any]:
    if array.shape != () or array.dtype.kind != "U":
        raise DataError(f"{array.name} must be one text, but is {array.shape} of {array.dtype}")
    try:
        value = json.loads(str(array.read()))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{array.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{array.name} must be a JSON object, but is {value!r:.80}")
    return value


def _check_format(found: dict[str, Any], name: str) -> None:
    right = {"name": _FORMAT, "version": _FORMAT_VERSION}
    if found != right:
        raise DataError(f"{name} must be {json.dumps(right)}, but says {json.dumps(found)[:200]}")
