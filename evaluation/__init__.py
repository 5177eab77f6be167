"""Evaluating images by features: statistics of features, distances between sets of them, and other metrics.

These names are loaded on first use, so that a command line can print its help without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .feature_metrics import (
        density_and_coverage,
        frechet_distance,
        inception_score,
        kernel_distance,
        precision_and_recall,
    )
    from .statistics import FeatureStatistics

__all__ = [
    "FeatureStatistics",
    "density_and_coverage",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_and_recall",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "statistics" if name == "FeatureStatistics" else "feature_metrics"
    return getattr(importlib.import_module(f".{module}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
