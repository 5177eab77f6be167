"""Features under each protocol, against clean-fid, torchvision, transformers and Pillow."""

import json
import shutil
import sys

import cleanfid.fid
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import transformers
from cleanfid.inception_torchscript import InceptionV3W

from imagenet64_diffusion.evaluation import frechet_distance, options, protocols
from imagenet64_diffusion.evaluation.extractors import make_extractor
from imagenet64_diffusion.evaluation.protocols import COMPARED_ENTRIES, check_comparable
from imagenet64_diffusion.tests.hub.loopback_hub import Blob, Repository

from .conftest import make_pixels, write_images


# what torch says of its formats
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated", "ignore:'torch.load' received a zip")
MODES = ("clean", "legacy_tensorflow")
IMAGENET_MEAN, IMAGENET_STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models: dinov2, a classifier of RGB images with a processor, and one of grey ones without."""
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.Dinov2Config(**TINY, mlp_ratio=2, image_size=56, patch_size=14)
        transformers.Dinov2Model(config).save_pretrained(folder / "dinov2")
        id2label = dict(enumerate(["tench", "goldfish", "shark", "ray", "cock"]))
        sizes = {"intermediate_size": 32, "image_size": 32, "patch_size": 8, "initializer_range": 0.5}
        network = transformers.ViTForImageClassification(transformers.ViTConfig(**TINY, **sizes, id2label=id2label))
        for name in ("vit", "no_processor"):
            network.save_pretrained(folder / name)
        transformers.ViTImageProcessor(
            size={"height": 32, "width": 32}, resample=3, image_mean=[0.4] * 3, image_std=[0.2] * 3
        ).save_pretrained(folder / "vit")
        # as many classes as features, so that several layers could be the head
        config = transformers.ViTConfig(**TINY, **sizes, num_labels=32)
        transformers.ViTForImageClassification(config).save_pretrained(folder / "square")
        config = transformers.ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
        )
        transformers.ResNetForImageClassification(config).save_pretrained(folder / "resnet")
    return folder


def make(name, models, stand_in, **options):
    """An extractor of each kind, with options of `make_extractor`."""
    if name in (*MODES, "pixels"):
        return make_extractor(name, weights=None if name == "pixels" else stand_in, **options)
    return make_extractor("dinov2" if name == "dinov2" else "classifier", weights=models / name, **options)


@pytest.mark.parametrize("kind", [*MODES, "dinov2", "vit", "resnet", "pixels"])
def test_features_do_not_depend_on_the_batch(kind, models, stand_in):
    whole = make(kind, models, stand_in)
    pixels = make_pixels(0, count=5, size=48)[:, : whole.channels]
    features, probabilities, _ = whole(pixels)
    assert features.shape == (5, whole.num_features)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    chunked = make(kind, models, stand_in, batch_size=2)(pixels)
    alone = torch.cat([whole(one[None]).features for one in pixels])
    for other in (chunked.features, alone):
        torch.testing.assert_close(other, features, rtol=1e-5, atol=1e-5 * features.abs().max().item())
    if probabilities is None:
        assert whole.num_classes is None
    else:
        torch.testing.assert_close(probabilities.sum(1), torch.ones(5))
        torch.testing.assert_close(chunked.probabilities, probabilities, rtol=1e-5, atol=1e-6)
    # the same again, and no two images alike
    assert torch.equal(whole(pixels).features, features)
    assert torch.pdist(features).min() > 1e-4 * features.norm()
    assert json.loads(json.dumps(whole.header)) == whole.header
    # grey images are repeated
    if whole.channels == 3:
        grey = pixels[:2, :1]
        assert torch.equal(whole(grey).features, whole(grey.repeat(1, 3, 1, 1)).features)


def test_wrong_images(models, stand_in):
    pixels = make_pixels(0, count=2, size=32)
    pixel_extractor, inception = make_extractor("pixels", channels=2), make("legacy_tensorflow", models, stand_in)
    for extractor, images, message in [
        (inception, pixels.float(), r"torch.float32 .* must be torch.uint8 \(images, 1 or 3, height, width\)"),
        (inception, pixels[0], r"torch.uint8 \(3, 32, 32\), but must be"),
        (inception, pixels[:, :, :0], r"torch.uint8 \(2, 3, 0, 32\), but must be"),
        (inception, pixels[:, :2], r"\(2, 2, 32, 32\), but must be .*1 or 3.* for legacy_tensorflow"),
        (make("resnet", models, stand_in), pixels, r"\(2, 3, 32, 32\), .*\(images, 1, height, width\) for classifier"),
        (pixel_extractor, pixels, r"but must be torch.uint8 \(images, 2, height, width\) for pixels"),
    ]:
        with pytest.raises(ValueError, match=message):
            extractor(images)


def test_pixels_are_means_of_boxes():
    channels = 5
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, channels, 24, 32), dtype=np.uint8))
    extractor = make_extractor("pixels", channels=channels)
    boxes = images.numpy().astype(np.float64).reshape(4, channels, 8, 3, 8, 4).mean(axis=(3, 5)) / 255
    np.testing.assert_allclose(extractor(images).features, boxes.reshape(4, -1), atol=1e-6)
    assert extractor.num_features == channels * 64


# ---------------------------------------------------------------------- Inception


@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated")
@pytest.mark.parametrize("mode", MODES)
def test_features_and_fid_are_those_of_clean_fid(mode, stand_in, tmp_path):
    extractor = make_extractor(mode, weights=stand_in, batch_size=17)
    network = InceptionV3W(str(stand_in.parent), download=False, resize_inside=mode == "legacy_tensorflow").eval()
    moments = []
    for seed in range(2):
        pixels = make_pixels(seed, count=40)
        files = [str(file) for file in write_images(tmp_path / str(seed), pixels)]
        options = {"num_workers": 0, "batch_size": 50, "device": torch.device("cpu"), "mode": mode, "verbose": False}
        theirs = cleanfid.fid.get_files_features(files, network, **options)
        ours, probabilities, _ = extractor(pixels)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
        # with fewer features than images the formula's sqrtm has a regular matrix
        cut = [features[:, :20].astype(np.float64) for features in (ours.numpy(), theirs)]
        moments.append([(features.mean(axis=0), np.cov(features, rowvar=False)) for features in cut])
    (our_a, their_a), (our_b, their_b) = moments
    expected = cleanfid.fid.frechet_distance(*their_a, *their_b)
    assert expected > 0
    assert frechet_distance(*our_a, *our_b) == pytest.approx(expected, rel=1e-6)

    # the network's answer without bias, neither alike nor certain, so that the comparison says something
    published = torch.jit.load(str(stand_in))
    answer = (ours @ published.output.weight.T).softmax(1)
    answer = published(pixels, no_output_bias=True) if mode == "legacy_tensorflow" else answer
    torch.testing.assert_close(probabilities, answer.detach(), rtol=1e-5, atol=1e-7)
    assert 0.11 < probabilities.max(dim=1).values.mean() < 0.9


def test_original_is_what_torchvision_computes(tmp_path):
    """With random weights whose activations stay of one size through all layers."""
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
    file = tmp_path / "inception_v3_google-0cc3c7bd.pth"
    torch.save(network.state_dict(), file)
    pixels = make_pixels(5, count=1, size=32)
    x = F.interpolate(pixels / 255, size=(299, 299), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    captured, spatial = [], []
    network.avgpool.register_forward_hook(lambda module, inputs, output: captured.append(output.flatten(1)))
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output[:, :7]))
    with torch.no_grad():
        logits = network((x - mean) / std)
    extractor = make_extractor("original", weights=file, dtype="float32")
    found = extractor(pixels)
    torch.testing.assert_close(found.features, captured[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.probabilities, logits.softmax(1), rtol=1e-5, atol=1e-7)
    expected = spatial[0].permute(0, 2, 3, 1).reshape(1, 2023)
    torch.testing.assert_close(found.spatial_features, expected, rtol=1e-5, atol=1e-5)
    assert (extractor.num_features, extractor.num_classes) == (2048, 1000)

    half = make_extractor("original", weights=file)
    assert "does not compare with the usual FID" in half.header["note"]
    with pytest.raises(ValueError, match="dtype is float16 in the first and float32 in the second"):
        check_comparable(half.header, extractor.header)


# ---------------------------------------------------------------------- transformers


def resized_by_pillow(pixels, size, mean, std):
    images = [
        PIL.Image.fromarray(one.permute(1, 2, 0).numpy()).resize((size, size), PIL.Image.BICUBIC) for one in pixels
    ]
    return torch.tensor((np.stack(images) / 255 - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)


def test_dinov2_is_the_class_token_of_images_resized_with_pillow(models):
    pixels = make_pixels(2, count=3)
    network = transformers.AutoModel.from_pretrained(models / "dinov2").eval()
    with torch.no_grad():
        # for DINOv2 the pooled output is the class token after the last layer norm
        expected = network(resized_by_pillow(pixels, 224, IMAGENET_MEAN, IMAGENET_STD)).pooler_output
    extractor = make_extractor("dinov2", weights=models / "dinov2")
    torch.testing.assert_close(extractor(pixels).features, expected, rtol=1e-5, atol=1e-5)
    header = extractor.header
    assert (header["network"], header["weights"], header["num_classes"]) == ("Dinov2Model", "dinov2", None)
    half = make_extractor("dinov2", weights=models / "dinov2", dtype="bfloat16")
    error = (half(pixels).features - expected).norm() / expected.norm()
    assert 1e-5 < error < 2e-2


def load_classifier(folder):
    return transformers.AutoModelForImageClassification.from_pretrained(folder).eval()


def test_classifier_with_an_image_processor(models):
    pixels = make_pixels(3, count=4)
    extractor = make_extractor("classifier", weights=models / "vit")
    network = load_classifier(models / "vit")
    with torch.no_grad():
        answer = network(resized_by_pillow(pixels, 32, 0.4, 0.2), output_hidden_states=True)
        features = network.vit.layernorm(answer.hidden_states[-1])[:, 0]
    found = extractor(pixels)
    # torchvision's resampling of uint8 is Pillow's but for a grey level here and there
    assert (found.features - features).norm() / features.norm() < 1e-2
    assert (found.probabilities - answer.logits.softmax(1)).abs().max() < 2e-2
    assert answer.logits.softmax(1).std() > 0.1
    assert extractor.id2label == dict(enumerate(["tench", "goldfish", "shark", "ray", "cock"]))
    resize = extractor.header["resize"]
    assert (resize["processor"], resize["image_mean"]) == ("ViTImageProcessor", [0.4] * 3)


def test_classifier_without_an_image_processor(models):
    pixels = make_pixels(4, count=5, size=32)[:, :1]
    extractor = make_extractor("classifier", weights=models / "resnet")
    network = load_classifier(models / "resnet")
    with torch.no_grad():
        logits = network(pixels / 127.5 - 1).logits
        features = network.resnet(pixels / 127.5 - 1).pooler_output.flatten(1)
    found = extractor(pixels)
    torch.testing.assert_close(found.features, features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.probabilities, logits.softmax(1), rtol=1e-5, atol=1e-6)
    assert extractor.header["normalization"] == "x / 127.5 - 1"
    assert extractor.header["resize"]["size"] is None
    # the last of several layers that could be the head is it
    found = make_extractor("classifier", weights=models / "square")(make_pixels(6, count=2, size=32))
    expected = load_classifier(models / "square").classifier(found.features).softmax(1)
    torch.testing.assert_close(found.probabilities, expected, rtol=1e-4, atol=1e-6)

    # images get the size of the configuration; Pillow's bilinear filter is the antialiased one
    extractor, network = make_extractor("classifier", weights=models / "no_processor"), load_classifier(models / "vit")
    assert extractor.header["resize"]["size"] == [32, 32]
    right, double = make_pixels(5, count=3, size=32), make_pixels(5, count=3, size=64)
    planes = [PIL.Image.fromarray(plane.numpy().astype(np.float32)) for plane in double.flatten(0, 1)]
    resized = np.stack([plane.resize((32, 32), PIL.Image.BILINEAR) for plane in planes]).reshape(3, 3, 32, 32)
    for pixels, inputs, tolerance in ((right, right, 1e-4), (double, torch.tensor(resized), 1e-3)):
        expected = network(inputs / 127.5 - 1).logits.softmax(1).detach()
        torch.testing.assert_close(extractor(pixels).probabilities, expected, rtol=tolerance, atol=1e-5)


def test_weights_from_the_hub(models, online):
    files = {file.name: Blob(file.read_bytes(), file.suffix == ".safetensors") for file in (models / "vit").iterdir()}
    online.repositories["me/vit"] = repository = Repository()
    # files that are never asked for
    repository.commit({**files, "pytorch_model.bin": Blob(b"pickle"), "modeling.py": Blob(b"raise")}, "first")
    extractor = make_extractor("classifier", weights="me/vit")
    assert online.asked("GET", "/cdn/")
    assert not online.asked("GET", "pytorch_model.bin")
    assert not online.asked("GET", "modeling.py")
    with pytest.raises(ValueError, match="me/none is not a folder, and cannot be loaded from the Hub: there is none"):
        make_extractor("dinov2", weights="me/none")
    local = make_extractor("classifier", weights=models / "vit")
    check_comparable(extractor.header, local.header)
    assert (extractor.header["weights"], local.header["weights"]) == ("me/vit", "vit")


# ---------------------------------------------------------------------- headers, arguments, files


def test_comparable_is_what_decides_the_numbers(stand_in):
    header, legacy = (make_extractor(mode, weights=stand_in).header for mode in MODES)
    assert tuple(protocols.PROTOCOLS) == options.PROTOCOLS
    assert header["versions"].keys() == {"Pillow", "clean-fid", "torch"}
    resize = {"library": "Pillow", "filter": "bicubic", "antialias": True, "quantized": False, "size": [299, 299]}
    assert header["resize"] == resize
    # told and not compared
    told = {"versions": {"torch": "1.0"}, "device": "cuda", "weights": "copy.pt", "note": "checked"}
    check_comparable(header, header | told)
    assert set(COMPARED_ENTRIES) == header.keys() - told
    for entry in COMPARED_ENTRIES:
        with pytest.raises(ValueError, match=rf"{entry} is .* in the first and changed in the second"):
            check_comparable(header, {**header, entry: "changed"})
    message = r"protocol is clean in reference.npz and legacy_tensorflow in model.npz; resize is .*; normalization is"
    with pytest.raises(ValueError, match=message):
        check_comparable(header, legacy, "reference.npz", "model.npz")


def test_wrong_weights(models, stand_in, tmp_path):
    garbage, other, network = (tmp_path / name for name in ("garbage.pt", "other.pt", "network.pt"))
    garbage.write_bytes(b"<html>")
    torch.save({"conv.weight": torch.ones(1)}, other)
    torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))).save(str(network))
    for name in ("config", "cut_off"):
        shutil.copytree(models / "vit", tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "cut_off" / "model.safetensors").write_bytes(b"cut off")
    for protocol, weights, message in [
        ("clean", tmp_path / "absent.pt", "no such file; it must be a copy of inception-2015-12-05.pt"),
        ("legacy_tensorflow", garbage, "garbage.pt cannot be read for the protocol legacy_tensorflow"),
        ("legacy_tensorflow", network, "network.pt cannot be read for the protocol legacy_tensorflow"),
        ("original", garbage, "garbage.pt cannot be read for the protocol original"),
        ("original", stand_in, "12-05.pt cannot be read for the protocol original"),
        ("original", other, "cannot be read for the protocol original .*Conv2d_1a_3x3.conv.weight"),
        ("classifier", tmp_path / "absent", "absent is not a folder, and cannot be"),
        ("dinov2", models / "vit" / "config.json", "is a file, but must be a folder of a transformers model"),
        ("dinov2", tmp_path, str(tmp_path)),
        ("classifier", tmp_path / "config", "no file named model.safetensors.*/config"),
        ("classifier", tmp_path / "cut_off", "cut_off cannot be read for the protocol classifier"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            make_extractor(protocol, weights=weights)
        assert "\n" not in str(error.value)


def test_a_missing_library_is_said_with_the_way_to_install_it(stand_in, monkeypatch):
    for module in ("cleanfid.resize", "torchvision.models"):
        monkeypatch.setitem(sys.modules, module, None)
    for protocol in ("clean", "original"):
        message = rf"{protocol} needs another library: pip install 'imagenet64-diffusion\[eval\]' \(import of"
        with pytest.raises(ImportError, match=message):
            make_extractor(protocol, weights=stand_in)
    # the others need neither
    make_extractor("legacy_tensorflow", weights=stand_in)
