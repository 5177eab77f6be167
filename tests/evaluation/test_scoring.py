"""Scores of evaluations made by hand, against the metrics' own functions and numbers known beforehand."""

import json
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
from imagenet64_diffusion.evaluation.evaluation_folder import Evaluation
from imagenet64_diffusion.evaluation.metrics import METRICS
from imagenet64_diffusion.evaluation.options import ScoreOptions
from imagenet64_diffusion.evaluation.scoring import compare, score


PROTOCOL = {"protocol": "classifier", "weights_sha256": "a" * 64, "num_features": 4, "num_classes": 3}


def make(folder, features, *, num_rows=None, protocol=PROTOCOL, images=None, **arrays) -> Evaluation:
    """Writes an evaluation of these features; arrays are probabilities and labels."""
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    header = {"protocol": protocol, "images": images or {"num_classes": 3}, "versions": {"torch": "1"}}
    statistics.save(folder / "statistics.npz", header)
    for name, array in {"features": features[:num_rows], **arrays}.items():
        if array is not None:
            np.save(folder / f"{name}.npy", array)
    return Evaluation.load(folder)


@pytest.fixture
def pair(tmp_path):
    """Sixty real images and fifty generated ones in four features, with answers of a classifier."""
    rng = np.random.default_rng(3)
    real = rng.normal(size=(60, 4))
    generated = rng.normal(0.3, 1.2, (50, 4))
    probabilities = rng.dirichlet(np.ones(3), 50)
    labels = np.arange(50) % 3
    return make(tmp_path / "real", real), make(
        tmp_path / "generated", generated, probabilities=probabilities, labels=labels
    )


def test_each_metric_is_that_of_its_function(pair):
    reference, model = pair
    real, generated = np.array(reference.features), np.array(model.features)
    found = compare(reference, model, seed=4)["metrics"]
    assert list(found) == list(METRICS)
    fid = frechet_distance(real.mean(0), np.cov(real.T), generated.mean(0), np.cov(generated.T))
    assert found["fid"] == pytest.approx(fid, rel=1e-9)
    kid = kernel_distance(real, generated, seed=4)
    assert found["kid"] == {"mean": kid.mean, "standard_deviation": kid.standard_deviation}
    assert (found["precision"], found["recall"]) == precision_and_recall(real, generated, k=3)
    assert (found["density"], found["coverage"]) == density_and_coverage(real, generated, k=5)
    value = inception_score(np.array(model.probabilities), 10, seed=4)
    assert found["inception_score"] == {"mean": value.mean, "standard_deviation": value.standard_deviation}
    assert compare(reference, model, seed=5)["metrics"]["kid"] != found["kid"]
    assert compare(reference, reference)["metrics"]["fid"] == pytest.approx(0, abs=1e-9)


def test_class_accuracy_by_hand(tmp_path):
    """Of six images one has no class; of the five others the first three are read right."""
    features = np.random.default_rng(0).normal(size=(6, 4))
    answers = np.eye(3)[[0, 1, 2, 0, 1, 2]] * 0.8 + 0.1
    model = make(tmp_path, features, probabilities=answers, labels=np.array([0, 1, 2, 1, 2, -1]))
    assert compare(model, model, ["class_accuracy"])["metrics"] == {"class_accuracy": 3 / 5}


@pytest.mark.parametrize(
    ("ours", "theirs", "known"),
    [
        ({"0": "a", "1": "b", "2": "c"}, {"0": "a", "1": "b", "2": "c"}, True),
        ({"0": "a", "1": "b", "2": "c"}, {"0": "a", "1": "c", "2": "b"}, False),
        (None, {"0": "a", "1": "b", "2": "c"}, True),
        ({"0": "a", "1": "b"}, None, False),
    ],
)
def test_class_accuracy_only_where_the_classes_are_the_same(tmp_path, ours, theirs, known):
    images = {"num_classes": 3 if ours is None else len(ours), "id2label": ours}
    arrays = {"probabilities": np.full((6, 3), 1 / 3), "labels": np.zeros(6, int)}
    features = np.random.default_rng(0).normal(size=(6, 4))
    model = make(tmp_path, features, protocol={**PROTOCOL, "id2label": theirs}, images=images, **arrays)
    assert ("class_accuracy" in compare(model, model)["metrics"]) == known
    if not known:
        with pytest.raises(ValueError, match="has no labels of classes that the extractor tells apart"):
            compare(model, model, ["class_accuracy"])


def test_what_cannot_be_computed_is_left_out_or_said(pair, tmp_path):
    reference, _ = pair
    rng = np.random.default_rng(0)
    bare = make(tmp_path / "bare", rng.normal(size=(50, 4)), num_rows=0)
    (tmp_path / "bare" / "features.npy").unlink()
    bare = Evaluation.load(tmp_path / "bare")
    assert list(compare(reference, bare)["metrics"]) == ["fid"]
    few = make(
        tmp_path / "few",
        rng.normal(size=(50, 4)),
        num_rows=5,
        probabilities=np.full((5, 3), 1 / 3),
        labels=np.full(5, -1),
    )
    assert list(compare(reference, few)["metrics"]) == ["fid"]
    for model, name, reason in (
        (bare, "kid", f"{bare.folder} has no features"),
        (bare, "class_accuracy", f"{bare.folder} has no probabilities"),
        (few, "recall", f"{few.folder} has features of 5 images, but at least 6 are needed"),
        (few, "inception_score", f"{few.folder} has probabilities of 5 images, but at least 10 are needed"),
        (few, "class_accuracy", f"{few.folder} has no labels of classes that the extractor tells apart"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{name} cannot be computed: {reason}')}$"):
            compare(reference, model, [name])


def test_different_protocols_are_not_compared(pair, tmp_path):
    reference, model = pair
    other = make(tmp_path / "other", np.array(model.features), protocol={**PROTOCOL, "weights_sha256": "b" * 64})
    with pytest.raises(ValueError, match=f"weights_sha256 is {'a' * 64} in .*real and {'b' * 64} in .*other"):
        compare(reference, other)
    # versions and device are told, and do not hinder
    told = make(tmp_path / "told", np.array(model.features), protocol={**PROTOCOL, "device": "cuda", "versions": {}})
    assert compare(reference, told)["metrics"]["fid"] > 0


def test_too_few_images_are_said(tmp_path):
    rng = np.random.default_rng(0)
    enough, fewer, too_few = (make(tmp_path / str(count), rng.normal(size=(count, 4))) for count in (20, 19, 4))
    assert compare(enough, enough)["warnings"] == []
    (warning,) = compare(enough, fewer)["warnings"]
    assert warning.startswith(f"{fewer.folder} has 19 images: the distance is too large")
    (warning,) = compare(too_few, enough)["warnings"]
    assert warning == (
        f"{too_few.folder} has 4 images for 4 features: its covariance is singular, and the distance tells little"
    )
    alone = make(tmp_path / "1", rng.normal(size=(1, 4)))
    with pytest.raises(
        ValueError, match=f"^fid .* computed: {alone.folder} has statistics of 1 images, but at least 2 are needed$"
    ):
        compare(enough, alone)
    noted = make(tmp_path / "noted", rng.normal(size=(20, 4)), protocol={**PROTOCOL, "note": "beware"})
    assert compare(enough, noted)["warnings"] == ["beware"]


def test_other_sizes_are_said(tmp_path):
    features = np.random.default_rng(0).normal(size=(20, 4))
    small, large, grey = (
        make(tmp_path / name, features, images={"image_size": size})
        for name, size in (("small", [3, 32, 32]), ("large", [3, 64, 64]), ("grey", [1, 64, 64]))
    )
    assert compare(large, grey)["warnings"] == []
    (warning,) = compare(large, small)["warnings"]
    assert warning == "the real images are 64x64 and the generated ones 32x32 pixels (height x width)"


def test_the_file(pair, tmp_path, capsys):
    reference, model = pair
    folders = {"reference": str(reference.folder), "model": str(model.folder)}
    found = score(ScoreOptions(**folders, metrics=["fid", "kid"]))
    file = model.folder / "scores.json"
    assert json.loads(file.read_text()) == found
    assert list(found["metrics"]) == ["fid", "kid"]
    assert found["protocol"] == PROTOCOL
    assert found["reference"]["count"] == 60
    assert found["model"]["count"] == 50
    assert found["rows_of_features"] == {"reference": 60, "model": 50}
    assert found["versions"] == {"reference": {"torch": "1"}, "model": {"torch": "1"}}
    shown = capsys.readouterr().out
    assert f"50 images of {model.folder} against 60 of {reference.folder}" in shown
    assert f"with its protocol in {file}" in shown
    assert [name for name in METRICS if f"  {name} " in shown] == ["fid", "kid"]
    again = score(ScoreOptions(**folders, output=str(tmp_path / "a.json"), metrics=["kid", "fid"]))
    assert again["metrics"] == found["metrics"]
