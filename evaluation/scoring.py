"""Metrics of two evaluations, with everything that they depend on beside them."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .evaluation_folder import Evaluation, write_json
from .metrics import METRICS, Metric
from .options import ScoreOptions
from .protocols import check_comparable


# With fewer images for each feature the bias of the Frechet distance is larger than most differences between models
# (Chong and Forsyth 2020, https://arxiv.org/abs/1911.07023): 10,000 images for Inception's features.
_IMAGES_PER_FEATURE = 5


def score(options: ScoreOptions) -> dict[str, Any]:
    """Computes metrics, writes them to a JSON file and prints them.

    Returns:
        What the file has: ``metrics``: name -> value or values; ``protocol``, ``reference`` and ``model``: what they
        depend on; ``warnings``: what to mind.

    Raises:
        ValueError: If the evaluations have different protocols, or lack what an asked metric needs.
        OSError: If the file cannot be written.
    """
    reference, model = Evaluation.load(options.reference), Evaluation.load(options.model)
    names = None if "all" in options.metrics else options.metrics
    found = compare(reference, model, names, seed=options.seed, device=options.device)
    file = Path(options.output) if options.output else model.folder / "scores.json"
    write_json(file, found)
    print(
        f"protocol {found['protocol']['protocol']}, {model.statistics.count:,} images of {model.folder} against"
        f" {reference.statistics.count:,} of {reference.folder}"
    )
    for name, value in found["metrics"].items():
        is_estimate = isinstance(value, dict)
        shown = f"{value['mean']:.6g} +- {value['standard_deviation']:.2g}" if is_estimate else f"{value:.6g}"
        print(f"  {name:<20} {shown}")
    for warning in found["warnings"]:
        print(f"  warning: {warning}")
    print(f"with its protocol in {file}")
    return found


def compare(
    reference: Evaluation,
    model: Evaluation,
    names: Sequence[str] | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """The metrics of generated images against real ones; see `score`.

    Args:
        reference: Real images.
        model: Generated ones.
        names: Of `METRICS`; None for all that can be computed.
        seed: Of random subsets and splits.
        device: Where precision, recall, density and coverage are computed.

    Raises:
        ValueError: If the evaluations have different protocols, or lack what a metric needs.
    """
    check_comparable(reference.header["protocol"], model.header["protocol"], str(reference.folder), str(model.folder))
    sides = {"reference": reference, "model": model}
    metrics: dict[str, Any] = {}
    settings: dict[str, Any] = {"seed": seed}
    computed: dict[str, Any] = {}
    reasons = []
    for name in METRICS if names is None else names:
        metric = METRICS[name]
        reason = _why_not(metric, sides)
        if reason is not None:
            reasons.append(f"{name} cannot be computed: {reason}")
            continue
        # one function may give several metrics
        if metric.function not in computed:
            function = metric.load()
            options = {"seed": seed, "device": device}
            taken = {key: options[key] for key in options.keys() & inspect.signature(function).parameters}
            needs = [_find(need, sides) for need in metric.needs]
            computed[metric.function] = function(*needs, **metric.settings, **taken)
        value = computed[metric.function]
        if isinstance(value, tuple):
            value = getattr(value, name) if hasattr(value, name) else value._asdict()  # type: ignore[attr-defined]
        metrics[name] = value
        settings |= {name: dict(metric.settings)} if metric.settings else {}
    if reasons and (names is not None or not metrics):
        raise ValueError(reasons[0])
    rows = {side: None if found.features is None else len(found.features) for side, found in sides.items()}
    return {
        "metrics": metrics,
        "protocol": model.header["protocol"],
        **{side: found.header["images"] | {"count": found.statistics.count} for side, found in sides.items()},
        "rows_of_features": rows,
        "settings": settings,
        "versions": {side: found.header.get("versions") for side, found in sides.items()},
        "warnings": _warnings(reference, model),
    }


def _find(need: str, sides: dict[str, Evaluation]) -> Any:
    side, what = need.split(".")
    return getattr(sides[side], what)


def _why_not(metric: Metric, sides: dict[str, Evaluation]) -> str | None:
    """Why a metric cannot be computed, or None."""
    for need in metric.needs:
        folder, found, what = sides[need.split(".")[0]].folder, _find(need, sides), need.split(".")[1]
        if found is None:
            missing = {"known_labels": "labels of classes that the extractor tells apart"}.get(what, what)
            return f"{folder} has no {missing}"
        count = found.count if what == "statistics" else len(found)
        if count < metric.min_images:
            return f"{folder} has {what} of {count} images, but at least {metric.min_images} are needed"
    return None


def _warnings(reference: Evaluation, model: Evaluation) -> list[str]:
    """What a reader of the numbers should mind, a sentence each."""
    found = []
    num_features = model.statistics.num_features
    for evaluation in (reference, model):
        count = evaluation.statistics.count
        if count <= num_features:
            found.append(
                f"{evaluation.folder} has {count:,} images for {num_features:,} features: its covariance is singular,"
                " and the distance tells little"
            )
        elif count < _IMAGES_PER_FEATURE * num_features:
            found.append(
                f"{evaluation.folder} has {count:,} images: the distance is too large, by an amount that depends on"
                " their number; compare only with equal numbers"
            )
    sizes = [evaluation.header["images"].get("image_size", [])[1:] for evaluation in (reference, model)]
    if sizes[0] != sizes[1] and all(sizes):
        real, generated = ("x".join(map(str, size)) for size in sizes)
        found.append(f"the real images are {real} and the generated ones {generated} pixels (height x width)")
    note = model.header["protocol"].get("note")
    return [*found, note] if note else found
