"""Evaluating images by features: statistics of features, distances between sets of them, and other metrics.

These names are loaded on first use, so that a command line can print its help without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .feature_metrics import density_and_coverage, inception_score, kernel_distance, precision_and_recall
    from .frechet import frechet_distance
    from .statistics import FeatureStatistics

_MODULES = {"FeatureStatistics": "statistics", "frechet_distance": "frechet"}

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
    return getattr(importlib.import_module(f".{_MODULES.get(name, 'feature_metrics')}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
