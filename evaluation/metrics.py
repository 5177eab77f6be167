"""The table of metrics, which scoring, sweeps, charts and the command line read. It is read without torch.

To add a metric: write its function, add a line to `METRICS`, and a test.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One metric of generated images against real ones.

    Attributes:
        label: Its name in charts.
        function: One of `feature_metrics`, or ``module:function`` of this package. It returns a number, a named tuple
            of which one entry has the metric's name, or an `Estimate`. It is given `needs`, then `settings` by name,
            and ``seed`` and ``device`` where it takes them.
        needs: What it is given, of ``reference`` or ``model``: ``statistics``, ``features``, ``probabilities`` or
            ``known_labels`` (see `Evaluation`).
        settings: Its arguments, which scores.json repeats.
        min_images: How many images (or rows of features) it needs of either.
        lower_is_better: Which direction is good.
    """

    label: str
    function: str
    needs: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    min_images: int = 1
    lower_is_better: bool = False

    @property
    def direction(self) -> str:
        """What a chart says of it."""
        return f"{self.label} ({'lower' if self.lower_is_better else 'higher'} is better)"

    def load(self) -> Callable[..., Any]:
        """The function."""
        module, _, name = self.function.rpartition(":")
        return getattr(importlib.import_module(f".{module or 'feature_metrics'}", __package__), name)


_FEATURES, _PREDICTIONS = ("reference.features", "model.features"), ("model.probabilities",)
_STATISTICS = ("reference.statistics", "model.statistics")

METRICS = {
    "fid": Metric("FID", "distance_of_statistics", _STATISTICS, {}, 2, True),
    "kid": Metric("KID", "kernel_distance", _FEATURES, {"num_subsets": 100, "max_subset_size": 1000}, 6, True),
    "inception_score": Metric("Inception Score", "inception_score", _PREDICTIONS, {"num_splits": 10}, 10),
    "precision": Metric("precision", "precision_and_recall", _FEATURES, {"k": 3}, 6),
    "recall": Metric("recall", "precision_and_recall", _FEATURES, {"k": 3}, 6),
    "density": Metric("density", "density_and_coverage", _FEATURES, {"k": 5}, 6),
    "coverage": Metric("coverage", "density_and_coverage", _FEATURES, {"k": 5}, 6),
    "class_accuracy": Metric("class accuracy", "class_accuracy", (*_PREDICTIONS, "model.known_labels")),
}
