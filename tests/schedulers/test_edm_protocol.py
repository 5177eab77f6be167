"""What a diffusers scheduler with EDM's noise levels promises, and what ours promises besides."""

import json
import math

import pytest
import torch

from imagenet64_diffusion import EDMHeunScheduler
from imagenet64_diffusion.tests.components import seeded_one


SHAPE = (3, 2, 8, 8)


def make(steps=10, **options):
    """It samples noise, unless the options say otherwise."""
    scheduler = EDMHeunScheduler(**{"S_churn": 4.0, **options})
    scheduler.set_timesteps(steps)
    return scheduler


def run(scheduler, generator, sample, timesteps=None):
    for t in scheduler.timesteps if timesteps is None else timesteps:
        output = torch.sin(scheduler.scale_model_input(sample, t) + t)
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
    return sample


def test_has_what_pipelines_read():
    scheduler = EDMHeunScheduler()
    assert (len(scheduler), scheduler.order, scheduler.init_noise_sigma) == (1000, 2, pytest.approx(80))
    assert (scheduler.step_index, scheduler.begin_index) == (None, None)


@pytest.mark.parametrize("steps", [2, 18])
@pytest.mark.parametrize("sigma_schedule", ["karras", "exponential"])
def test_timesteps(steps, sigma_schedule):
    scheduler = EDMHeunScheduler(sigma_min=0.01, sigma_max=50.0, rho=5.0, sigma_schedule=sigma_schedule)
    scheduler.set_timesteps(steps)
    assert scheduler.num_inference_steps == steps
    assert scheduler.timesteps.dtype == torch.float32
    assert len(scheduler.timesteps) == 2 * steps - 1
    assert len(scheduler.sigmas) == 2 * steps
    assert scheduler.sigmas[-1] == 0
    torch.testing.assert_close(scheduler.timesteps, scheduler.sigmas[:-1].log().float() / 4)
    # Karras et al. 2022, eq. 5, or even steps of the logarithm
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = {
        "karras": (50**0.2 + ramp * (0.01**0.2 - 50**0.2)) ** 5,
        "exponential": 50 * (0.01 / 50) ** ramp,
    }[sigma_schedule]
    torch.testing.assert_close(scheduler.sigmas[::2], levels, rtol=1e-5, atol=0)
    torch.testing.assert_close(scheduler.sigmas[1:-1:2], levels[1:], rtol=1e-5, atol=0)


def test_given_noise_levels():
    scheduler = make()
    for levels in ([50.0, 3.0, 0.1], (50.0, 3.0, 0.1), torch.tensor([50.0, 3.0, 0.1], dtype=torch.float64)):
        scheduler.set_timesteps(sigmas=levels)
        assert scheduler.num_inference_steps == 3
        assert scheduler.sigmas[1::2].tolist() == [3.0, 0.1, 0.0]
        raised = torch.tensor([50.0, 3.0, 0.1], dtype=torch.float64) * 2**0.5
        torch.testing.assert_close(scheduler.sigmas[::2], raised)


def test_one_generator_an_image():
    latents = torch.randn(SHAPE) * make().init_noise_sigma
    together = run(make(), [seeded_one(i) for i in range(3)], latents)
    for i in range(3):
        torch.testing.assert_close(run(make(), seeded_one(i), latents[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("by_index", [True, False])
def test_a_run_may_begin_later(by_index):
    """As image-to-image does; a copy of a timestep is found too."""
    scheduler, other, sample = make(), make(), torch.randn(SHAPE)
    left = scheduler.timesteps[6:]
    if by_index:
        scheduler.set_begin_index(6)
    found = run(scheduler, seeded_one(), sample, left if by_index else left.clone())
    assert scheduler.step_index == len(scheduler.timesteps)
    assert torch.equal(found, run(other, seeded_one(), sample, other.timesteps[6:]))


def test_noise_of_a_batch():
    scheduler, clean, noise = make(), torch.randn(SHAPE), torch.randn(SHAPE)
    chosen = [0, 2, len(scheduler.timesteps) - 1]
    noisy = scheduler.add_noise(clean, noise, scheduler.timesteps[chosen])
    expected = clean + scheduler.sigmas[chosen].float().reshape(3, 1, 1, 1) * noise
    torch.testing.assert_close(noisy, expected, rtol=1e-5, atol=1e-5)


def test_config_round_trip(tmp_path):
    first = make(sigma_min=0.01, rho=5.0, S_noise=1.003)
    first.save_pretrained(tmp_path)
    second = EDMHeunScheduler.from_pretrained(tmp_path)
    assert json.loads(first.to_json_string()) == json.loads(second.to_json_string())
    config = second.config
    assert (config.sigma_min, config.rho, config.S_churn, config.S_noise) == (0.01, 5.0, 4.0, 1.003)
    # JSON has no infinity
    assert config.S_max == math.inf
    assert "Infinity" not in first.to_json_string()
    second.set_timesteps(10)
    assert torch.equal(first.sigmas, second.sigmas)
    assert EDMHeunScheduler.from_config(config, S_churn=0.0).config.S_churn == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_shape_and_dtype_stay(dtype):
    """Between the halves of a step nothing is rounded but the sample that the network sees."""
    scheduler, other = make(4, sigma_max=4.0), make(4, sigma_max=4.0)
    sample = torch.randn(SHAPE).to(dtype)
    for t in scheduler.timesteps:
        output = torch.sin(scheduler.scale_model_input(sample, t))
        assert output.dtype == dtype
        out = scheduler.step(output, t, sample, return_dict=False, generator=seeded_one())
        # the noise that a generator has for float32
        noise = torch.randn(SHAPE, generator=seeded_one())
        exact = other.step(output.double(), t, sample.double(), churn_noise=noise.double())
        for found, expected in zip(out, (exact.prev_sample, exact.pred_original_sample), strict=True):
            assert (found.shape, found.dtype) == (SHAPE, dtype)
            assert torch.equal(found, expected.to(dtype))
        sample = out[0]
