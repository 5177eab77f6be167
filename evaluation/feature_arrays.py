"""Features as the metrics take them: rows in memory or in a memory map, read in blocks and checked."""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch


FeatureRows: TypeAlias = np.ndarray | torch.Tensor

# a block of 2048 features in float64 is 16 MB
BLOCK_ROWS = 1024


def to_float64(rows: FeatureRows) -> np.ndarray:
    """Gives rows as a numpy array of float64, from any device and any floating type.

    Args:
        rows: (rows, features).

    Raises:
        ValueError: They are not two-dimensional, or not floating-point numbers.
    """
    if rows.ndim != 2:
        raise ValueError(f"features must have the shape (images, features), but have {tuple(rows.shape)}")
    if isinstance(rows, torch.Tensor):
        if not rows.is_floating_point():
            raise ValueError(f"features must be floating-point numbers, but are {rows.dtype}")
        # first to the processor: half-precision features make a smaller transfer
        return rows.detach().cpu().to(torch.float64).numpy()
    if not np.issubdtype(rows.dtype, np.floating):
        raise ValueError(f"features must be floating-point numbers, but are {rows.dtype}")
    return np.asarray(rows, dtype=np.float64)


def check_finite(rows: np.ndarray, name: str = "features", first_index: int = 0) -> None:
    """Sees to it that no row has a NaN or an infinity.

    Args:
        rows: (rows, columns).
        name: What the error calls them.
        first_index: The index of the first of these rows, for the error.

    Raises:
        ValueError: One has; the message gives the index of the first.
    """
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name} must be finite, but row {first_index + int(finite.argmin())} is not")


def checked_blocks(
    rows: FeatureRows, name: str = "features", block_rows: int = BLOCK_ROWS
) -> Iterator[tuple[int, np.ndarray]]:
    """Reads rows in order, ``block_rows`` at a time.

    Returns:
        (index of the first row, the rows in float64) for each block.

    Raises:
        ValueError: A row has a NaN or an infinity.
    """
    for start in range(0, len(rows), block_rows):
        block = to_float64(rows[start : start + block_rows])
        check_finite(block, name, start)
        yield start, block


def check_pair(features_a: FeatureRows, features_b: FeatureRows, name_a: str, name_b: str, min_rows: int) -> None:
    """Sees to it that two sets of features can be compared.

    Raises:
        ValueError: Their shapes do not fit each other, or one has fewer than ``min_rows`` rows.
    """
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
