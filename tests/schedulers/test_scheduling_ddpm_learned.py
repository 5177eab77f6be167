"""LearnedVarianceDDPMScheduler against the stock DDPM scheduler and against its formulas in double precision."""

import pytest
import torch
from diffusers import DDPMScheduler

from imagenet64_diffusion.schedulers.scheduling_ddpm_learned import LearnedVarianceDDPMScheduler


SHAPE = (2, 3, 4, 4)
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
VARIANCE_TYPES = ["fixed_small", "fixed_large", "learned_range"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def predict(sample: torch.Tensor, abar: torch.Tensor, prediction_type: str, learned: bool) -> torch.Tensor:
    """A smooth stand-in for a model: the best prediction for normally distributed images, and a little more."""
    best = {"epsilon": (1 - abar).sqrt() * sample, "sample": abar.sqrt() * sample, "v_prediction": 0 * sample}
    prediction = best[prediction_type] + 0.05 * torch.sin(2 * sample)
    return torch.cat([prediction, torch.cos(3 * sample)], dim=1) if learned else prediction


def run(scheduler, steps: int, abar: torch.Tensor, dtype: torch.dtype, learned: bool) -> list[torch.Tensor]:
    """The sample after every step."""
    scheduler.set_timesteps(steps)
    sample, generator = torch.randn(SHAPE, generator=seeded(1), dtype=dtype), seeded(2)
    samples = []
    for t in scheduler.timesteps:
        output = predict(sample, abar[t].to(dtype), scheduler.config.prediction_type, learned)
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
        samples.append(sample)
    return samples


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("total", "steps", "spacing"),
    [
        (100, 100, "leading"),
        (1000, 50, "leading"),
        (1000, 10, "trailing"),
        (1000, 7, "leading"),
        (1000, 7, "linspace"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_runs_equal_stock(total, steps, spacing, prediction_type, variance_type, dtype):
    options = {
        "num_train_timesteps": total,
        "timestep_spacing": spacing,
        "prediction_type": prediction_type,
        "variance_type": variance_type,
    }
    stock, ours = DDPMScheduler(**options), LearnedVarianceDDPMScheduler(**options)
    # The rounding of the stock float32 tables adds up to 7e-5 over a long run: here both have the same tables
    stock.alphas_cumprod, stock.one = ours.alphas_cumprod, ours.final_alpha_cumprod
    learned = variance_type == "learned_range"
    expected = run(stock, steps, ours.alphas_cumprod, dtype, learned)
    actual = run(ours, steps, ours.alphas_cumprod, dtype, learned)
    if spacing == "trailing" and variance_type != "fixed_small":
        # After a last timestep above 0 the stock scheduler adds noise to a sample that it takes to be clean
        expected, actual = expected[:-1], actual[:-1]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(torch.stack(actual), torch.stack(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_tables_equal_stock(schedule):
    stock = DDPMScheduler(beta_schedule=schedule, beta_start=2e-4, beta_end=0.03)
    ours = LearnedVarianceDDPMScheduler(beta_schedule=schedule, beta_start=2e-4, beta_end=0.03)
    torch.testing.assert_close(ours.betas, stock.betas.double(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(ours.alphas, stock.alphas.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod.double(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("max_beta", [1.0, 0.3])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("clean_end", [True, False])
def test_step_is_its_formula(clip, max_beta, prediction_type, variance_type, clean_end):
    scheduler = LearnedVarianceDDPMScheduler(
        num_train_timesteps=50,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=clip,
        clip_sample_range=0.8,
        set_alpha_to_one=clean_end,
        prediction_type=prediction_type,
        variance_type=variance_type,
        max_beta=max_beta,
    )
    timesteps = [49, 30, 29, 7, 2]
    scheduler.set_timesteps(timesteps=timesteps)
    x, output = torch.randn(SHAPE, dtype=torch.float64), torch.randn(2, 6, 4, 4, dtype=torch.float64)
    prediction, v = output.chunk(2, dim=1)
    z = torch.randn(SHAPE, generator=seeded(5), dtype=torch.float64)

    abars = torch.cumprod(1 - scheduler.betas, 0)
    last = torch.tensor(1.0, dtype=torch.float64) if clean_end else abars[0]
    for t, abar_prev in zip(timesteps, [*abars[timesteps[1:]], last], strict=True):
        abar = abars[t]
        beta = 1 - abar / abar_prev
        x0 = {
            "epsilon": (x - (1 - abar).sqrt() * prediction) / abar.sqrt(),
            "sample": prediction,
            "v_prediction": abar.sqrt() * x - (1 - abar).sqrt() * prediction,
        }[prediction_type]
        if clip:
            x0 = x0.clamp(-0.8, 0.8)
        mean = abar_prev.sqrt() * beta / (1 - abar) * x0
        mean = mean + (1 - beta).sqrt() * (1 - abar_prev) / (1 - abar) * x
        beta = beta.clamp(1e-10, max_beta)
        beta_tilde = (1 - abar_prev) / (1 - abar) * beta
        fraction = (v + 1) / 2
        variance = {
            "fixed_small": beta_tilde,
            "fixed_large": beta,
            "learned_range": torch.exp(fraction * beta.log() + (1 - fraction) * beta_tilde.clamp(min=1e-10).log()),
        }[variance_type]
        noise = variance.sqrt() * z if abar_prev < 1 else 0
        out = scheduler.step(output, t, x, generator=seeded(5))
        torch.testing.assert_close(out.pred_original_sample, x0, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(out.prev_sample, mean + noise, rtol=1e-10, atol=1e-10)


def test_extreme_interpolation_stays_finite():
    scheduler = LearnedVarianceDDPMScheduler()
    output = torch.cat([torch.zeros(SHAPE), torch.full(SHAPE, 1e6)], dim=1)
    for sign in (1, -1):
        out = scheduler.step(sign * output, 500, torch.zeros(SHAPE), generator=seeded())
        assert out.prev_sample.isfinite().all()
        # exp(15) at most: the logarithm of the variance is clamped to [-30, 30]
        assert out.prev_sample.abs().max() < 4 * 3.3e6
