"""Schedulers of EDM against what sampling must give: a closed solution, and algorithm 2 in double precision.

For independent pixels N(m, s^2) the best denoiser is linear, D(x; sigma) = (s^2 x + sigma^2 m) / (s^2 + sigma^2), and
the ODE keeps (x - m) / sqrt(s^2 + sigma^2) as it is (Karras et al. 2022, https://arxiv.org/abs/2206.00364, eqs. 1, 3).
The table of docs/schedulers.md is printed by

    python -m imagenet64_diffusion.tests.schedulers.test_edm_samples
"""

import math

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from imagenet64_diffusion import EDMHeunScheduler
from imagenet64_diffusion.tests.components import seeded_one


SHAPE = (2, 3, 16, 16)
MEAN, DEVIATION = 0.2, 0.3
# Steps of 15, 35 and 63 evaluations of the network.
HEUN_STEPS = (8, 18, 32)
# Root mean square errors with so many evaluations, in percent of the standard deviation of the images.
ERRORS = {
    EDMHeunScheduler: (46.6, 6.48, 1.83),
    EDMEulerScheduler: (19.7, 8.63, 4.83),
    EDMDPMSolverMultistepScheduler: (9.95, 1.63, 0.457),
}
# How far errors may be exceeded with other versions.
MARGIN = 1.1


def denoise(x, sigma):
    return (DEVIATION**2 * x + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)


def raw_output(model_input, timestep, sigma_data=0.5, sign=1):
    """F of the best denoiser, from what a network is given (Karras et al. 2022, eq. 7 and table 1)."""
    sigma = (4 * timestep.double()).exp()
    total = (sigma**2 + sigma_data**2).sqrt()
    x = model_input.double() * total
    return sign * (denoise(x, sigma) - sigma_data**2 / total**2 * x) * total / (sigma * sigma_data)


def sample(scheduler, steps, dtype=torch.float64, latents=None, **options):
    """The samples before the first step and after the last."""
    scheduler.set_timesteps(steps)
    latents = torch.randn(SHAPE, generator=seeded_one(1), dtype=torch.float64) if latents is None else latents
    x = first = (latents * scheduler.init_noise_sigma).to(dtype)
    sign = -1 if scheduler.config.prediction_type == "v_prediction" else 1
    for t in scheduler.timesteps:
        output = raw_output(scheduler.scale_model_input(x, t), t, scheduler.config.sigma_data, sign).to(dtype)
        x = scheduler.step(output, t, x, **options).prev_sample
    return first, x


def error(scheduler, steps, dtype=torch.float64) -> float:
    """In percent of the standard deviation of the images."""
    first, last = sample(scheduler, steps, dtype)
    begin, end = (math.hypot(DEVIATION, scheduler.sigmas[index]) for index in (0, -1))
    right = MEAN + (first - MEAN) * end / begin
    return 100 * (last - right).square().mean().sqrt().item() / DEVIATION


def errors(scheduler_class) -> list[float]:
    """With as many evaluations as a run of `HEUN_STEPS` has; in float32."""
    steps = HEUN_STEPS if scheduler_class is EDMHeunScheduler else [2 * steps - 1 for steps in HEUN_STEPS]
    return [error(scheduler_class(), each, torch.float32) for each in steps]


@pytest.mark.parametrize("scheduler_class", ERRORS)
def test_errors_of_the_page(scheduler_class):
    for found, known in zip(errors(scheduler_class), ERRORS[scheduler_class], strict=True):
        assert known / MARGIN < found < known * MARGIN


@pytest.mark.parametrize("options", [{}, {"sigma_schedule": "exponential"}, {"rho": 3.0, "sigma_data": 1.0}])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_second_order(options, prediction_type):
    # a last step to noise level 0, which is Euler's, would leave an error that the number of steps does not change
    scheduler = EDMHeunScheduler(prediction_type=prediction_type, final_sigmas_type="sigma_min", **options)
    found = [error(scheduler, steps) for steps in (128, 256, 512)]
    assert 3.7 < found[0] / found[1] < 4.3
    assert 3.7 < found[1] / found[2] < 4.3


def algorithm_2(latents, noises, steps, churn, low, high, noise_scale, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Karras et al. 2022, algorithm 2; the first step's churn by its variance. Also returns what was denoised."""
    t = [
        (sigma_max ** (1 / rho) + i / (steps - 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
        for i in range(steps)
    ] + [0.0]
    noises, x, denoised = iter(noises), latents * t[0], []

    def derivative(x, sigma):
        denoised.append(denoise(x, sigma))
        return (x - denoised[-1]) / sigma

    for i in range(steps):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= t[i] <= high else 0.0
        t_hat = t[i] + gamma * t[i]
        added = noise_scale * math.sqrt(t_hat**2 - t[i] ** 2)
        x_hat = latents * math.hypot(t[i], added) if i == 0 else x
        if i > 0 and gamma > 0:
            x_hat = x + added * next(noises)
        d = derivative(x_hat, t_hat)
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + derivative(x, t[i + 1]) / 2)
    return x, denoised


CHURN = [(0.0, 0.0, math.inf, 1.0), (4.0, 0.05, 50.0, 1.003), (4.0, 0.0, math.inf, 1.1), (100.0, 0.0, 30.0, 1.0)]


@pytest.mark.parametrize("churn", CHURN)
@pytest.mark.parametrize("steps", [2, 8, 13])
def test_algorithm_2(churn, steps):
    """Noises are given to every call, and only those that the algorithm asks for are read."""
    scheduler = EDMHeunScheduler(**dict(zip(("S_churn", "S_min", "S_max", "S_noise"), churn, strict=True)))
    scheduler.set_timesteps(steps)
    latents, *noises = torch.randn(2 * steps + 1, *SHAPE, dtype=torch.float64)
    used, found = [], []
    x = latents * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        sigma, following = scheduler.sigmas[i : i + 2]
        # from the exact level, which the timestep has to float32 only
        output = raw_output(scheduler.scale_model_input(x, t), sigma.log() / 4)
        out = scheduler.step(output, t, x, churn_noise=noises[i])
        if i % 2 == 1 and following > sigma:
            used.append(noises[i])
        found.append(out.pred_original_sample)
        x = out.prev_sample
    expected, denoised = algorithm_2(latents, used, steps, *churn)
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.stack(found), torch.stack(denoised), rtol=1e-10, atol=1e-10)


def test_churn_keeps_the_distribution():
    """Noise levels rise by new noise as much as they are said to: the images keep their mean and deviation."""
    scheduler = EDMHeunScheduler(S_churn=20)
    latents = torch.randn(4, 3, 64, 64, generator=seeded_one(), dtype=torch.float64)
    images = sample(scheduler, 64, latents=latents, generator=seeded_one(1))[1]
    count = images.numel()
    assert abs(images.mean() - MEAN) < 5 * DEVIATION / math.sqrt(count)
    assert abs(images.std() / DEVIATION - 1) < 5 / math.sqrt(2 * count) + 0.005


if __name__ == "__main__":
    for scheduler_class in ERRORS:
        print(scheduler_class.__name__, *(f"{each:.3g}" for each in errors(scheduler_class)))
