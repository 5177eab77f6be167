"""The features of sFID, and sFID itself in float64."""

import cleanfid.resize
import numpy as np
import pytest
import scipy.linalg
import torch

from imagenet64_diffusion.evaluation import FeatureStatistics
from imagenet64_diffusion.evaluation.evaluating import (
    SPATIAL_STATISTICS_NAME,
    STATISTICS_NAME,
    Evaluation,
    write_evaluation,
)
from imagenet64_diffusion.evaluation.extractors import make_extractor
from imagenet64_diffusion.evaluation.scoring import compare

from .conftest import StandIn, make_pixels


pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:.*`torch.jit")
HEADER = {"protocol": {"protocol": "adm", "num_features": 4}, "images": {}}


@pytest.mark.parametrize("protocol", ["clean", "adm", "edm2"])
def test_spatial_features_are_seven_channels_of_the_layer_channels_last(protocol, stand_in):
    pixels = torch.cat([make_pixels(0, count=3, size=64), make_pixels(1, count=2, size=64)])[..., :50]
    network, captured, resized = StandIn(), [], pixels
    network.load_state_dict(torch.jit.load(str(stand_in)).state_dict())
    network.layers.mixed_6.conv.register_forward_hook(lambda module, inputs, output: captured.append(output))
    if protocol == "clean":
        resize = cleanfid.resize.build_resizer("clean")
        resized = torch.from_numpy(np.stack([resize(one.permute(1, 2, 0).numpy()) for one in pixels])).movedim(3, 1)
    # which resizes as TensorFlow does, and leaves what has its size as it is
    network(resized)
    expected = captured[0][:, :7].detach().numpy()
    assert expected.shape == (5, 7, 17, 17)

    found = make_extractor(protocol, weights=stand_in, batch_size=2)(pixels).spatial_features
    assert (found.shape, found.dtype) == ((5, 2023), torch.float32)
    for channel in range(7):
        places = found[:, channel::7].reshape(5, 17, 17)
        np.testing.assert_allclose(places, expected[:, channel], rtol=0, atol=1e-4 * expected.max())


def test_a_network_without_the_layer_is_taken_as_it_is(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = StandIn().eval()
    del network.layers.mixed_6
    torch.jit.script(network).save(tmp_path / "other.pt")
    pixels = make_pixels(2, count=2, size=32)
    with torch.no_grad():
        expected = network(pixels, return_features=True)
    found = make_extractor("adm", weights=tmp_path / "other.pt")(pixels)
    assert found.spatial_features is None
    torch.testing.assert_close(found.features, expected, rtol=1e-5, atol=1e-6)


def write_parts(folder, features, **spatial_features):
    """Two parts, of which those named have spatial features, become an evaluation."""
    (folder / "parts").mkdir(parents=True)
    for name, rows in (("first", slice(0, 30)), ("second", slice(30, 50))):
        arrays = {"features": features[rows]}
        if name in spatial_features:
            arrays["spatial_features"] = spatial_features[name]
        np.savez(folder / "parts" / f"{rows.start:09d}-{rows.stop:09d}.npz", **arrays)
    write_evaluation(folder, HEADER, 50, 50)
    return Evaluation.load(folder)


def distance(rows, others):
    """Eq. 6 of Heusel et al. 2017 in float64 by scipy's root."""
    a, b = np.cov(rows.T), np.cov(others.T)
    root = scipy.linalg.sqrtm(a @ b)
    return np.square(rows.mean(0) - others.mean(0)).sum() + np.trace(a + b - 2 * root.real)


def test_sfid_is_the_distance_of_the_spatial_features(tmp_path):
    rng = np.random.default_rng(0)
    sets = [(rng.normal(size=(50, 4)), rng.normal(shift, 1 + shift, (50, 7))) for shift in (0, 0.3)]
    reference, model = (
        write_parts(tmp_path / str(number), features, first=spatial[:30], second=spatial[30:])
        for number, (features, spatial) in enumerate(sets)
    )
    (features, spatial), (other_features, other_spatial) = sets
    assert model.spatial_statistics.count == 50
    np.testing.assert_allclose(model.spatial_statistics.covariance, np.cov(other_spatial.T), atol=1e-12)
    metrics = compare(reference, model)["metrics"]
    assert metrics["sfid"] == pytest.approx(distance(spatial, other_spatial), rel=1e-9)
    assert metrics["fid"] == pytest.approx(distance(features, other_features), rel=1e-9)
    # the statistics alone, by another name, are not those of the folder
    alone = (model.folder / STATISTICS_NAME).rename(model.folder / "alone.npz")
    with pytest.raises(ValueError, match=r"^sfid cannot be computed: .* has no spatial statistics$"):
        compare(reference, Evaluation.load(alone), ["sfid"])


def test_spatial_statistics_are_of_all_images_or_none(tmp_path):
    """As where a call of a version without them was stopped, and resumed by one with them."""
    rng = np.random.default_rng(1)
    features, spatial = rng.normal(size=(50, 4)), rng.normal(size=(20, 7))
    found = write_parts(tmp_path / "mixed", features, second=spatial)
    assert found.spatial_statistics is None
    assert found.statistics.count == 50
    assert not (found.folder / SPATIAL_STATISTICS_NAME).exists()


def test_sfid_needs_two_images(tmp_path):
    statistics = FeatureStatistics(3)
    statistics.update(np.eye(3)[:1])
    for name in (STATISTICS_NAME, SPATIAL_STATISTICS_NAME):
        statistics.save(tmp_path / name, HEADER)
    found = Evaluation.load(tmp_path)
    with pytest.raises(ValueError, match="has spatial_statistics of 1 images, but at least 2 are needed"):
        compare(found, found, ["sfid"])
