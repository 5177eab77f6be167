"""Published statistics of real images: the files of guided-diffusion's, EDM's and EDM2's evaluation programs."""

from pathlib import Path
from typing import Any

import numpy as np

from ..data.errors import DataError
from ..data.stored_arrays import NpzArray, open_arrays, plain_dict, read_pickle, read_rows
from .statistics import FeatureStatistics


# how far float32 rounds a matrix from symmetry, relative to its largest value
_ROUNDING = 1e-5


def read_published(source: str, num_images: int | None) -> tuple[FeatureStatistics, FeatureStatistics | None] | None:
    """Statistics of Inception's features, and those of sFID if the file has them; None for no .npz or .pkl of them.

    EDM's .npz holds ``mu`` (2048,) and ``sigma`` (2048, 2048), an unbiased covariance; guided-diffusion's also holds
    ``mu_s`` (2023,) and ``sigma_s``; EDM2's .pkl, which is read as data, ``{"fid": {"mu": ..., "sigma": ...}}``.
    ``num_images`` is of how many images they are, where the file does not say. DataError if an array is missing or is
    not what it should be, which is found before it is read.
    """
    path = Path(source).expanduser()
    kind = path.suffix.lower() if path.is_file() else ""
    arrays: dict[str, Any] = dict(open_arrays(path, source)) if kind == ".npz" else {}
    if kind != ".pkl" and not arrays.keys() & {"mu", "sigma"}:
        return None
    if kind == ".pkl":
        with path.open("rb") as opened:
            content = read_pickle(opened, source)
        arrays = plain_dict(content.get("fid"), f'{source} entry "fid"')
        stored = content.get("num_images", num_images)
        if num_images not in (None, stored):
            raise DataError(f"num_images is {num_images}, but {source} says {stored}: leave it out")
        num_images = stored
    if type(num_images) is not int:
        raise DataError(
            f"num_images is {num_images!r:.80}, but {source} does not say of how many images its statistics are: give"
            " their number, 1281167 for ImageNet's training set"
        )
    spatial = _read_moments(arrays, "_s", 2023, num_images, source) if "mu_s" in arrays else None
    return _read_moments(arrays, "", 2048, num_images, source), spatial


def _read_moments(arrays: dict[str, Any], ending: str, size: int, num_images: int, source: str) -> FeatureStatistics:
    moments = []
    for name, shape in ((f"mu{ending}", (size,)), (f"sigma{ending}", (size, size))):
        array = arrays.get(name)
        if not isinstance(array, np.ndarray | NpzArray) or array.shape != shape or array.dtype.kind != "f":
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray | NpzArray) else "no array"
            raise DataError(f'{source}: "{name}" is {found}, but must be of floating-point numbers {shape}')
        moments.append(np.concatenate(list(read_rows(array))).astype(np.float64))
    mean, covariance = moments
    largest = np.abs(covariance).max()
    # sums of outer products may be symmetric only but for rounding
    if not np.isfinite(largest) or np.abs(covariance - covariance.T).max() > _ROUNDING * largest:
        raise DataError(f'{source}: "sigma{ending}" is not finite or not symmetric, but must be a covariance')
    try:
        return FeatureStatistics.from_moments(mean, (covariance + covariance.T) / 2, num_images)
    except ValueError as error:
        raise DataError(f'{source}: "mu{ending}" and "sigma{ending}" are no statistics: {error}') from error
