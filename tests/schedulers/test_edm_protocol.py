"""What a diffusers scheduler with EDM's noise levels promises, run over ours and over the stock ones.

As in test_scheduler_protocol.py the stock schedulers are the reference of the tests themselves.
"""

import json
import math
from typing import ClassVar

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler, HeunDiscreteScheduler

from imagenet64_diffusion import EDMHeunScheduler


SHAPE = (3, 2, 8, 8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class EDMProtocol:
    scheduler_class: type
    # Options of the class, and arguments of a step, that make a run sample noise
    options: ClassVar[dict] = {}
    step_options: ClassVar[dict] = {}

    def make(self, steps=10, **options):
        scheduler = self.scheduler_class(**{**self.options, **options})
        scheduler.set_timesteps(steps)
        return scheduler

    def run(self, scheduler, generator=None, sample=None, timesteps=None):
        if sample is None:
            sample = torch.randn(SHAPE, generator=seeded(1)) * scheduler.init_noise_sigma
        for t in scheduler.timesteps if timesteps is None else timesteps:
            output = torch.sin(scheduler.scale_model_input(sample, t) + t)
            sample = scheduler.step(output, t, sample, generator=generator, **self.step_options).prev_sample
        return sample

    def test_has_what_pipelines_read(self):
        scheduler = self.scheduler_class()
        assert len(scheduler) == 1000
        # stock adds the variance of the images
        assert abs(scheduler.init_noise_sigma - 80) < 0.01
        assert (scheduler.step_index, scheduler.begin_index) == (None, None)

    @pytest.mark.parametrize("steps", [2, 18])
    @pytest.mark.parametrize("sigma_schedule", ["karras", "exponential"])
    def test_timesteps(self, steps, sigma_schedule):
        options = {"sigma_min": 0.01, "sigma_max": 50.0, "rho": 5.0, "sigma_schedule": sigma_schedule}
        scheduler = self.scheduler_class(**options)
        scheduler.set_timesteps(steps)
        assert scheduler.num_inference_steps == steps
        assert scheduler.timesteps.dtype == torch.float32
        assert len(scheduler.timesteps) == scheduler.order * (steps - 1) + 1
        assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1
        assert scheduler.sigmas[-1] == 0
        torch.testing.assert_close(scheduler.timesteps, scheduler.sigmas[:-1].log().float() / 4)
        # Karras et al. 2022, eq. 5, or even steps of the logarithm
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        levels = {
            "karras": (50**0.2 + ramp * (0.01**0.2 - 50**0.2)) ** 5,
            "exponential": 50 * (0.01 / 50) ** ramp,
        }[sigma_schedule]
        found = scheduler.sigmas[: -1 : scheduler.order].double()
        torch.testing.assert_close(found, levels, rtol=1e-5, atol=0)

    def test_one_seed_one_result(self):
        first, second, other = (self.run(self.make(), seeded(seed)) for seed in (0, 0, 1))
        assert torch.equal(first, second)
        assert not torch.allclose(first, other)

    def test_one_generator_an_image(self):
        scheduler = self.make()
        latents = torch.randn(SHAPE) * scheduler.init_noise_sigma
        together = self.run(scheduler, [seeded(i) for i in range(3)], latents)
        for i in range(3):
            alone = self.run(self.make(), seeded(i), latents[i : i + 1])
            torch.testing.assert_close(alone, together[i : i + 1])

    @pytest.mark.parametrize("by_index", [True, False])
    def test_a_run_may_begin_later(self, by_index):
        """As image-to-image does; a copy of a timestep is found too."""
        scheduler, sample = self.make(), torch.randn(SHAPE)
        begin = 3 * scheduler.order
        left = scheduler.timesteps[begin:]
        if by_index:
            scheduler.set_begin_index(begin)
        found = self.run(scheduler, seeded(), sample, left if by_index else left.clone())
        assert scheduler.step_index == len(scheduler.timesteps)
        other = self.make()
        expected = self.run(other, seeded(), sample, other.timesteps[begin:])
        assert torch.equal(found, expected)

    def test_noise_of_a_batch(self):
        scheduler, clean, noise = self.make(), torch.randn(SHAPE), torch.randn(SHAPE)
        chosen = [0, 2, len(scheduler.timesteps) - 1]
        noisy = scheduler.add_noise(clean, noise, scheduler.timesteps[chosen])
        expected = clean + scheduler.sigmas[chosen].float().reshape(3, 1, 1, 1) * noise
        torch.testing.assert_close(noisy, expected, rtol=1e-5, atol=1e-5)


class TestStockEuler(EDMProtocol):
    scheduler_class = EDMEulerScheduler
    step_options: ClassVar[dict] = {"s_churn": 4.0}


class TestStockDPMSolver(EDMProtocol):
    scheduler_class = EDMDPMSolverMultistepScheduler
    options: ClassVar[dict] = {"algorithm_type": "sde-dpmsolver++"}


class TestHeun(EDMProtocol):
    scheduler_class = EDMHeunScheduler
    options: ClassVar[dict] = {"S_churn": 4.0}

    def test_config_round_trip(self, tmp_path):
        first = self.make(sigma_min=0.01, rho=5.0, S_noise=1.003)
        first.save_pretrained(tmp_path)
        second = self.scheduler_class.from_pretrained(tmp_path)
        assert json.loads(first.to_json_string()) == json.loads(second.to_json_string())
        config = second.config
        assert (config.sigma_min, config.rho, config.S_churn, config.S_noise) == (0.01, 5.0, 4.0, 1.003)
        # JSON has no infinity
        assert config.S_max == math.inf
        assert "Infinity" not in first.to_json_string()
        second.set_timesteps(10)
        assert torch.equal(self.run(first, seeded()), self.run(second, seeded()))
        assert self.scheduler_class.from_config(config, S_churn=0.0).config.S_churn == 0

    def test_given_noise_levels(self):
        scheduler = self.make()
        for levels in ([50.0, 3.0, 0.1], (50.0, 3.0, 0.1), torch.tensor([50.0, 3.0, 0.1], dtype=torch.float64)):
            scheduler.set_timesteps(sigmas=levels)
            assert scheduler.num_inference_steps == 3
            assert scheduler.sigmas[1::2].tolist() == [3.0, 0.1, 0.0]
            raised = torch.tensor([50.0, 3.0, 0.1], dtype=torch.float64) * 2**0.5
            torch.testing.assert_close(scheduler.sigmas[::2], raised)

    def test_preconditioning_is_stock(self):
        """Karras et al. 2022, table 1."""
        for options in ({}, {"sigma_data": 0.7, "prediction_type": "v_prediction"}):
            ours, stock = EDMHeunScheduler(**options), EDMEulerScheduler(**options)
            sample, output, sigma = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0.01, 1.0, 70.0])
            sigma = sigma.reshape(3, 1, 1, 1)
            assert torch.equal(ours.precondition_inputs(sample, sigma), stock.precondition_inputs(sample, sigma))
            assert torch.equal(ours.precondition_noise(sigma), stock.precondition_noise(sigma))
            denoised = (each.precondition_outputs(sample, output, sigma) for each in (ours, stock))
            assert torch.equal(*denoised)

    def test_interleaves_as_the_stock_heun_scheduler(self):
        options = {"use_karras_sigmas": True, "num_train_timesteps": 1000}
        ours, stock = self.scheduler_class(), HeunDiscreteScheduler(**options)
        for steps in (2, 7):
            ours.set_timesteps(steps)
            stock.set_timesteps(steps)
            assert (ours.order, ours.timesteps.shape) == (stock.order, stock.timesteps.shape)
            equal = (each.timesteps[1:] == each.timesteps[:-1] for each in (ours, stock))
            assert torch.equal(*equal)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_shape_and_dtype_stay(self, dtype):
        """Between the halves of a step nothing is rounded but the sample that the network sees."""
        scheduler, sample = self.make(4, sigma_max=4.0), torch.randn(SHAPE).to(dtype)
        other = self.make(4, sigma_max=4.0)
        for t in scheduler.timesteps:
            output = torch.sin(scheduler.scale_model_input(sample, t))
            assert output.dtype == dtype
            out = scheduler.step(output, t, sample, return_dict=False, generator=seeded())
            # the noise that a generator has for float32
            noise = torch.randn(SHAPE, generator=seeded())
            exact = other.step(output.double(), t, sample.double(), churn_noise=noise.double())
            for found, expected in zip(out, (exact.prev_sample, exact.pred_original_sample), strict=True):
                assert (found.shape, found.dtype) == (SHAPE, dtype)
                assert torch.equal(found, expected.to(dtype))
            sample = out[0]
