"""Numbers from two measurements, with everything that they depend on beside them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ..utils.atomic_write import atomic_file
from .classifier_score import inception_score
from .frechet import frechet_distance
from .kid import kernel_distance
from .manifolds import density_and_coverage, precision_and_recall
from .measurement import Measurement
from .options import METRICS, ScoreOptions
from .protocols import check_comparable


# With fewer images for each feature the bias of the Frechet distance is larger than most differences between models
# (Chong and Forsyth 2020, https://arxiv.org/abs/1911.07023): 10,000 images for Inception's features.
_IMAGES_PER_FEATURE = 5
_NUM_SUBSETS, _SUBSET_SIZE = 100, 1000
_NUM_SPLITS = 10
_PRECISION_NEIGHBOURS, _DENSITY_NEIGHBOURS = 3, 5

# What each metric needs of the two measurements: features or probabilities, of the model or of both.
_NEEDS = {
    "fid": (),
    "kid": ("reference.features", "model.features"),
    "precision": ("reference.features", "model.features"),
    "recall": ("reference.features", "model.features"),
    "density": ("reference.features", "model.features"),
    "coverage": ("reference.features", "model.features"),
    "inception_score": ("model.probabilities",),
    "class_accuracy": ("model.probabilities", "model.labels"),
}


def score(options: ScoreOptions) -> dict[str, Any]:
    """Computes metrics, writes them to a JSON file and prints them.

    Args:
        options: What to compare.

    Returns:
        What the file has: ``metrics``: name -> value or values; ``protocol``, ``reference`` and ``model``: what they
        depend on; ``warnings``: what to mind.

    Raises:
        ValueError: If the measurements have different protocols, or lack what an asked metric needs.
        OSError: If the file cannot be written.
    """
    reference, model = Measurement.load(options.reference), Measurement.load(options.model)
    names = METRICS if "all" in options.metrics else options.metrics
    everything = "all" in options.metrics
    found = compare(reference, model, names, everything=everything, seed=options.seed, device=options.device)
    file = Path(options.output) if options.output else model.folder / "scores.json"
    with atomic_file(file) as writing:
        writing.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(
        f"protocol {found['protocol']['protocol']}, {model.statistics.count:,} images of {model.folder} against"
        f" {reference.statistics.count:,} of {reference.folder}"
    )
    for name, value in found["metrics"].items():
        print(f"  {name:<20} {_shown(value)}")
    for warning in found["warnings"]:
        print(f"  warning: {warning}")
    print(f"with its protocol in {file}")
    return found


def compare(
    reference: Measurement,
    model: Measurement,
    names: Sequence[str] = METRICS,
    *,
    everything: bool = True,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """The metrics of drawn images against real ones; see `score`.

    Args:
        reference: Real images.
        model: Drawn ones.
        names: Of `METRICS`.
        everything: Leave out what cannot be computed, instead of raising.
        seed: Of what is drawn at random.
        device: Where precision, recall, density and coverage are computed.

    Returns:
        As `score`.

    Raises:
        ValueError: If the measurements have different protocols, or lack what a metric needs.
    """
    check_comparable(reference.header["protocol"], model.header["protocol"], str(reference.folder), str(model.folder))
    metrics: dict[str, Any] = {}
    warnings = _warnings(reference, model)
    # None only where _why_not gives a reason
    features = (cast(np.ndarray, reference.features), cast(np.ndarray, model.features))
    computed: dict[Callable[..., Any], Any] = {}

    def once(compute: Callable[..., Any], *arguments: Any) -> Any:
        if compute not in computed:
            computed[compute] = compute(*arguments)
        return computed[compute]

    for name in names:
        reason = _why_not(name, reference, model)
        if reason is not None:
            if not everything:
                raise ValueError(f"{name} cannot be computed: {reason}")
            continue
        if name == "fid":
            for side in (reference, model):
                if side.statistics.count < 2:
                    raise ValueError(f"fid cannot be computed: {side.folder} has fewer than two images")
            a, b = reference.statistics, model.statistics
            metrics[name] = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
        elif name == "kid":
            kid = kernel_distance(*features, _NUM_SUBSETS, _SUBSET_SIZE, seed)
            metrics[name] = {"mean": kid.mean, "standard_deviation": kid.standard_deviation}
        elif name in ("precision", "recall"):
            pair = once(precision_and_recall, *features, _PRECISION_NEIGHBOURS, device)
            metrics[name] = getattr(pair, name)
        elif name in ("density", "coverage"):
            pair = once(density_and_coverage, *features, _DENSITY_NEIGHBOURS, device)
            metrics[name] = getattr(pair, name)
        elif name == "inception_score":
            value = inception_score(cast(np.ndarray, model.probabilities), _NUM_SPLITS, seed=seed)
            metrics[name] = {"mean": value.mean, "standard_deviation": value.standard_deviation}
        else:
            asked = np.asarray(model.labels)
            read = np.asarray(model.probabilities).argmax(axis=1)
            metrics[name] = float((read == asked)[asked >= 0].mean())
    rows = {
        side: None if features is None else len(features)
        for side, features in (("reference", reference.features), ("model", model.features))
    }
    return {
        "metrics": metrics,
        "protocol": model.header["protocol"],
        "reference": reference.header["images"] | {"count": reference.statistics.count},
        "model": model.header["images"] | {"count": model.statistics.count},
        "rows_of_features": rows,
        "settings": {
            "kid": f"{_NUM_SUBSETS} subsets of at most {_SUBSET_SIZE}",
            "precision and recall": f"k = {_PRECISION_NEIGHBOURS}",
            "density and coverage": f"k = {_DENSITY_NEIGHBOURS}",
            "inception_score": f"{_NUM_SPLITS} splits",
            "seed": seed,
        },
        "versions": {"reference": reference.header.get("versions"), "model": model.header.get("versions")},
        "warnings": warnings,
    }


def _why_not(name: str, reference: Measurement, model: Measurement) -> str | None:
    """Why a metric cannot be computed, or None."""
    for need in _NEEDS[name]:
        side, what = need.split(".")
        measurement = reference if side == "reference" else model
        if getattr(measurement, what) is None:
            return f"{measurement.folder} has no {what}"
    if name == "class_accuracy":
        labels = np.asarray(model.labels)
        if (labels < 0).all():
            return f"the images of {model.folder} have no classes"
        if not _knows_the_classes(model):
            return "the extractor does not tell the model's classes apart"
    if name in ("kid", "precision", "recall", "density", "coverage"):
        fewest = min(len(cast(np.ndarray, side.features)) for side in (reference, model))
        if fewest <= _DENSITY_NEIGHBOURS:
            return f"there are features of {fewest} images only"
    if name == "inception_score" and len(cast(np.ndarray, model.probabilities)) < _NUM_SPLITS:
        return f"there are fewer than {_NUM_SPLITS} images"
    return None


def _knows_the_classes(model: Measurement) -> bool:
    """Whether the classes of the extractor's network are those of the model, by their names where both have some."""
    protocol, images = model.header["protocol"], model.header["images"]
    ours, theirs = images.get("id2label"), protocol.get("id2label")
    if ours is None or theirs is None:
        return (
            protocol.get("num_classes") == images.get("num_classes") == cast(np.ndarray, model.probabilities).shape[1]
        )
    return ours == theirs


def _warnings(reference: Measurement, model: Measurement) -> list[str]:
    """What a reader of the numbers should mind, a sentence each."""
    found = []
    num_features = model.statistics.num_features
    for measurement in (reference, model):
        count = measurement.statistics.count
        if count <= num_features:
            found.append(
                f"{measurement.folder} has {count:,} images for {num_features:,} features: its covariance is singular,"
                " and the distance tells little"
            )
        elif count < _IMAGES_PER_FEATURE * num_features:
            found.append(
                f"{measurement.folder} has {count:,} images: the distance is too large, by an amount that depends on"
                " their number; compare only with equal numbers"
            )
    sizes = [measurement.header["images"].get("image_size", [])[1:] for measurement in (reference, model)]
    if sizes[0] != sizes[1] and all(sizes):
        real, drawn = ("x".join(map(str, size)) for size in sizes)
        found.append(f"the real images are {real} and the drawn ones {drawn} pixels (height x width)")
    note = model.header["protocol"].get("note")
    if note:
        found.append(note)
    return found


def _shown(value: float | dict[str, float]) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.6g} +- {value['standard_deviation']:.2g}"
    return f"{value:.6g}"
