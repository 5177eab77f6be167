"""Metrics of two evaluations, with everything that they depend on beside them."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..utils.atomic_write import write_json
from .evaluating import Evaluation
from .metrics import METRICS
from .options import ScoreOptions
from .protocols import check_comparable
from .statistics import FeatureStatistics


# With fewer images for each feature the bias of the Frechet distance is larger than most differences between models
# (Chong and Forsyth 2020, https://arxiv.org/abs/1911.07023): 10,000 images for Inception's features.
_IMAGES_PER_FEATURE = 5


def score(options: ScoreOptions) -> dict[str, Any]:
    """Computes metrics, writes them to a JSON file, prints them and returns what `compare` gives."""
    reference, model = Evaluation.load(options.reference), Evaluation.load(options.model)
    found = compare(reference, model, options.metrics, seed=options.seed, device=options.device)
    file = Path(options.output) if options.output else model.folder / "scores.json"
    write_json(file, found)
    print(
        f"protocol {found['protocol']['protocol']}, {model.statistics.count:,} images of {model.folder} against"
        f" {reference.statistics.count:,} of {reference.folder}"
    )
    for name, value in found["metrics"].items():
        mean, spread = value.values() if isinstance(value, dict) else (value, None)
        print(f"  {name:<20} {mean:.6g}" + (f" +- {spread:.2g}" if spread is not None else ""))
    for warning in found["warnings"]:
        print(f"  warning: {warning}")
    print(f"with its protocol in {file}")
    return found


def compare(
    reference: Evaluation,
    model: Evaluation,
    names: Sequence[str] = ("all",),
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Metrics of generated images against real ones, with all that they depend on, as JSON values.

    Raises:
        ValueError: If the evaluations have different protocols, or lack what a metric needs that is asked for by name.
    """
    check_comparable(reference.header["protocol"], model.header["protocol"], str(reference.folder), str(model.folder))
    sides = {"reference": reference, "model": model}
    metrics: dict[str, Any] = {}
    computed: dict[Any, Any] = {}
    reasons = []
    for name in METRICS if "all" in names else names:
        metric = METRICS[name]
        try:
            needs = [_find(need, sides, metric.min_images) for need in metric.needs]
        except ValueError as error:
            reasons.append(f"{name} cannot be computed: {error}")
            continue
        # one function may give several metrics of the same
        key = metric.function, metric.needs
        if key not in computed:
            function, options = metric.load(), {"seed": seed, "device": device}
            taken = {name: options[name] for name in options.keys() & inspect.signature(function).parameters}
            computed[key] = function(*needs, **metric.settings, **taken)
        values = computed[key]
        values = values._asdict() if isinstance(values, tuple) else {name: values}  # type: ignore[attr-defined]
        metrics[name] = values.get(name, values)
    if reasons and ("all" not in names or not metrics):
        raise ValueError(reasons[0])
    features = {side: found.features for side, found in sides.items()}
    return {
        "metrics": metrics,
        "protocol": model.header["protocol"],
        **{side: found.header["images"] | {"count": found.statistics.count} for side, found in sides.items()},
        "rows_of_features": {side: rows if rows is None else len(rows) for side, rows in features.items()},
        "settings": {"seed": seed} | {name: METRICS[name].settings for name in metrics if METRICS[name].settings},
        "versions": {side: found.header.get("versions") for side, found in sides.items()},
        "warnings": _warnings(reference, model),
    }


def _find(need: str, sides: Mapping[str, Evaluation], min_images: int) -> Any:
    """What a metric needs; ValueError if that is not there, or of too few images."""
    side, what = need.split(".")
    evaluation = sides[side]
    found = getattr(evaluation, what)
    if found is None:
        missing = "labels of classes that the extractor tells apart" if what == "known_labels" else what
        raise ValueError(f"{evaluation.folder} has no {missing.replace('_', ' ')}")
    count = found.count if isinstance(found, FeatureStatistics) else len(found)
    if count < min_images:
        raise ValueError(f"{evaluation.folder} has {what} of {count} images, but at least {min_images} are needed")
    return found


def _warnings(reference: Evaluation, model: Evaluation) -> list[str]:
    """What a reader of the numbers should mind, a sentence each."""
    found = []
    num_features = model.statistics.num_features
    for evaluation in (reference, model):
        has = f"{evaluation.folder} has {evaluation.statistics.count:,} images"
        if evaluation.statistics.count <= num_features:
            found.append(f"{has} for {num_features:,} features: its covariance is singular: the distance tells little")
        elif evaluation.statistics.count < _IMAGES_PER_FEATURE * num_features:
            found.append(f"{has}: the distance is too large, the more so the fewer there are; compare equal numbers")
    sizes = (each.header["images"].get("image_size", [])[1:] for each in (reference, model))
    real, generated = ("x".join(map(str, size)) for size in sizes)
    if real != generated and real and generated:
        found.append(f"the real images are {real} and the generated ones {generated} pixels (height x width)")
    note = model.header["protocol"].get("note")
    return [*found, note] if note else found
