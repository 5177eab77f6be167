"""Ours is the plain composition of its layers, written a second time: same outputs, gradients, images."""

import pytest
import torch
from networks import make_scheduler, make_unet, recipe_config
from plain_unet import PLAIN_LAYERS, PlainUNet, guided_prediction

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.models.unet_class_conditional import LAYER_TYPES, TIME_EMBEDDING_TYPES
from imagenet64_diffusion.tests.components import RECIPES


def make_both(recipe: str, with_classes: bool = True, **options):
    """A small version of a recipe, ours and plain, with random weights where they begin at 0 or 1, too."""
    config = {**recipe_config(recipe, small=True), **options}
    if not with_classes:
        config["num_class_embeds"] = None
        config["layer_types"] = [name for name in config["layer_types"] if not LAYER_TYPES[name].needs_classes]
    unet = make_unet(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        if not name.startswith("class_embedding"):  # whose null row is zero
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return unet, PlainUNet(unet), config


def inputs(config, batch=3):
    generator = torch.Generator().manual_seed(0)
    size, num_classes = config["sample_size"], config["num_class_embeds"]
    sample = torch.randn(batch, config["in_channels"], size, size, generator=generator)
    labels = None if num_classes is None else torch.tensor([2, num_classes, 7])
    return sample, torch.tensor([3, 500, 999]), labels


def assert_close(actual, expected, what=None, relative=1e-4):
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert difference < relative, (what, difference)


@pytest.fixture(params=[f"{folder}{recipe}" for folder in ("", "original/") for recipe in RECIPES])
def recipe(request) -> str:
    return request.param


@pytest.mark.parametrize("with_classes", [True, False])
def test_outputs(recipe, with_classes):
    unet, plain, config = make_both(recipe, with_classes)
    with torch.no_grad():
        assert_close(unet(*inputs(config)).sample, plain(*inputs(config)))


def test_gradients(recipe):
    unet, plain, config = make_both(recipe)
    target = torch.randn(3, 2 * config["in_channels"], config["sample_size"], config["sample_size"])
    (unet(*inputs(config)).sample * target).mean().backward()
    (plain(*inputs(config)) * target).mean().backward()
    others = dict(plain.unet.named_parameters())
    for name, parameter in unet.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        assert others[name].grad is not None, name
    # all at once: biases before a GroupNorm have next to none, and float32 leaves little of it right
    ours = torch.cat([parameter.grad.flatten() for parameter in unet.parameters()])
    assert_close(ours, torch.cat([others[name].grad.flatten() for name, _ in unet.named_parameters()]), relative=1e-3)


@pytest.mark.parametrize("kind", TIME_EMBEDDING_TYPES)
def test_time_embeddings(kind):
    unet, plain, config = make_both("res", time_embedding_type=kind)
    with torch.no_grad():
        assert_close(unet(*inputs(config)).sample, plain(*inputs(config)))


@pytest.mark.parametrize("with_classes", [True, False])
def test_the_pipeline_guides_as_two_plain_branches_do(recipe, with_classes):
    """Every step of a pipeline, beginning each time at the sample that the pipeline had."""
    unet, plain, config = make_both(recipe, with_classes)
    scheduler = make_scheduler(config)
    pipeline = ClassConditionalPipeline(unet, scheduler, guide_variance=recipe.startswith("original"))
    pipeline.set_progress_bar_config(disable=True)
    sample, _, labels = inputs(config)
    sample, labels = sample[::2], None if labels is None else labels[::2]
    before = [sample]

    def compare(_, step, timestep, tensors):
        expected = guided_prediction(plain, before[-1], timestep, labels, 3.0, pipeline.config.guide_variance)
        assert_close(tensors["model_output"], expected, step)
        before.append(tensors["latents"])

    pipeline(
        [None, None] if labels is None else labels,
        guidance_scale=3.0,
        num_inference_steps=3,
        latents=sample,
        output_type="latent",
        callback_on_step_end=compare,
        callback_on_step_end_tensor_inputs=["latents", "model_output"],
    )
    assert len(before) == 4


def test_classes_and_timesteps_matter(recipe):
    """What is compared above is not all the same."""
    unet, plain, config = make_both(recipe)
    sample, timesteps, labels = inputs(config)
    with torch.no_grad():
        for network in (lambda *arguments: unet(*arguments).sample, plain):
            output = network(sample, timesteps, labels)
            for other in (network(sample, timesteps - 2, labels), network(sample, timesteps, (labels + 1) % 10)):
                assert (other - output).abs().max() > 1e-3 * output.abs().max()


def test_every_layer_type_has_a_plain_one():
    assert set(PLAIN_LAYERS) == set(LAYER_TYPES.values())
