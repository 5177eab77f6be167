"""Evaluating images by features: statistics of features, distances between sets of them, and other metrics.

These names are loaded on first use, so that a command line can print its help without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any


# public name -> module that defines it
_EXPORTS = {
    "FeatureStatistics": "statistics",
    "density_and_coverage": "feature_metrics",
    "frechet_distance": "frechet",
    "inception_score": "feature_metrics",
    "kernel_distance": "feature_metrics",
    "precision_and_recall": "feature_metrics",
}

__all__ = [
    "FeatureStatistics",
    "density_and_coverage",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_and_recall",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from .feature_metrics import density_and_coverage, inception_score, kernel_distance, precision_and_recall
    from .frechet import frechet_distance
    from .statistics import FeatureStatistics
