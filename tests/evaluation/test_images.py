"""Images by their number: of files and datasets, and of a model, where they depend on seed and number alone."""

import dataclasses
import json

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from imagenet64_diffusion.data.dataset import PreparedImages
from imagenet64_diffusion.data.errors import DataError
from imagenet64_diffusion.data.image_source import convert_image
from imagenet64_diffusion.evaluation.images import GeneratedImages, count_classes, open_images
from imagenet64_diffusion.evaluation.options import ModelOptions
from imagenet64_diffusion.pipelines.generation_options import Sampler
from imagenet64_diffusion.pipelines.loading import load_pipeline
from imagenet64_diffusion.tests.components import make_pipeline, seeded

from .conftest import make_pixels, write_images


LABELS = torch.arange(23) % 5


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """23 images of 16x16, a number that no batch size divides."""
    return make_pixels(0, count=23, size=16)


@pytest.fixture(scope="module")
def sources(pixels, tmp_path_factory, prepared):
    """Sources of each kind: where, with which labels, and how they are opened."""
    folder = tmp_path_factory.mktemp("sources")
    # in one folder and in folders in it; 2 comes before 10
    for start in (0, 12):
        write_images(folder / "folder" / f"part {start}", pixels[start : start + 12])
    (folder / "folder" / "notes.txt").write_text("no image")
    (folder / "folder" / ".hidden.png").write_text("no image")
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=list("abcde"))})
    images = [PIL.Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
    dataset = datasets.Dataset.from_dict({"photo": images, "kind": LABELS.tolist()}, features=features)
    datasets.DatasetDict(dict.fromkeys(("test", "validation"), dataset)).save_to_disk(folder / "saved")
    # labels that are not whole are none
    columns = {"image": images, "label": [-1] * 23, "caption": ["text"] * 23}
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "unlabelled")
    (folder / "parquet").mkdir()
    dataset.to_parquet(folder / "parquet" / "train.parquet")
    arrays = {"arr_0": pixels.permute(0, 2, 3, 1).numpy(), "arr_1": LABELS.numpy()}
    np.savez(folder / "one.npz", **arrays)
    np.savez_compressed(folder / "compressed.npz", arr_0=arrays["arr_0"])
    (folder / "npz").mkdir()
    for name, rows in (("part2.npz", slice(15)), ("part10.npz", slice(15, None))):
        np.savez(folder / "npz" / name, **{key: value[rows] for key, value in arrays.items()})
    batch = PreparedImages(prepared)[range(96)]
    found = {name: (folder / name, pixels, LABELS, {}) for name in ("parquet", "one.npz", "npz")}
    found |= {name: (folder / name, pixels, None, {}) for name in ("folder", "compressed.npz", "unlabelled")}
    found["saved"] = (folder / "saved", pixels, LABELS, {"split": "validation"})
    return found | {"prepared": (prepared, batch["pixel_values"], batch["class_labels"], {})}


@pytest.mark.parametrize(
    "name", ["folder", "saved", "unlabelled", "parquet", "one.npz", "compressed.npz", "npz", "prepared"]
)
def test_every_source_gives_its_images_in_any_stretches(sources, name):
    path, pixels, labels, options = sources[name]
    images = open_images(path, **options)
    assert len(images) == len(pixels)
    assert images.image_size == tuple(pixels.shape[1:])
    # forwards, on, back, across the end of a file, all
    for start, stop in [(0, 5), (5, 9), (20, 23), (3, 4), (10, 18), (0, len(pixels))]:
        found = images.read(start, stop)
        assert found.pixels.dtype == torch.uint8
        assert torch.equal(found.pixels, pixels[start:stop])
        assert (found.labels is None) == (labels is None)
        if labels is not None:
            assert found.labels.dtype == torch.int64
            assert torch.equal(found.labels, labels[start:stop])
    # the same for who opens it next
    assert open_images(str(path), **options).fingerprint == images.fingerprint


def test_fingerprints_are_of_images_and_their_order(pixels, tmp_path):
    changed = pixels.clone()
    changed[3, 0, 0, 0] ^= 1
    sets = {"first": pixels, "copy": pixels, "changed": changed, "turned": pixels.flip(0), "fewer": pixels[1:]}
    for name, chosen in sets.items():
        write_images(tmp_path / name, chosen)
        labels = LABELS[: len(chosen)].flip(0) if name == "copy" else LABELS[: len(chosen)]
        np.savez(tmp_path / f"{name}.npz", images=chosen.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    for ending in ("", ".npz"):
        first, copy, *others = (open_images(tmp_path / f"{name}{ending}").fingerprint for name in sets)
        assert copy == first
        assert first not in others
    assert open_images(tmp_path / "first", resolution=8).fingerprint != open_images(tmp_path / "first").fingerprint


def test_other_sizes_are_made_as_they_are_prepared(pixels, tmp_path):
    write_images(tmp_path / "images", pixels[:3])
    wide = PIL.Image.fromarray(make_pixels(1, count=1, size=40)[0].permute(1, 2, 0).numpy()[:30])
    wide.save(tmp_path / "images" / "wide.png")
    with pytest.raises(DataError, match=r"wide.png is 40x30 pixels \(width x height\), but the first .* is 16x16"):
        open_images(tmp_path / "images").read(0, 4)
    images = open_images(tmp_path / "images", resolution=8)
    assert images.image_size == (3, 8, 8)
    assert np.array_equal(images.read(3, 4).pixels[0], convert_image(wide, 8, "box"))
    grey = open_images(tmp_path / "images", resolution=8, color_mode="grayscale").read(0, 4).pixels
    assert grey.shape == (4, 1, 8, 8)


def test_broken_images_are_named(pixels, tmp_path):
    files = write_images(tmp_path / "images", pixels[:4])
    files[2].write_bytes(files[2].read_bytes()[:100])
    images = open_images(tmp_path / "images")
    with pytest.raises(DataError, match=f"{files[2].name} is not a readable image"):
        images.read(1, 4)

    np.savez(tmp_path / "images.npz", images=pixels.permute(0, 2, 3, 1).numpy())
    content = bytearray((tmp_path / "images.npz").read_bytes())
    content[2000] ^= 1
    (tmp_path / "images.npz").write_bytes(content)
    images = open_images(tmp_path / "images.npz")
    for _ in range(2):
        with pytest.raises(DataError, match=r"images.npz .* cannot be read"):
            images.read(0, 23)


def test_wrong_sources(pixels, tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.ones(4))
    write_images(tmp_path / "images", pixels[:2])
    (tmp_path / "notes").mkdir()
    for name in ("a.txt", "b"):
        (tmp_path / "notes" / name).write_text("a")
    for name, options, message in [
        ("absent", {}, "absent: no such file or folder, but must .* or be the id of a Hub dataset"),
        ("notes", {}, "notes holds .txt, files without ending, but must hold images"),
        ("other.npz", {}, 'other.npz has no array "images" or "arr_0": it holds "mu"'),
        ("other.npz", {"resolution": 8}, "resolution is 8, but .*other.npz is a set of .npz images, which has no"),
        ("images", {"split": "test"}, "split is test, but .* is a folder of images, which has no such"),
    ]:
        with pytest.raises(DataError, match=message):
            open_images(tmp_path / name, **options)


# ---------------------------------------------------------------------- images of a model

SAMPLER = Sampler(num_inference_steps=2, eta=1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("sampling") / "model"
    make_pipeline().save_pretrained(folder)
    return str(folder)


def make_images(model, sampler, num_images, class_counts=None, **options):
    """Images that a model generates under a sampler."""
    options |= {"model": model, "num_images": num_images, "output_dir": "-"}
    return GeneratedImages(ModelOptions(**dataclasses.asdict(sampler), **options), "cpu", class_counts=class_counts)


def test_by_number_and_seed_alone(model):
    images = make_images(model, SAMPLER, 12, seed=30)
    assert len(images) == 12
    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "eta": 1.0, "guidance_scale": 1.0, "output_type": "np"}
    for start, stop in ((0, 12), (4, 9), (11, 12)):
        pixels, labels = images.read(start, stop)
        assert labels.tolist() == [number % 3 for number in range(start, stop)]
        by_hand = pipeline(labels, generator=seeded(*range(30 + start, 30 + stop)), **options).images
        np.testing.assert_array_equal(pixels.permute(0, 2, 3, 1).numpy(), (by_hand * 255).round().astype(np.uint8))
    whole, _ = images.read(0, 12)
    # image 5 under seed 30 has the noise of image 2 under seed 33, and 5 and 2 are of one class
    shifted, _ = make_images(model, SAMPLER, 12, seed=33).read(0, 3)
    assert (whole[3:6].int() - shifted.int()).abs().max() <= 1
    assert not torch.equal(whole[3], whole[6])
    # given classes come around
    for asked, labels in ((["crane", "null", "0"], [2, -1, 0, 2, -1, 0, 2]), (["null"], [-1, -1])):
        images = make_images(model, Sampler(num_inference_steps=1), len(labels), class_labels=asked)
        assert images.read(0, len(labels)).labels.tolist() == labels


def test_frequencies_are_those_of_the_dataset(model, prepared):
    counts = np.array([50, 0, 150])

    def generated(count, seed=8):
        options = {"class_labels": ["frequencies"], "class_counts": counts, "seed": seed}
        return make_images(model, SAMPLER, count, **options)

    labels = np.array(generated(4000)._labels)
    # four standard deviations of a binomial distribution
    assert abs((labels == 0).sum() - 1000) < 4 * np.sqrt(4000 * 0.25 * 0.75)
    assert not (labels == 1).any()
    # image i has its class whatever is generated with it
    assert generated(10).read(3, 5).labels.tolist() == labels[3:5].tolist()
    assert generated(4000, seed=9)._labels != labels.tolist()
    assert generated(10).description["class_counts"] == [50, 0, 150]
    assert count_classes(prepared).tolist() == [32, 32, 32]


def test_the_description_is_json_and_names_what_matters(model, tmp_path):
    sampler = Sampler("UniPCMultistep", step_size=500, guidance_scale=2.0)
    description = make_images(model, sampler, 3, seed=4).description
    assert json.loads(json.dumps(description)) == description
    assert (description["scheduler"], description["id2label"]["1"]) == ("UniPCMultistepScheduler", "goldfish")
    assert (description["step_size"], description["timesteps"]) == (500, [500, 0])
    # the same weights elsewhere have the same digest, and others have another
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "same")
    with torch.no_grad():
        pipeline.unet.head.conv.bias[0] += 1e-6
    pipeline.save_pretrained(tmp_path / "other")
    same, other = (make_images(str(tmp_path / name), SAMPLER, 1).description for name in ("same", "other"))
    assert same["weights_sha256"] == description["weights_sha256"] != other["weights_sha256"]


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (SAMPLER, {"class_labels": ["tabbi"]}, "did you mean 'tabby'"),
        (SAMPLER, {"class_labels": ["frequencies"], "class_counts": np.ones(5)}, "train_data_dir has 5 classes, but"),
        (Sampler("LCM"), {}, "LCMScheduler cannot generate with this network"),
    ],
)
def test_what_does_not_fit_the_model(model, sampler, options, message):
    with pytest.raises(ValueError, match=message):
        make_images(model, sampler, 2, **options)


def test_a_model_without_classes(tmp_path):
    make_pipeline(num_class_embeds=None, layer_types=("resnet",)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="class_labels is 1, but the model has no classes"):
        make_images(str(tmp_path), SAMPLER, 2, class_labels=["1"])
