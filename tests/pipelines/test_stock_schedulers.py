"""Every scheduler of diffusers: those that work generate what they must, the others are refused with a reason.

On Gaussian images (`gaussian_toy`) the right answer is known. The table of docs/schedulers.md is printed by

    python -m imagenet64_diffusion.tests.pipelines.test_stock_schedulers
"""

import functools
from typing import NamedTuple

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.import_utils import DummyObject

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.pipelines.loading import (
    OUR_SCHEDULERS,
    scheduler_class,
    scheduler_names,
    swap_scheduler,
)
from imagenet64_diffusion.tests.components import make_pipeline, seeded
from imagenet64_diffusion.tests.pipelines.gaussian_toy import (
    SCHEDULES,
    make_gaussian_pipeline,
    sample_gaussian,
)


# What docs/schedulers.md shows of solvers and samplers; the tests take the first two, and the first, of these.
STEPS = (20, 50, 100)
SAMPLER_STEPS = (20, 100)


class Solver(NamedTuple):
    """A deterministic scheduler and its root mean square errors, in thousandths of the standard deviation.

    On the original's schedule and on that of new models, after `swap_scheduler`, with 20 and 50 steps; with 20 after
    from_config, on either. ``end`` is where the solution ends on the original's, whose last level is not clean
    (`GaussianSamples`); on the other the places are too close to tell.
    """

    original: tuple[float, float]
    cosine: tuple[float, float]
    plain: tuple[float, float]
    end: str = "denoised"


SOLVERS = {
    "DDIMScheduler": Solver((90.1, 38.1), (112.8, 46.9), (90.1, 112.8), "last_level"),
    "DDIMParallelScheduler": Solver((90.1, 38.1), (112.8, 46.9), (90.1, 112.8), "last_level"),
    "PNDMScheduler": Solver((7.7, 1.5), (73.1, 30.2), (7.7, 73.1), "last_level"),
    "TCDScheduler": Solver((95.7, 40.7), (106.7, 44.0), (93.9, 114.9), "last_level"),
    "LMSDiscreteScheduler": Solver((1.4, 0.1), (2.6, 2.6), (1.4, 0.1), "clean"),
    "EulerDiscreteScheduler": Solver((89.2, 37.7), (112.5, 46.9), (89.2, 112.9)),
    "HeunDiscreteScheduler": Solver((10.3, 1.8), (32.8, 8.6), (10.3, 436.5)),
    "KDPM2DiscreteScheduler": Solver((13.5, 2.0), (35.8, 8.1), (13.5, 37.1)),
    "DPMSolverMultistepScheduler": Solver((26.6, 5.1), (21.1, 4.4), (20.5, 29.1)),
    "DPMSolverSinglestepScheduler": Solver((72.7, 14.7), (77.9, 19.9), (72.4, 78.1)),
    "DEISMultistepScheduler": Solver((30.8, 11.5), (32.1, 9.8), (6.0, 30.6), "last_level"),
    "UniPCMultistepScheduler": Solver((30.4, 7.8), (28.3, 4.2), (20.5, 28.3)),
}
# Stochastic schedulers and the standard deviation of their pixels, as a percentage of the right one: with 20 steps,
# after swap_scheduler on either schedule, and after from_config.
SAMPLERS = {
    "DDPMScheduler": ((82.0, 81.6), (82.0, 81.6)),
    "DDPMParallelScheduler": ((82.0, 81.6), (82.0, 81.6)),
    "EulerAncestralDiscreteScheduler": ((82.0, 81.6), (82.0, 81.6)),
    "KDPM2AncestralDiscreteScheduler": ((104.7, 99.5), (104.7, 99.5)),
    "DPMSolverSDEScheduler": ((97.6, 94.1), (97.6, 94.0)),
    "SASolverScheduler": ((101.3, 100.6), (101.4, 99.6)),
}
WORKING = {**SOLVERS, **SAMPLERS}
EXPORTED = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
# what else they need
LIBRARIES = {"DPMSolverSDEScheduler": "torchsde", "LMSDiscreteScheduler": "scipy"}

# A tolerance in thousandths below which convergence ends: float32, and the cut of the highest noise levels.
FLOOR = 5.0
# How far errors may be exceeded, on other machines and with other versions.
MARGIN = 1.7
# How far from the table a standard deviation may lie: that of three images of 64 x 64 pixels is known to 0.6 %.
DEVIATION_TOLERANCE = 3.0


def give_scheduler(pipeline: ClassConditionalPipeline, name: str, route: str) -> None:
    """By `swap_scheduler`, or plainly by from_config from a config as it is loaded from a file."""
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name], reason=f"{name} needs {LIBRARIES[name]}")
    if route == "swap":
        swap_scheduler(pipeline, name)
    else:
        stored = {key: value for key, value in pipeline.scheduler.config.items() if key != "_use_default_values"}
        pipeline.scheduler = getattr(diffusers, name).from_config(stored)


@functools.cache
def gaussian_pipeline(schedule: str, name: str, route: str = "swap") -> ClassConditionalPipeline:
    # kept, because some schedulers take a second to be made, and because every call must begin afresh anyhow
    pipeline = make_gaussian_pipeline(schedule)
    give_scheduler(pipeline, name, route)
    return pipeline


def solver_error(schedule: str, name: str, steps: int, route: str = "swap") -> float:
    end = SOLVERS[name].end if schedule == "original" else "clean"
    return 1000 * sample_gaussian(gaussian_pipeline(schedule, name, route), steps).error(end)


def sampler_deviation(schedule: str, name: str, steps: int, route: str = "swap") -> tuple[float, float]:
    samples = sample_gaussian(gaussian_pipeline(schedule, name, route), steps)
    return 100 * samples.relative_deviation, 100 * samples.mean_error


def test_every_scheduler_is_known():
    """A scheduler that a later version of diffusers brings must be classified here or refused by the pipeline."""
    installed = {name for name in WORKING if not isinstance(getattr(diffusers, name), DummyObject)}
    assert set(scheduler_names()) == installed | {"EtaDDIMScheduler", "LearnedVarianceDDPMScheduler"}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_lands_where_the_equation_leads(name, schedule):
    """And the nearer, the more steps it takes; with from_config too."""
    table = SOLVERS[name]
    errors = [solver_error(schedule, name, steps) for steps in STEPS[:2]]
    for error, expected in zip(errors, getattr(table, schedule), strict=True):
        assert error < max(MARGIN * expected, FLOOR), errors
    assert errors[1] < max(errors[0], FLOOR)
    assert solver_error(schedule, name, 20, "plain") < max(MARGIN * table.plain[SCHEDULES.index(schedule)], FLOOR)
    if schedule == "original":
        # a network that is not perfect: the highest noise levels there would multiply an error of 0.003 to 6
        pipeline = gaussian_pipeline(schedule, name)
        right = sample_gaussian(pipeline, 20).images
        pipeline.unet.prediction_error = 0.003
        assert (sample_gaussian(pipeline, 20).images - right).abs().max() < 0.03
        pipeline.unet.prediction_error = 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_stochastic_sampler_samples_the_distribution(name, schedule):
    for route, expected in zip(("swap", "plain"), SAMPLERS[name], strict=True):
        deviation, mean_error = sampler_deviation(schedule, name, 20, route)
        assert abs(deviation - expected[SCHEDULES.index(schedule)]) < DEVIATION_TOLERANCE, route
        assert mean_error < 6, route
    # 100 steps suffice for this, and fewer where each is two
    steps = 100 if gaussian_pipeline(schedule, name).scheduler.order == 1 else 30
    deviation, mean_error = sampler_deviation(schedule, name, steps)
    assert 94 < deviation < 104
    assert mean_error < 6


@pytest.mark.parametrize("name", WORKING)
def test_one_seed_one_image(name):
    pipeline = gaussian_pipeline("cosine", name)

    def images(labels, seeds):
        return pipeline(labels, generator=seeded(*seeds), num_inference_steps=6, output_type="latent").images

    together = images([0, 1, 2], [0, 1, 2])
    torch.testing.assert_close(images([2, 0], [2, 0]), together[[2, 0]], atol=1e-5, rtol=1e-5)
    assert (images([0, 1, 2], [3, 4, 5]) - together).abs().mean() > 0.1


@pytest.mark.parametrize("name", WORKING)
def test_with_the_network(name):
    """Whatever the network's weights are, the images are numbers."""
    pipeline = make_pipeline(layer_types=("resnet", "class_attention"))
    for route in ("swap", "plain"):
        pipeline.scheduler = gaussian_pipeline("cosine", name, route).scheduler
        options = {"guidance_scale": 2.0, "num_inference_steps": 8, "output_type": "latent"}
        images = pipeline(0, generator=seeded(0), **options).images
        assert images.shape == (1, 1, 16, 16)
        assert images.isfinite().all()
        assert images.std() > 0.01


# the arguments of those that have no default for all
ARGUMENTS = {
    "AmusedScheduler": {"mask_token_id": 8},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
}


class TestRefusals:
    @pytest.mark.parametrize("name", sorted(EXPORTED - WORKING.keys()))
    def test_the_pipeline_refuses(self, name):
        found = getattr(diffusers.schedulers, name)
        if isinstance(found, DummyObject):
            pytest.skip(f"needs {found._backends}")
        pipeline = make_gaussian_pipeline("cosine")
        pipeline.scheduler = found(**ARGUMENTS.get(name, {}))
        with pytest.raises(ValueError, match=rf"^{name} cannot generate with this network: .*; take \w+Scheduler$"):
            pipeline(0, num_inference_steps=2)

    def test_swapping_refuses(self):
        pipeline = make_gaussian_pipeline("cosine")
        before = pipeline.scheduler
        with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler cannot generate.*flow matching"):
            swap_scheduler(pipeline, "FlowMatchEulerDiscrete")
        assert pipeline.scheduler is before

    def test_those_that_are_not_listed(self):
        class MyLCMScheduler(diffusers.LCMScheduler):
            pass

        class NextYearsScheduler(SchedulerMixin, ConfigMixin):
            @register_to_config
            def __init__(self, shift: float = 1.0):
                self.init_noise_sigma = 1.0

        pipeline = make_gaussian_pipeline("cosine")
        for scheduler, message in (
            (MyLCMScheduler(), "only a network dist"),
            (NextYearsScheduler(), "neither alphas_cumprod nor"),
        ):
            pipeline.scheduler = scheduler
            with pytest.raises(ValueError, match=f"{type(scheduler).__name__} cannot generate.*{message}"):
                pipeline(0, num_inference_steps=2)

    def test_lms_keeps_equal_noise_levels(self):
        with pytest.raises(ValueError, match="LMSDiscreteScheduler needs a different noise level at every step"):
            sample_gaussian(gaussian_pipeline("original", "LMSDiscreteScheduler"), 100)

    @pytest.mark.parametrize(
        ("schedule", "name", "steps", "message"),
        [
            ("cosine", "KDPM2AncestralDiscrete", 5, "finds no 5 timesteps on this noise schedule"),
            *(
                ("original", name, 250, "Scheduler needs a different noise level.*take fewer than 250 steps")
                for name in ("UniPCMultistep", "DPMSolverMultistep", "DEISMultistep", "SASolver", "DDPM")
            ),
        ],
    )
    def test_noise_levels_that_cannot_be_stepped_over(self, schedule, name, steps, message):
        """NaN otherwise. After a swap all is well."""
        with pytest.raises(ValueError, match=message):
            gaussian_pipeline(schedule, f"{name}Scheduler", "plain")(0, num_inference_steps=steps)
        pipeline = gaussian_pipeline(schedule, f"{name}Scheduler")
        assert pipeline(0, num_inference_steps=steps, output_type="latent").images.isfinite().all()

    def test_a_first_step_that_multiplies_errors(self, caplog):
        pipeline = make_gaussian_pipeline("original")
        diffusers.utils.logging.enable_propagation()
        pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="linspace"
        )
        pipeline(0, num_inference_steps=20)
        assert "from timestep 999, multiplies errors of the noise prediction by" in caplog.text
        caplog.clear()
        gaussian_pipeline("original", "EulerDiscreteScheduler")(0, num_inference_steps=20)
        diffusers.utils.logging.disable_propagation()
        assert "multiplies errors" not in caplog.text


class TestSwapping:
    def test_a_second_swap_begins_where_the_first_did(self):
        pipeline = make_gaussian_pipeline("original")
        exact, config = sample_gaussian(pipeline, 10).images, pipeline.scheduler.config
        alphas_cumprod = pipeline.scheduler.alphas_cumprod
        for name in ("UniPCMultistep", "DDPM", "LearnedVarianceDDPM", "EtaDDIM"):
            swap_scheduler(pipeline, name)
            assert torch.equal(pipeline.scheduler.alphas_cumprod.double(), alphas_cumprod) == (
                f"{name}Scheduler" in OUR_SCHEDULERS
            )
        assert torch.equal(sample_gaussian(pipeline, 10).images, exact)
        assert pipeline.scheduler.config.trained_betas == config.trained_betas

    def test_a_library_that_is_not_installed(self, monkeypatch):
        stand_in = DummyObject("DPMSolverSDEScheduler", (), {"_backends": ["torch", "torchsde"]})
        monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", stand_in)
        with pytest.raises(ValueError, match=r"DPMSolverSDEScheduler needs a library.*pip install torchsde"):
            scheduler_class("DPMSolverSDE")


if __name__ == "__main__":
    diffusers.utils.logging.set_verbosity_error()
    for compute, names, all_steps in ((solver_error, SOLVERS, STEPS), (sampler_deviation, SAMPLERS, SAMPLER_STEPS)):
        cells = [(schedule, steps, "swap") for schedule in SCHEDULES for steps in all_steps]
        cells += [(schedule, all_steps[0], "plain") for schedule in SCHEDULES]
        for name in names:
            for schedule, steps, route in cells:
                try:
                    print(name, schedule, steps, route, compute(schedule, name, steps, route), flush=True)
                except ValueError:
                    print(name, schedule, steps, route, "refused")
