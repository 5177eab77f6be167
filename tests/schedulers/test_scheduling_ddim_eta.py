"""EtaDDIMScheduler against the stock DDIM scheduler, our DDPM scheduler and its formulas in double precision."""

import pytest
import torch
from diffusers import DDIMScheduler

from imagenet64_diffusion.schedulers.original_schedule import original_cosine_betas, original_timesteps
from imagenet64_diffusion.schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from imagenet64_diffusion.schedulers.scheduling_ddpm_learned import LearnedVarianceDDPMScheduler


SHAPE = (2, 3, 4, 4)
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def predict(sample: torch.Tensor, abar: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """A smooth stand-in for a model: the best prediction for normally distributed images, and a little more."""
    best = {"epsilon": (1 - abar).sqrt() * sample, "sample": abar.sqrt() * sample, "v_prediction": 0 * sample}
    return best[prediction_type] + 0.05 * torch.sin(2 * sample)


def run(scheduler, steps: int, abar: torch.Tensor, dtype: torch.dtype, **options) -> list[torch.Tensor]:
    """The sample after every step."""
    scheduler.set_timesteps(steps)
    sample, generator = torch.randn(SHAPE, generator=seeded(1), dtype=dtype), seeded(2)
    samples = []
    for t in scheduler.timesteps:
        output = predict(sample, abar[t].to(dtype), scheduler.config.prediction_type)
        sample = scheduler.step(output, t, sample, generator=generator, **options).prev_sample
        samples.append(sample)
    return samples


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize(("use_clipped_model_output", "clean_end"), [(False, True), (True, False)])
@pytest.mark.parametrize(
    ("total", "steps", "spacing"),
    # Those where the stock scheduler knows its own previous timestep
    [(100, 100, "leading"), (1000, 50, "leading"), (1000, 10, "trailing"), (1000, 7, "leading")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_runs_equal_stock(
    total, steps, spacing, prediction_type, eta, use_clipped_model_output, clean_end, dtype
):
    options = {
        "num_train_timesteps": total,
        "timestep_spacing": spacing,
        "prediction_type": prediction_type,
        "set_alpha_to_one": clean_end,
    }
    stock, ours = DDIMScheduler(**options), EtaDDIMScheduler(**options, variance_type="fixed_small")
    # The rounding of the stock float32 tables adds up to 7e-5 over a long run: here both have the same tables
    stock.alphas_cumprod, stock.final_alpha_cumprod = ours.alphas_cumprod, ours.final_alpha_cumprod
    arguments = {"eta": eta, "use_clipped_model_output": use_clipped_model_output}
    expected = run(stock, steps, ours.alphas_cumprod, dtype, **arguments)
    actual = run(ours, steps, ours.alphas_cumprod, dtype, **arguments)
    if not clean_end and spacing == "leading":
        # A last step within one abar: the stock scheduler adds no noise, ours that of the least beta, 1e-10
        torch.testing.assert_close(actual.pop(), expected.pop(), rtol=1e-4, atol=1e-4)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(torch.stack(actual), torch.stack(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("steps", "spacing"), [(10, "leading"), (7, "linspace"), (7, "trailing"), (60, "leading")])
def test_eta_one_is_ddpm(prediction_type, steps, spacing):
    options = {
        "num_train_timesteps": 60,
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "clip_sample": False,
        "variance_type": "fixed_small",
        "beta_schedule": "squaredcos_cap_v2",
    }
    ddpm, ddim = LearnedVarianceDDPMScheduler(**options), EtaDDIMScheduler(**options)
    expected = run(ddpm, steps, ddpm.alphas_cumprod, torch.float64)
    actual = run(ddim, steps, ddpm.alphas_cumprod, torch.float64, eta=1.0)
    torch.testing.assert_close(torch.stack(actual), torch.stack(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("clip", "use_clipped_model_output"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("eta", "variance_type"),
    [
        (0.0, "learned_range"),
        (0.7, "fixed_small"),
        (0.7, "fixed_large"),
        (0.7, "learned_range"),
        (1.0, "learned_range"),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {"num_train_timesteps": 50, "beta_schedule": "squaredcos_cap_v2"},
        {
            "num_train_timesteps": 50,
            "trained_betas": original_cosine_betas(50),
            "set_alpha_to_one": False,
            "max_beta": 0.4,
        },
    ],
    ids=["cosine", "original"],
)
def test_step_is_its_formula(options, eta, variance_type, prediction_type, use_clipped_model_output, clip):
    scheduler = EtaDDIMScheduler(
        clip_sample=clip,
        clip_sample_range=0.8,
        prediction_type=prediction_type,
        variance_type=variance_type,
        **options,
    )
    timesteps = [49, 30, 29, 7, 0] if scheduler.config.set_alpha_to_one else original_timesteps(50, 7)
    scheduler.set_timesteps(timesteps=timesteps)
    x, output = torch.randn(SHAPE, dtype=torch.float64), torch.randn(2, 6, 4, 4, dtype=torch.float64)
    prediction, v = output.chunk(2, dim=1)
    z = torch.randn(SHAPE, dtype=torch.float64)

    abars = torch.cumprod(1 - scheduler.betas, 0)
    last = torch.tensor(1.0, dtype=torch.float64) if scheduler.config.set_alpha_to_one else abars[0]
    for t, abar_prev in zip(timesteps, [*abars[timesteps[1:]], last], strict=True):
        abar = abars[t]
        beta = (1 - abar / abar_prev).clamp(1e-10, scheduler.max_beta)
        beta_tilde = (1 - abar_prev) / (1 - abar) * beta
        if prediction_type == "epsilon":
            x0, e = (x - (1 - abar).sqrt() * prediction) / abar.sqrt(), prediction
        elif prediction_type == "sample":
            x0, e = prediction, (x - abar.sqrt() * prediction) / (1 - abar).sqrt()
        else:
            x0 = abar.sqrt() * x - (1 - abar).sqrt() * prediction
            e = abar.sqrt() * prediction + (1 - abar).sqrt() * x
        if clip:
            x0 = x0.clamp(-0.8, 0.8)
        if use_clipped_model_output:
            e = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        fraction = (v + 1) / 2
        variance = {
            "fixed_small": beta_tilde,
            "fixed_large": beta,
            "learned_range": torch.exp(fraction * beta.log() + (1 - fraction) * beta_tilde.clamp(min=1e-10).log()),
        }[variance_type]
        expected = abar_prev.sqrt() * x0 + (1 - abar_prev - eta**2 * beta_tilde).clamp(min=0).sqrt() * e
        if abar_prev < 1:
            expected = expected + eta * variance.sqrt() * z
        out = scheduler.step(
            output,
            t,
            x,
            eta=eta,
            use_clipped_model_output=use_clipped_model_output,
            variance_noise=z if eta > 0 else None,
        )
        torch.testing.assert_close(out.pred_original_sample, x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out.prev_sample, expected, rtol=1e-9, atol=1e-9)


def test_noise_given_equals_noise_drawn():
    scheduler = EtaDDIMScheduler()
    sample, output = torch.randn(SHAPE), torch.randn(2, 6, 4, 4)
    noise = torch.randn(SHAPE, generator=seeded(3))
    given = scheduler.step(output, 500, sample, eta=0.5, variance_noise=noise).prev_sample
    drawn = scheduler.step(output, 500, sample, eta=0.5, generator=seeded(3)).prev_sample
    assert torch.equal(given, drawn)


def test_without_eta_no_noise_is_drawn():
    scheduler, generator = EtaDDIMScheduler(), seeded()
    before = generator.get_state()
    out = scheduler.step(torch.randn(2, 6, 4, 4), 500, torch.randn(SHAPE), generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert out.prev_sample.isfinite().all()


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_previous_timestep_where_stock_mistakes_it(spacing):
    # A model that knows the image loses nothing on the way if, and only if, each step ends where the next begins
    clean, sample = torch.rand(SHAPE) * 1.8 - 0.9, torch.randn(SHAPE)
    errors = {}
    for scheduler in (EtaDDIMScheduler(timestep_spacing=spacing), DDIMScheduler(timestep_spacing=spacing)):
        scheduler.set_timesteps(7)
        x, worst = sample, 0.0
        noise = None
        for t in scheduler.timesteps:
            abar = scheduler.alphas_cumprod[t].float()
            implied = (x - abar.sqrt() * clean) / (1 - abar).sqrt()
            worst = max(worst, 0.0 if noise is None else float((implied - noise).abs().max()))
            noise = implied
            x = scheduler.step(implied, t, x).prev_sample
        errors[type(scheduler)] = worst
    assert errors[EtaDDIMScheduler] < 1e-3
    assert errors[DDIMScheduler] > 1e-3
