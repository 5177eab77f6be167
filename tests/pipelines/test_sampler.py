"""The settings of a sampling run, and what the pipeline is called with."""

import re
from types import SimpleNamespace

import pytest
import torch

from imagenet64_diffusion.pipelines.sampler import Sampler
from imagenet64_diffusion.tests.components import make_pipeline, seeded


def test_arguments_are_those_of_the_pipeline():
    pipeline = make_pipeline()
    arguments = Sampler().arguments(pipeline)
    assert arguments == {
        "num_inference_steps": 100,
        "guidance_scale": 1.0,
        "guidance_interval": (0.0, 1.0),
        "eta": 0.0,
        "clip_sample": None,
    }
    sampler = Sampler(step_size=400, guidance_scale=2.0, guidance_interval=(0.2, 0.8), eta=0.5, clip_sample=True)
    arguments = sampler.arguments(pipeline)
    assert "num_inference_steps" not in arguments
    by_sampler = pipeline([0, 1], generator=seeded(3, 4), output_type="pt", **arguments).images
    by_hand = pipeline(
        [0, 1],
        generator=seeded(3, 4),
        output_type="pt",
        timesteps=[800, 400, 0],
        guidance_scale=2.0,
        guidance_interval=(0.2, 0.8),
        eta=0.5,
        clip_sample=True,
    ).images
    assert torch.equal(by_sampler, by_hand)


def test_another_scheduler():
    pipeline = make_pipeline()
    own = pipeline.scheduler
    Sampler().prepare(pipeline)
    assert pipeline.scheduler is own
    Sampler(scheduler="UniPCMultistep").prepare(pipeline)
    assert type(pipeline.scheduler).__name__ == "UniPCMultistepScheduler"


def test_from_the_options_of_a_command():
    options = SimpleNamespace(
        scheduler="DDIM",
        num_inference_steps=7,
        step_size=None,
        guidance_scale=3.0,
        guidance_interval=[0.1, 0.9],
        eta=0.0,
        clip_sample=False,
        another="thing",
    )
    assert Sampler.from_options(options) == Sampler("DDIM", 7, None, 3.0, (0.1, 0.9), 0.0, False)


@pytest.mark.parametrize(
    ("values", "title"),
    [
        ({}, "own scheduler, 100 steps"),
        ({"scheduler": "DDIMScheduler", "num_inference_steps": 50, "guidance_scale": 2}, "DDIM, 50 steps, guidance 2"),
        ({"step_size": 10, "eta": 1.0}, "own scheduler, step size 10, eta 1"),
        (
            {"guidance_scale": 1.5, "guidance_interval": (0.25, 1.0), "clip_sample": True},
            "own scheduler, 100 steps, guidance 1.5 in [0.25, 1], clipped",
        ),
        ({"guidance_interval": (0.25, 1.0), "clip_sample": False}, "own scheduler, 100 steps, not clipped"),
    ],
)
def test_titles(values, title):
    assert Sampler(**values).title() == title


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0, but must be at least 1"),
        ({"num_inference_steps": "ten"}, "num_inference_steps is 'ten', but must be a whole number"),
        ({"num_inference_steps": True}, "num_inference_steps is True, but must be a whole number"),
        ({"step_size": 1.5}, "step_size is 1.5, but must be a whole number"),
        ({"num_inference_steps": 5, "step_size": 5}, "both say the number of steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan, but must be a number that is at least 0"),
        ({"guidance_scale": "2"}, "guidance_scale is '2', but must be a number"),
        ({"eta": -0.5}, "eta is -0.5, but must be a number that is at least 0"),
        ({"eta": float("inf")}, "eta is inf, but must be a number"),
        ({"guidance_interval": (0.5,)}, "guidance_interval is (0.5,), but must be two fractions"),
        ({"guidance_interval": (0.5, 0.4)}, "0 <= begin <= end <= 1"),
        ({"guidance_interval": (0.5, 1.1)}, "0 <= begin <= end <= 1"),
        ({"guidance_interval": ("a", "b")}, "0 <= begin <= end <= 1"),
        ({"guidance_interval": 0.5}, "0 <= begin <= end <= 1"),
        ({"clip_sample": "yes"}, "clip_sample is 'yes', but must be true, false, or nothing at all"),
        ({"scheduler": 3}, "scheduler is 3, but must be a name"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampler(**values)
