import json

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from imagenet64_diffusion.evaluation.protocols import check_comparable, make_extractor
from imagenet64_diffusion.tests.hub.loopback_hub import Blob, Repository

from .conftest import make_pixels


IMAGENET_MEAN, IMAGENET_STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models: dinov2, a classifier of RGB images with a processor, and one of grey ones without."""
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.Dinov2Config(**tiny, mlp_ratio=2, image_size=56, patch_size=14)
        transformers.Dinov2Model(config).save_pretrained(folder / "dinov2")
        id2label = dict(enumerate(["tench", "goldfish", "shark", "ray", "cock"]))
        config = transformers.ViTConfig(
            **tiny, intermediate_size=32, image_size=32, patch_size=8, id2label=id2label, initializer_range=0.5
        )
        transformers.ViTForImageClassification(config).save_pretrained(folder / "vit")
        transformers.ViTImageProcessor(
            size={"height": 32, "width": 32}, resample=3, image_mean=[0.4] * 3, image_std=[0.2] * 3
        ).save_pretrained(folder / "vit")
        config = transformers.ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
        )
        transformers.ResNetForImageClassification(config).save_pretrained(folder / "resnet")
    return folder


def make(name, models, stand_in, **options):
    """An extractor of each kind, with options of `make_extractor`."""
    match name:
        case "clean" | "legacy_tensorflow":
            return make_extractor(name, weights=stand_in, **options)
        case "dinov2":
            return make_extractor(name, weights=models / name, **options)
        case "vit" | "resnet":
            return make_extractor("classifier", weights=models / name, **options)
    return make_extractor(name, **options)


KINDS = ("clean", "legacy_tensorflow", "dinov2", "vit", "resnet", "pixels")


@pytest.mark.parametrize("kind", KINDS)
def test_features_do_not_depend_on_the_batch(kind, models, stand_in):
    pixels = make_pixels(0, count=11, size=48)
    whole = make(kind, models, stand_in)
    if whole.channels == 1:
        pixels = pixels[:, :1]
    features, probabilities = whole(pixels)
    assert features.shape == (11, whole.num_features)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    chunked = make(kind, models, stand_in, batch_size=4)(pixels)
    alone = [whole(one[None]) for one in pixels]
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * features.abs().max().item()}
    for other in (chunked.features, torch.cat([one.features for one in alone])):
        torch.testing.assert_close(other, features, **tolerance)
    if probabilities is None:
        assert whole.num_classes is None
    else:
        torch.testing.assert_close(probabilities.sum(1), torch.ones(11))
        torch.testing.assert_close(chunked.probabilities, probabilities, rtol=1e-5, atol=1e-6)
    # the same again, and no two images alike
    assert torch.equal(whole(pixels).features, features)
    assert torch.pdist(features).min() > 1e-4 * features.norm()
    empty = whole(pixels[:0])
    assert empty.features.shape == (0, whole.num_features)
    assert (empty.probabilities is None) == (probabilities is None)
    assert json.loads(json.dumps(whole.header)) == whole.header


@pytest.mark.parametrize("kind", ["clean", "legacy_tensorflow", "dinov2", "vit", "pixels"])
def test_grey_images_are_repeated(kind, models, stand_in):
    grey = make_pixels(1, count=2, size=40)[:, :1]
    extractor = make(kind, models, stand_in)
    assert torch.equal(extractor(grey).features, extractor(grey.repeat(1, 3, 1, 1)).features)


def test_wrong_images(models, stand_in):
    extractor = make("legacy_tensorflow", models, stand_in)
    pixels = make_pixels(0, count=2, size=32)
    for images, message in [
        (pixels.float(), r"the images are torch.float32 of shape"),
        (pixels[0], r"of shape \(3, 32, 32\), but must be torch.uint8 \(images, channels, height, width\)"),
        (pixels[:, :, :0], r"of shape \(2, 3, 0, 32\)"),
        (pixels[:, :2], "2 channels, but legacy_tensorflow takes images with 1 channel .* or 3 .*pixels takes any"),
        (pixels.repeat(1, 2, 1, 1), "6 channels, but legacy_tensorflow"),
    ]:
        with pytest.raises(ValueError, match=message):
            extractor(images)
    with pytest.raises(ValueError, match="have 3 channels, but classifier takes images with 1 channels"):
        make("resnet", models, stand_in)(pixels)
    with pytest.raises(ValueError, match=r"have 3 channels, but pixels takes images with 2 channels$"):
        make_extractor("pixels", channels=2)(pixels)
    with pytest.raises(ValueError, match="32x32 pixels, too few to be averaged to 33x33: give a smaller pixel_size"):
        make_extractor("pixels", pixel_size=33)(pixels)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_pixels_are_means_of_boxes(channels):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, channels, 24, 32), dtype=np.uint8))
    extractor = make_extractor("pixels", channels=channels)
    boxes = images.numpy().astype(np.float64).reshape(4, channels, 8, 3, 8, 4).mean(axis=(3, 5)) / 255
    np.testing.assert_allclose(extractor(images).features, boxes.reshape(4, -1), atol=1e-6)
    assert extractor.num_features == channels * 64
    assert make_extractor("pixels", channels=channels, pixel_size=2).num_features == channels * 4


def test_dinov2_is_the_class_token_of_images_resized_with_pillow(models):
    pixels = make_pixels(2, count=3)
    inputs = []
    for one in pixels:
        image = PIL.Image.fromarray(one.permute(1, 2, 0).numpy())
        resized = np.asarray(image.resize((224, 224), PIL.Image.BICUBIC)) / 255
        inputs.append(((resized - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1))
    network = transformers.AutoModel.from_pretrained(models / "dinov2").eval()
    with torch.no_grad():
        # for DINOv2 the pooled output is the class token after the last layer norm
        expected = network(torch.tensor(np.stack(inputs), dtype=torch.float32)).pooler_output
    extractor = make_extractor("dinov2", weights=models / "dinov2")
    torch.testing.assert_close(extractor(pixels).features, expected, rtol=1e-5, atol=1e-5)
    header = extractor.header
    assert (header["network"], header["weights"], header["num_classes"]) == ("Dinov2Model", "dinov2", None)
    half = make_extractor("dinov2", weights=models / "dinov2", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="dtype is float32 in the first and bfloat16 in the second"):
        check_comparable(header, half.header)
    error = (half(pixels).features - expected).norm() / expected.norm()
    assert 1e-5 < error < 2e-2


def test_classifier_with_an_image_processor(models):
    pixels = make_pixels(3, count=4)
    extractor = make_extractor("classifier", weights=models / "vit")
    network = transformers.AutoModelForImageClassification.from_pretrained(models / "vit").eval()
    images = [PIL.Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
    inputs = [np.asarray(image.resize((32, 32), PIL.Image.BICUBIC)) / 255 for image in images]
    with torch.no_grad():
        answer = network(
            torch.tensor((np.stack(inputs) - 0.4) / 0.2, dtype=torch.float32).permute(0, 3, 1, 2),
            output_hidden_states=True,
        )
        features = network.vit.layernorm(answer.hidden_states[-1])[:, 0]
    found = extractor(pixels)
    # torchvision's resampling of uint8 is Pillow's but for a grey level here and there
    assert (found.features - features).norm() / features.norm() < 1e-2
    assert (found.probabilities - answer.logits.softmax(1)).abs().max() < 2e-2
    assert answer.logits.softmax(1).std() > 0.1
    assert extractor.id2label == {0: "tench", 1: "goldfish", 2: "shark", 3: "ray", 4: "cock"}
    assert extractor.num_classes == 5
    resize = extractor.header["resize"]
    assert (resize["processor"], resize["image_mean"]) == ("ViTImageProcessor", [0.4] * 3)


def test_classifier_without_an_image_processor(models):
    pixels = make_pixels(4, count=5, size=32)[:, :1]
    extractor = make_extractor("classifier", weights=models / "resnet")
    network = transformers.AutoModelForImageClassification.from_pretrained(models / "resnet").eval()
    with torch.no_grad():
        inputs = pixels / 127.5 - 1
        answer = network(inputs)
        features = network.resnet(inputs).pooler_output.flatten(1)
    found = extractor(pixels)
    torch.testing.assert_close(found.features, features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.probabilities, answer.logits.softmax(1), rtol=1e-5, atol=1e-6)
    assert extractor.header["normalization"] == "x / 127.5 - 1"
    assert extractor.header["resize"]["size"] is None


def test_classifier_without_an_image_processor_resizes_to_its_configuration(models, tmp_path):
    folder = tmp_path / "vit"
    network = transformers.AutoModelForImageClassification.from_pretrained(models / "vit").eval()
    network.save_pretrained(folder)
    extractor = make_extractor("classifier", weights=folder)
    assert extractor.header["resize"]["size"] == [32, 32]
    right, double = make_pixels(5, count=3, size=32), make_pixels(5, count=3, size=64)
    with torch.no_grad():
        expected = network(right / 127.5 - 1).logits.softmax(1)
        # Pillow's bilinear filter is the antialiased one
        planes = [[np.asarray(PIL.Image.fromarray(plane.numpy().astype(np.float32))
                   .resize((32, 32), PIL.Image.BILINEAR)) for plane in one] for one in double]  # fmt: skip
        expected_double = network(torch.tensor(np.array(planes)) / 127.5 - 1).logits.softmax(1)
    torch.testing.assert_close(extractor(right).probabilities, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(extractor(double).probabilities, expected_double, rtol=1e-3, atol=1e-5)


def test_the_last_of_several_layers_that_could_be_the_head_is_it(tmp_path):
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=1, num_labels=24, initializer_range=0.5)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    extractor = make_extractor("classifier", weights=tmp_path / "vit")
    found = extractor(make_pixels(6, count=2, size=16))
    network = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "vit")
    expected = network.classifier(found.features).softmax(1)
    torch.testing.assert_close(found.probabilities, expected, rtol=1e-4, atol=1e-6)


def test_wrong_models(models, tmp_path):
    for protocol, weights, error, message in [
        ("classifier", tmp_path / "absent", OSError, "absent is not a folder, and cannot be"),
        ("dinov2", models / "vit" / "config.json", OSError, "is a file, but must be a folder of a transformers model"),
        ("dinov2", tmp_path, ValueError, "cannot be loaded with AutoModel"),
    ]:
        with pytest.raises(error, match=message):
            make_extractor(protocol, weights=weights)
    (tmp_path / "config.json").write_bytes((models / "vit" / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"cannot be loaded .*no file named model.safetensors"):
        make_extractor("classifier", weights=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"cannot be loaded with AutoModelForImageClassification \("):
        make_extractor("classifier", weights=tmp_path)


def test_weights_from_the_hub(models, online):
    files = {file.name: Blob(file.read_bytes(), file.suffix == ".safetensors") for file in (models / "vit").iterdir()}
    online.repositories["me/vit"] = repository = Repository()
    # files that are never asked for
    repository.commit({**files, "pytorch_model.bin": Blob(b"pickle"), "modeling.py": Blob(b"raise")}, "first")
    extractor = make_extractor("classifier", weights="me/vit")
    assert online.asked("GET", "/cdn/")
    assert not online.asked("GET", "pytorch_model.bin")
    assert not online.asked("GET", "modeling.py")
    with pytest.raises(OSError, match="me/none is not a folder, and cannot be loaded from the Hub: there is none"):
        make_extractor("dinov2", weights="me/none")
    local = make_extractor("classifier", weights=models / "vit")
    check_comparable(extractor.header, local.header)
    assert (extractor.header["weights"], local.header["weights"]) == ("me/vit", "vit")
