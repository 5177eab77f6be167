import builtins
import json

import cleanfid.fid
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cleanfid.inception_torchscript import InceptionV3W

from imagenet64_diffusion.evaluation.protocols import COMPARED_ENTRIES, check_comparable, make_extractor

from .conftest import make_pixels, write_images


# what torch says of its formats, and scipy of how clean-fid calls it
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated"),
    pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated"),
]
MODES = ("clean", "legacy_tensorflow")


def cleanfid_features(files, stand_in, mode) -> np.ndarray:
    """What clean-fid itself makes of image files."""
    network = InceptionV3W(str(stand_in.parent), download=False, resize_inside=mode == "legacy_tensorflow").eval()
    return cleanfid.fid.get_files_features(
        [str(file) for file in files],
        network,
        num_workers=0,
        batch_size=50,
        device=torch.device("cpu"),
        mode=mode,
        verbose=False,
    )


def frechet_distance(features_a, features_b) -> float:
    """As clean-fid computes it."""
    (mean_a, covariance_a), (mean_b, covariance_b) = (
        (np.mean(features, axis=0), np.cov(features, rowvar=False)) for features in (features_a, features_b)
    )
    return cleanfid.fid.frechet_distance(mean_a, covariance_a, mean_b, covariance_b)


@pytest.mark.parametrize("mode", MODES)
def test_features_and_fid_are_those_of_clean_fid(mode, stand_in, tmp_path):
    extractor = make_extractor(mode, weights=stand_in, batch_size=17)
    ours, theirs = [], []
    for seed in range(2):
        pixels = make_pixels(seed, count=40)
        theirs.append(cleanfid_features(write_images(tmp_path / str(seed), pixels), stand_in, mode))
        ours.append(extractor(pixels).features.numpy())
    scale = np.abs(theirs[0]).max()
    for our_features, their_features in zip(ours, theirs, strict=True):
        assert our_features.dtype == np.float32
        np.testing.assert_allclose(our_features, their_features, rtol=1e-5, atol=1e-5 * scale)
    # with fewer features than images the formula's sqrtm has a regular matrix
    ours, theirs = ([features[:, :20].astype(np.float64) for features in pair] for pair in (ours, theirs))
    expected = frechet_distance(*theirs)
    assert expected > 0
    assert frechet_distance(*ours) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_probabilities_are_those_that_the_network_answers_without_bias(mode, stand_in):
    pixels = make_pixels(3, count=9)
    extractor = make_extractor(mode, weights=stand_in)
    found = extractor(pixels)
    network = torch.jit.load(str(stand_in))
    assert network.output.bias.abs().min() > 0
    if mode == "legacy_tensorflow":
        expected = network(pixels, no_output_bias=True)
    else:
        logits = found.features @ network.output.weight.T
        expected = logits.exp() / logits.exp().sum(1, keepdim=True)
    assert extractor.num_classes == 10
    torch.testing.assert_close(found.probabilities, expected.detach(), rtol=1e-5, atol=1e-7)
    # neither alike nor certain, so that the comparison says something
    assert 0.11 < found.probabilities.max(dim=1).values.mean() < 0.9


def test_the_two_modes_differ(stand_in):
    pixels = make_pixels(4, count=4)
    clean, legacy = (make_extractor(mode, weights=stand_in) for mode in MODES)
    assert (clean(pixels).features - legacy(pixels).features).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"protocol is clean in reference.npz and legacy_tensorflow in model.npz"):
        check_comparable(clean.header, legacy.header, "reference.npz", "model.npz")


def make_torchvision_weights(folder):
    """Random weights of torchvision's Inception v3 whose activations stay of one size through all layers."""
    torchvision_models = pytest.importorskip("torchvision.models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision_models.inception_v3(weights=None, init_weights=False, transform_input=True).eval()
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 1.5)
                module.running_mean.normal_(std=0.1)
    file = folder / "inception_v3_google-0cc3c7bd.pth"
    torch.save(network.state_dict(), file)
    return network, file


def test_original_is_what_torchvision_computes(tmp_path):
    network, file = make_torchvision_weights(tmp_path)
    pixels = make_pixels(5, count=2, size=32)
    x = F.interpolate(pixels / 255, size=(299, 299), mode="bilinear", align_corners=False)
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        x[:, channel] = (x[:, channel] - mean) / std
    captured = []
    network.avgpool.register_forward_hook(lambda module, inputs, output: captured.append(output.flatten(1)))
    with torch.no_grad():
        logits = network(x)
    extractor = make_extractor("original", weights=file, dtype="float32")
    found = extractor(pixels)
    torch.testing.assert_close(found.features, captured[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.probabilities, logits.softmax(1), rtol=1e-5, atol=1e-7)
    assert (extractor.num_features, extractor.num_classes) == (2048, 1000)

    half = make_extractor("original", weights=file)
    header = half.header
    assert header["dtype"] == "float16"
    assert "does not compare with the usual FID" in header["note"]
    with pytest.raises(ValueError, match="dtype is float16 in the first and float32 in the second"):
        check_comparable(header, extractor.header)
    answer = half(pixels[:1])
    assert answer.features.dtype == answer.probabilities.dtype == torch.float32
    error = (answer.features - captured[0][:1]).norm() / captured[0][:1].norm()
    assert 1e-5 < error < 1e-2


def test_comparable_is_what_decides_the_numbers(stand_in):
    header = make_extractor("clean", weights=stand_in).header
    stored = json.loads(json.dumps(header))
    assert stored == header
    assert header["versions"].keys() == {"Pillow", "clean-fid", "torch"}
    assert header["resize"] == {
        "library": "Pillow", "filter": "bicubic", "antialias": True, "quantized": False, "size": [299, 299]
    }  # fmt: skip
    # told and not compared
    stored |= {"versions": {"torch": "1.0"}, "device": "cuda", "weights": "copy.pt", "note": "checked"}
    check_comparable(header, stored)
    for entry in (
        "protocol", "network", "features", "resize", "normalization", "dtype", "weights_sha256", "num_features",
        "num_classes",
    ):  # fmt: skip
        assert entry in header
        assert entry in COMPARED_ENTRIES
        with pytest.raises(ValueError, match=rf"{entry} is .* in the first and 'changed'|changed in the second"):
            check_comparable(header, {**stored, entry: "changed"})
    with pytest.raises(ValueError, match=r"dtype is .*; num_features is 2048 in the first and None in the second"):
        check_comparable(header, {**stored, "dtype": "float16", "num_features": None})


# torch says so before it refuses
@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
def test_wrong_arguments(stand_in, tmp_path):
    for arguments, message in [
        ({"protocol": "fid"}, "there is no protocol 'fid': take one of clean, legacy_tensorflow, original, dinov2"),
        ({"protocol": "original", "dtype": "int8"}, "dtype is int8, but must be one of float32, float16, bfloat16"),
        ({"protocol": "clean", "dtype": "float16"}, "dtype is torch.float16, but the protocol clean is"),
        ({"protocol": "clean", "channels": 1}, "channels and pixel_size are for the protocol pixels"),
        ({"protocol": "pixels", "weights": "x.pt"}, "the protocol pixels has no network, but weights is x.pt"),
        ({"protocol": "classifier"}, "the protocol classifier needs weights: a folder"),
        ({"protocol": "pixels", "batch_size": 0}, "batch_size is 0, but must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_extractor(**arguments)
    with pytest.raises(OSError, match=r"absent.pt: no such file; it must be a copy of inception-2015-12-05.pt"):
        make_extractor("clean", weights=tmp_path / "absent.pt")

    garbage = tmp_path / "garbage.pt"
    garbage.write_bytes(b"<html>")
    other = tmp_path / "other.pt"
    torch.save({"conv.weight": torch.ones(1)}, other)
    with pytest.raises(ValueError, match=r"garbage.pt cannot be read as TorchScript \("):
        make_extractor("legacy_tensorflow", weights=garbage)
    for file in (garbage, stand_in):
        with pytest.raises(ValueError, match=f"{file.name} are not those of torchvision's Inception v3"):
            make_extractor("original", weights=file)
    with pytest.raises(ValueError, match=r"not those of torchvision's Inception v3 .*Conv2d_1a_3x3.conv.weight"):
        make_extractor("original", weights=other)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_another_torchscript_network_is_refused(tmp_path):
    network = torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)))
    network.save(str(tmp_path / "network.pt"))
    with pytest.raises(ValueError, match=r"is not the Inception of https.*it has no layers and no output"):
        make_extractor("legacy_tensorflow", weights=tmp_path / "network.pt")


@pytest.mark.parametrize(
    ("protocol", "module", "library"),
    [("clean", "cleanfid", "clean-fid"), ("original", "torchvision", "torchvision")],
)
def test_a_missing_library_is_said_with_the_way_to_install_it(protocol, module, library, stand_in, monkeypatch):
    real_import = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == module:
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"{protocol} needs {library}: pip install 'imagenet64-diffusion\[eval\]'"):
        make_extractor(protocol, weights=stand_in)
    # the others need neither
    make_extractor("legacy_tensorflow", weights=stand_in)
