"""imagenet64-evaluate with published statistics as the reference."""

import json
import re

import numpy as np
import pytest
import torch

from imagenet64_diffusion.evaluation.extractors import make_extractor
from imagenet64_diffusion.tests.commands.evaluation_runs import evaluate, files
from imagenet64_diffusion.tests.components import make_pipeline
from imagenet64_diffusion.tests.evaluation.conftest import stand_in  # noqa: F401


pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


@pytest.fixture(name="weights", scope="module")
def weights_fixture(stand_in):  # noqa: F811
    """A network with the layers of the published Inception that are asked for."""
    return stand_in


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, weights):
    """Six generated images, evaluated under the protocol adm."""
    folder = tmp_path_factory.mktemp("published")
    make_pipeline().save_pretrained(folder / "model")
    options = {"num_images": 6, "num_inference_steps": 1, "batch_size": 4, "device": "cpu", "keep_images": "npz"}
    options |= {"protocol": "adm", "weights": weights, "output_dir": folder / "evaluated"}
    assert evaluate("model", model=folder / "model", **options) == 0
    return folder / "evaluated"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file of statistics as guided-diffusion has it, of full rank, and its arrays."""
    rng, arrays = np.random.default_rng(0), {}
    for ending, size in (("", 2048), ("_s", 2023)):
        rows = rng.normal(0, 0.1, (30, size))
        arrays |= {f"mu{ending}": rows.mean(0), f"sigma{ending}": np.cov(rows.T) + 0.01 * np.eye(size)}
    file = tmp_path_factory.mktemp("statistics") / "VIRTUAL.npz"
    np.savez(file, **arrays)
    return file, arrays


def distance(mean, covariance, rows):
    """The Frechet distance in float64 to few rows, where the trace of the root is that of a matrix of their number."""
    centred = (rows - rows.mean(0)) / np.sqrt(len(rows) - 1)
    root = np.sqrt(np.linalg.eigvalsh(centred @ covariance @ centred.T).clip(0)).sum()
    return np.square(mean - rows.mean(0)).sum() + covariance.trace() + np.square(centred).sum() - 2 * root


def test_scores_against_published_statistics(evaluated, published, weights, tmp_path):
    file, arrays = published
    options = {"source": file, "output_dir": tmp_path / "reference", "protocol": "adm", "num_images": 30}
    # the second call finds it done
    for _ in range(2):
        assert evaluate("reference", **options, weights=weights) == 0
        assert files(tmp_path / "reference") == ["spatial_statistics.npz", "statistics.npz"]
    output = tmp_path / "scores.json"
    assert evaluate("score", reference=tmp_path / "reference", model=evaluated, output=output, metrics="sfid") == 0
    found = json.loads(output.read_text())
    images = torch.from_numpy(np.load(evaluated / "images.npz")["arr_0"]).permute(0, 3, 1, 2)
    rows = make_extractor("adm", weights=weights)(images).spatial_features.double().numpy()
    expected = distance(arrays["mu_s"], arrays["sigma_s"], rows)
    assert found["metrics"] == {"sfid": pytest.approx(expected, rel=1e-5)}
    assert found["reference"]["count"] == 30


def test_they_compare_with_their_own_protocol_and_weights_only(evaluated, published, weights, tmp_path, capsys):
    scores = tmp_path / "scores.json"
    for protocol, options, message in (
        ("edm", {"weights": weights}, "protocol is edm in"),
        # without weights they are of the published ones
        ("adm", {}, "weights_sha256 is f58cb9b6ec323ed6"),
    ):
        options |= {"source": published[0], "output_dir": tmp_path / protocol, "num_images": 30}
        assert evaluate("reference", protocol=protocol, **options) == 0
        assert evaluate("score", reference=tmp_path / protocol, model=evaluated, output=scores) == 2
        assert f"error: features of different protocols cannot be compared: {message}" in capsys.readouterr().err
    assert not scores.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_images": 5}, "max_images is 5, but .*VIRTUAL.npz holds statistics and no images: leave it out"),
        ({"split": "test"}, "split is test, but .* holds statistics and no images"),
        ({"protocol": "pixels"}, "num_images is 30, but of .* the protocol pixels takes images, not statistics"),
    ],
)
def test_options_that_do_not_belong_to_them(published, tmp_path, capsys, options, message):
    reference = {"source": published[0], "output_dir": tmp_path / "out", "protocol": "adm", "num_images": 30}
    assert evaluate("reference", **{**reference, **options}) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
