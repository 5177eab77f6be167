"""Scores of evaluations made by hand, against the metrics' own functions and numbers known beforehand."""

import re

import numpy as np
import pytest

from imagenet64_diffusion.evaluation import (
    FeatureStatistics,
    density_and_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_and_recall,
)
from imagenet64_diffusion.evaluation.evaluating import Evaluation
from imagenet64_diffusion.evaluation.metrics import METRICS
from imagenet64_diffusion.evaluation.scoring import compare


PROTOCOL = {"protocol": "classifier", "weights_sha256": "a" * 64, "num_features": 4, "num_classes": 3}


@pytest.fixture
def make(tmp_path):
    """Writes an evaluation of a number of images, or of features; arrays are probabilities and labels."""

    def make_evaluation(name, features, num_rows=None, protocol=None, images=None, **arrays) -> Evaluation:
        folder = tmp_path / name
        if isinstance(features, int):
            features = np.random.default_rng(len(name)).normal(size=(features, 4))
        statistics = FeatureStatistics(features.shape[1])
        statistics.update(features)
        header = {"protocol": {**PROTOCOL, **(protocol or {})}, "images": images or {"num_classes": 3}}
        statistics.save(folder / "statistics.npz", {**header, "versions": {"torch": "1"}})
        for array_name, array in {"features": features[:num_rows], **arrays}.items():
            if len(array):
                np.save(folder / f"{array_name}.npy", array)
        return Evaluation.load(folder)

    return make_evaluation


@pytest.fixture
def pair(make):
    """Sixty real images and fifty generated ones in four features, with answers of a classifier."""
    rng = np.random.default_rng(3)
    answers = {"probabilities": rng.dirichlet(np.ones(3), 50), "labels": np.arange(50) % 3}
    return make("real", rng.normal(size=(60, 4))), make("generated", rng.normal(0.3, 1.2, (50, 4)), **answers)


def test_each_metric_is_that_of_its_function(pair):
    reference, model = pair
    real, generated = np.array(reference.features), np.array(model.features)
    scores = compare(reference, model, seed=4)
    found = scores["metrics"]
    # these have no spatial features
    assert list(found) == [name for name in METRICS if name != "sfid"]
    assert scores["rows_of_features"] == {"reference": 60, "model": 50}
    assert scores["versions"] == {"reference": {"torch": "1"}, "model": {"torch": "1"}}
    fid = frechet_distance(real.mean(0), np.cov(real.T), generated.mean(0), np.cov(generated.T))
    assert found["fid"] == pytest.approx(fid, rel=1e-9)
    assert found["kid"] == kernel_distance(real, generated, seed=4)._asdict()
    assert (found["precision"], found["recall"]) == precision_and_recall(real, generated, k=3)
    assert (found["density"], found["coverage"]) == density_and_coverage(real, generated, k=5)
    assert found["inception_score"] == inception_score(np.array(model.probabilities), 10, seed=4)._asdict()
    assert compare(reference, model, seed=5)["metrics"]["kid"] != found["kid"]
    assert compare(reference, reference)["metrics"]["fid"] == pytest.approx(0, abs=1e-9)


def test_class_accuracy_by_hand(make):
    """Of six images one has no class; of the five others the first three are read right."""
    answers = np.eye(3)[[0, 1, 2, 0, 1, 2]] * 0.8 + 0.1
    model = make("model", 6, probabilities=answers, labels=np.array([0, 1, 2, 1, 2, -1]))
    assert compare(model, model, ["class_accuracy"])["metrics"] == {"class_accuracy": 3 / 5}
    # only where the classes are the same
    for ours, theirs, known in (("abc", "abc", True), ("abc", "acb", False), (None, "abc", True), ("ab", None, False)):
        images = {"num_classes": len(ours or "abc"), "id2label": ours and dict(enumerate(ours))}
        arrays = {"probabilities": answers, "labels": np.zeros(6, int)}
        model = make("model", 6, protocol={"id2label": theirs and dict(enumerate(theirs))}, images=images, **arrays)
        assert ("class_accuracy" in compare(model, model)["metrics"]) == known


def test_what_cannot_be_computed_is_left_out_or_said(pair, make):
    reference, _ = pair
    arrays = {"probabilities": np.full((5, 3), 1 / 3), "labels": np.full(5, -1)}
    alone, bare, few = make("alone", 1), make("bare", 50, num_rows=0), make("few", 50, num_rows=5, **arrays)
    assert list(compare(reference, bare)["metrics"]) == list(compare(reference, few)["metrics"]) == ["fid"]
    for model, name, reason in (
        (alone, "fid", "statistics of 1 images, but at least 2 are needed"),
        (bare, "kid", "no features"),
        (bare, "class_accuracy", "no probabilities"),
        (few, "recall", "features of 5 images, but at least 6 are needed"),
        (few, "inception_score", "probabilities of 5 images, but at least 10 are needed"),
        (few, "class_accuracy", "no labels of classes that the extractor tells apart"),
    ):
        message = re.escape(f"{name} cannot be computed: {model.folder} has {reason}")
        with pytest.raises(ValueError, match=f"^{message}$"):
            compare(reference, model, [name])
    with pytest.raises(ValueError, match="fid cannot be computed"):
        compare(alone, reference)


def test_warnings(make):
    enough, fewer, too_few = (make(str(count), count, images={"image_size": [3, 64, 64]}) for count in (20, 19, 4))
    grey = make("grey", 20, images={"image_size": [1, 64, 64]})
    assert compare(enough, enough)["warnings"] == compare(enough, grey)["warnings"] == []
    for reference, model, warning in (
        (enough, fewer, f"{fewer.folder} has 19 images: the distance is too large"),
        (too_few, enough, f"{too_few.folder} has 4 images for 4 features: its covariance is singular"),
        # the device is told, and does not hinder
        (enough, make("noted", 20, protocol={"note": "beware", "device": "cuda"}), "beware"),
        (
            enough,
            make("small", 20, images={"image_size": [3, 32, 32]}),
            "the real images are 64x64 and the generated ones 32x32 pixels (height x width)",
        ),
    ):
        (found,) = compare(reference, model)["warnings"]
        assert found.startswith(warning)
