"""The settings of a sampling run, and what the pipeline is called with."""

import pytest
import torch

from imagenet64_diffusion.pipelines.generation import sample_images
from imagenet64_diffusion.pipelines.generation_options import Sampler
from imagenet64_diffusion.tests.components import make_pipeline, seeded


def test_what_the_pipeline_is_called_with():
    pipeline = make_pipeline()
    defaults = {"guidance_scale": 1.0, "guidance_interval": [0.0, 1.0], "eta": 0.0, "clip_sample": None}
    defaults |= {"guidance_sigma_interval": None, "classifier_scale": 0.0}
    assert Sampler().arguments(pipeline) == {"num_inference_steps": 100, **defaults}
    values = {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.8), "eta": 0.5, "clip_sample": True}
    by_sampler = sample_images(pipeline, Sampler(step_size=400, **values), [0, None], 3, output_type="pt")
    options = {"generator": seeded(3, 4), "output_type": "pt", "timesteps": [800, 400, 0]}
    assert torch.equal(by_sampler, pipeline([0, None], **options, **values).images)
    own = pipeline.scheduler
    Sampler().prepare(pipeline)
    assert pipeline.scheduler is own
    Sampler(scheduler="UniPCMultistep").prepare(pipeline)
    assert type(pipeline.scheduler).__name__ == "UniPCMultistepScheduler"
    Sampler(scheduler_options=["solver_order=3", "solver_type=bh1"]).prepare(pipeline)
    assert type(pipeline.scheduler).__name__ == "UniPCMultistepScheduler"
    assert (pipeline.scheduler.config.solver_order, pipeline.scheduler.config.solver_type) == (3, "bh1")
    misspelt = ("solver_ordr=3", "no option 'solver_ordr'; perhaps solver_order")
    for option, message in (misspelt, ("x", "NAME=VALUE"), ("solver_order=[", "NAME=VALUE")):
        with pytest.raises(ValueError, match=message):
            Sampler(scheduler_options=[option]).prepare(pipeline)


@pytest.mark.parametrize(
    ("values", "title"),
    [
        ({"scheduler": "DDIMScheduler", "num_inference_steps": 50, "guidance_scale": 2}, "DDIM, 50 steps, guidance 2"),
        ({"step_size": 10, "eta": 1.0}, "own scheduler, step size 10, eta 1"),
        (
            {"guidance_scale": 1.5, "guidance_interval": [0.25, 1.0], "clip_sample": True},
            "own scheduler, 100 steps, guidance 1.5 in [0.25, 1], clipped",
        ),
        ({"guidance_interval": (0.25, 1.0), "clip_sample": False}, "own scheduler, 100 steps, not clipped"),
        (
            {"guidance_scale": 2, "guidance_sigma_interval": [0.2, 3], "scheduler_options": ["S_churn=40"]},
            "own scheduler, 100 steps, S_churn=40, guidance 2 for sigma in (0.2, 3]",
        ),
        ({"classifier_scale": 1.5}, "own scheduler, 100 steps, classifier 1.5"),
    ],
)
def test_titles(values, title):
    assert Sampler(**values).title() == title


def test_noise_levels_that_are_no_interval():
    for value in ([0.5], [2.0, 1.0]):
        with pytest.raises(ValueError, match=r"^guidance_sigma_interval is .*two noise levels, 0 <= low <= high"):
            Sampler(guidance_sigma_interval=value)
