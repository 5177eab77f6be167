"""Evaluating images by features: statistics of features, distances between sets of them, and other metrics.

These names are loaded on first use, so that a command line can print its help without torch.
"""

from typing import TYPE_CHECKING

from ..utils.lazy_exports import lazy_exports


_MODULES = {
    "FeatureStatistics": "statistics",
    "density_and_coverage": "feature_metrics",
    "frechet_distance": "feature_metrics",
    "inception_score": "feature_metrics",
    "kernel_distance": "feature_metrics",
    "precision_and_recall": "feature_metrics",
}
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
