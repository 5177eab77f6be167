"""Image i of a model depends on its seed and its number alone."""

import json
import re

import numpy as np
import pytest
import torch

from imagenet64_diffusion.evaluation.generated_images import GeneratedImages, count_classes
from imagenet64_diffusion.pipelines.loading import load_pipeline
from imagenet64_diffusion.pipelines.sampler import Sampler
from imagenet64_diffusion.tests.components import make_pipeline, seeded


SAMPLER = Sampler(num_inference_steps=2, eta=1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("sampling") / "model"
    make_pipeline().save_pretrained(folder)
    return str(folder)


def labels_of(model: str, num_images: int, **options) -> list[int]:
    images = GeneratedImages(model, Sampler(num_inference_steps=1), num_images, **options)
    return images.read(0, num_images)[1].tolist()


def test_by_number_and_seed_alone(model):
    images = GeneratedImages(model, SAMPLER, 12, seed=30)
    assert len(images) == 12
    assert images.image_size == (1, 16, 16)
    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    for start, stop in ((0, 12), (4, 9), (11, 12)):
        pixels, labels = images.read(start, stop)
        assert pixels.dtype == torch.uint8
        assert labels.tolist() == [number % 3 for number in range(start, stop)]
        by_hand = pipeline(
            labels,
            generator=seeded(*range(30 + start, 30 + stop)),
            num_inference_steps=2,
            eta=1.0,
            guidance_scale=1.0,
            output_type="np",
        ).images
        np.testing.assert_array_equal(pixels.permute(0, 2, 3, 1).numpy(), (by_hand * 255).round().astype(np.uint8))
    whole, _ = images.read(0, 12)
    # image 5 under seed 30 has the noise of image 2 under seed 33, and 5 and 2 are of one class
    shifted, _ = GeneratedImages(model, SAMPLER, 12, seed=33).read(0, 3)
    difference = (whole[3:6].int() - shifted.int()).abs()
    assert difference.max() <= 1
    assert not torch.equal(whole[3], whole[6])


def test_given_classes_come_around(model):
    assert labels_of(model, 7, class_labels=["crane", "null", "0"]) == [2, -1, 0, 2, -1, 0, 2]
    assert labels_of(model, 2, class_labels=["null"]) == [-1, -1]


def test_frequencies_are_those_of_the_dataset(model):
    counts = np.array([50, 0, 150])
    images = GeneratedImages(model, SAMPLER, 4000, class_labels=["frequencies"], class_counts=counts, seed=8)
    labels = np.array(images._labels)
    generated = np.bincount(labels, minlength=3)
    # four standard deviations of a binomial distribution
    assert abs(generated[0] - 1000) < 4 * np.sqrt(4000 * 0.25 * 0.75)
    assert generated[1] == 0
    # image i has its class whatever is generated with it
    fewer = GeneratedImages(model, SAMPLER, 10, class_labels=["frequencies"], class_counts=counts, seed=8)
    np.testing.assert_array_equal(fewer._labels, labels[:10])
    assert fewer.read(3, 5)[1].tolist() == labels[3:5].tolist()
    other = GeneratedImages(model, SAMPLER, 4000, class_labels=["frequencies"], class_counts=counts, seed=9)
    assert other._labels != labels.tolist()
    assert fewer.description["class_counts"] == [50, 0, 150]


def test_counts_of_a_prepared_folder(prepared):
    assert count_classes(prepared).tolist() == [32, 32, 32]


def test_the_description_is_json_and_names_what_matters(model, tmp_path):
    sampler = Sampler("UniPCMultistep", step_size=None, num_inference_steps=5, guidance_scale=2.0)
    description = GeneratedImages(model, sampler, 3, seed=4).description
    assert json.loads(json.dumps(description)) == description
    assert description["scheduler"] == "UniPCMultistepScheduler"
    assert description["scheduler_config"]["num_train_timesteps"] == 1000
    assert description["num_inference_steps"] == 5
    assert description["id2label"]["1"] == "goldfish"
    by_size = GeneratedImages(model, Sampler(step_size=500), 3).description
    assert by_size["step_size"] == 500
    assert by_size["timesteps"] == [500, 0]

    # the same weights elsewhere have the same digest, and others have another
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "same")
    with torch.no_grad():
        pipeline.unet.head.conv.bias[0] += 1e-6
    pipeline.save_pretrained(tmp_path / "other")
    digests = [
        GeneratedImages(str(tmp_path / name), SAMPLER, 1).description["weights_sha256"] for name in ("same", "other")
    ]
    assert digests[0] == description["weights_sha256"] != digests[1]


def test_what_does_not_fit(model, tmp_path):
    make_pipeline(num_class_embeds=None, layer_types=("resnet",)).save_pretrained(tmp_path / "model")
    without = str(tmp_path / "model")
    for name, sampler, options, message in (
        (without, SAMPLER, {"class_labels": ["1"]}, "class_labels is 1, but the model has no classes"),
        (model, SAMPLER, {"class_labels": ["3"]}, "class label 3 is out of range"),
        (model, SAMPLER, {"class_labels": ["tabbi"]}, "did you mean 'tabby'"),
        (model, SAMPLER, {"class_labels": ["frequencies"]}, "needs train_data_dir"),
        (
            model,
            SAMPLER,
            {"class_labels": ["frequencies"], "class_counts": np.ones(5, int)},
            "train_data_dir has 5 classes, but the model has 3",
        ),
        (model, Sampler("DPMSolverMultistep", eta=0.5), {}, "eta is 0.5, but DPMSolverMultistepScheduler takes none"),
        (model, Sampler("LCM"), {}, "LCMScheduler cannot generate with this network"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            GeneratedImages(name, sampler, 2, **options)
    pixels, labels = GeneratedImages(without, SAMPLER, 2).read(0, 2)
    assert labels is None
    assert pixels.shape == (2, 1, 16, 16)
