"""The table of metrics, read without torch. To add one: write its function, add a line to `METRICS`, and a test."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """One metric of generated images against real ones.

    Its function is one of `feature_metrics`, or ``module:function`` of this package. It is given ``needs``, then
    ``settings`` by name, and ``seed`` and ``device`` where it takes them; it returns a number, a named tuple of which
    one entry has the metric's name, or an `Estimate`.
    """

    label: str
    function: str
    # of reference or model, by the names of an `Evaluation`'s attributes
    needs: tuple[str, ...]
    settings: Mapping[str, Any] = {}
    # or rows of features, of either
    min_images: int = 1
    lower_is_better: bool = False

    @property
    def direction(self) -> str:
        """The label, and which direction is good."""
        return f"{self.label} ({'lower' if self.lower_is_better else 'higher'} is better)"

    def load(self) -> Callable[..., Any]:
        """The function."""
        module, _, name = self.function.rpartition(":")
        return getattr(importlib.import_module(f".{module or 'feature_metrics'}", __package__), name)


_FEATURES, _PREDICTIONS = ("reference.features", "model.features"), ("model.probabilities",)
_STATISTICS = ("reference.statistics", "model.statistics")
_SPATIAL = ("reference.spatial_statistics", "model.spatial_statistics")

METRICS = {
    "fid": Metric("FID", "distance_of_statistics", _STATISTICS, {}, 2, True),
    "kid": Metric("KID", "kernel_distance", _FEATURES, {"num_subsets": 100, "max_subset_size": 1000}, 6, True),
    "sfid": Metric("sFID", "distance_of_statistics", _SPATIAL, {}, 2, True),
    "inception_score": Metric("Inception Score", "inception_score", _PREDICTIONS, {"num_splits": 10}, 10),
    "precision": Metric("precision", "precision_and_recall", _FEATURES, {"k": 3}, 6),
    "recall": Metric("recall", "precision_and_recall", _FEATURES, {"k": 3}, 6),
    "density": Metric("density", "density_and_coverage", _FEATURES, {"k": 5}, 6),
    "coverage": Metric("coverage", "density_and_coverage", _FEATURES, {"k": 5}, 6),
    "class_accuracy": Metric("class accuracy", "class_accuracy", (*_PREDICTIONS, "model.known_labels")),
}
