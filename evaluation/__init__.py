"""Evaluating images by features: statistics of features, distances between sets of them, and other metrics.

These names are loaded on first use, so that a command line can print its help without torch.
"""

from typing import TYPE_CHECKING

from ..utils.lazy_exports import lazy_exports


_METRICS = ("density_and_coverage", "frechet_distance", "inception_score", "kernel_distance", "precision_and_recall")
_MODULES = {"FeatureStatistics": "statistics", **dict.fromkeys(_METRICS, "feature_metrics")}
__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_exports(__name__, _MODULES)

if TYPE_CHECKING:
    from .feature_metrics import (
        density_and_coverage,
        frechet_distance,
        inception_score,
        kernel_distance,
        precision_and_recall,
    )
    from .statistics import FeatureStatistics
