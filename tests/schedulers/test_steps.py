"""Steps of both schedulers against the stock ones, each other, and their formulas in double precision."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from imagenet64_diffusion import EtaDDIMScheduler, LearnedVarianceDDPMScheduler
from imagenet64_diffusion.schedulers.original_schedule import original_cosine_betas, original_timesteps
from imagenet64_diffusion.tests.components import seeded_one


SHAPE = (2, 3, 4, 4)
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
VARIANCE_TYPES = ["fixed_small", "fixed_large", "learned_range"]


def run(scheduler, steps: int, abar: torch.Tensor, learned: bool = False, **options) -> list:
    """The sample after every step. The model is the best prediction for normal images, and a little more."""
    scheduler.set_timesteps(steps)
    sample, generator = torch.randn(SHAPE, generator=seeded_one(1), dtype=torch.float64), seeded_one(2)
    samples = []
    for t in scheduler.timesteps:
        rate = abar[t]
        best = {"epsilon": (1 - rate).sqrt() * sample, "sample": rate.sqrt() * sample, "v_prediction": 0 * sample}
        output = best[scheduler.config.prediction_type] + 0.05 * torch.sin(2 * sample)
        output = torch.cat([output, torch.cos(3 * sample)], dim=1) if learned else output
        sample = scheduler.step(output, t, sample, generator=generator, **options).prev_sample
        samples.append(sample)
    return samples


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("total", "steps", "spacing"),
    # those where the stock DDIM scheduler knows its own previous timestep, and one where it does not
    [(50, 50, "leading"), (1000, 10, "trailing"), (1000, 7, "leading"), (1000, 7, "linspace")],
)
class TestWholeRunsEqualStock:
    def compare(self, ours, stock, steps, both_skip_last=False, **options):
        # The rounding of the stock float32 tables adds up to 7e-5 over a long run: here both have the same tables
        stock.alphas_cumprod = ours.alphas_cumprod
        stock.one = stock.final_alpha_cumprod = ours.final_alpha_cumprod
        expected, actual = (run(each, steps, ours.alphas_cumprod, **options) for each in (stock, ours))
        if both_skip_last:
            # the one adds no noise, the other that of the least beta, 1e-10
            torch.testing.assert_close(actual.pop(), expected.pop(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.stack(actual), torch.stack(expected), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
    def test_ddpm(self, total, steps, spacing, prediction_type, variance_type):
        if spacing == "trailing" and variance_type != "fixed_small":
            pytest.skip("after a last timestep above 0 stock adds noise to a sample that it takes to be clean")
        options = {"timestep_spacing": spacing, "prediction_type": prediction_type, "variance_type": variance_type}
        options["num_train_timesteps"] = total
        ours, stock = LearnedVarianceDDPMScheduler(**options), DDPMScheduler(**options)
        self.compare(ours, stock, steps, learned=variance_type == "learned_range")

    @pytest.mark.parametrize(("eta", "clipped", "clean_end"), [(0.0, False, True), (0.6, True, False)])
    def test_ddim(self, total, steps, spacing, prediction_type, eta, clipped, clean_end):
        if spacing == "linspace":
            pytest.skip("stock mistakes the previous timestep")
        options = {"timestep_spacing": spacing, "prediction_type": prediction_type, "set_alpha_to_one": clean_end}
        options["num_train_timesteps"] = total
        ours, stock = EtaDDIMScheduler(**options, variance_type="fixed_small"), DDIMScheduler(**options)
        skips = not clean_end and spacing == "leading"
        self.compare(ours, stock, steps, skips, eta=eta, use_clipped_model_output=clipped)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_tables_equal_stock(schedule):
    options = {"beta_schedule": schedule, "beta_start": 2e-4, "beta_end": 0.03}
    stock, ours = DDPMScheduler(**options), LearnedVarianceDDPMScheduler(**options)
    torch.testing.assert_close(ours.betas, stock.betas.double(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(ours.alphas, stock.alphas.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod.double(), rtol=1e-4, atol=1e-9)


def ddpm_mean(x, x0, noise, abar, abar_prev, beta, beta_tilde, eta):
    share = 1 - abar / abar_prev
    return (abar_prev.sqrt() * share * x0 + (1 - share).sqrt() * (1 - abar_prev) * x) / (1 - abar)


def ddim_mean(x, x0, noise, abar, abar_prev, beta, beta_tilde, eta):
    return abar_prev.sqrt() * x0 + (1 - abar_prev - eta**2 * beta_tilde).clamp(min=0).sqrt() * noise


@pytest.mark.parametrize(
    ("scheduler_class", "mean", "eta", "use_clipped_model_output"),
    [
        (LearnedVarianceDDPMScheduler, ddpm_mean, 1.0, False),
        (EtaDDIMScheduler, ddim_mean, 0.0, False),
        (EtaDDIMScheduler, ddim_mean, 0.7, False),
        (EtaDDIMScheduler, ddim_mean, 1.0, True),
    ],
)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("schedule", ["cosine", "original"])
def test_step_is_its_formula(
    schedule, variance_type, prediction_type, clip, scheduler_class, mean, eta, use_clipped_model_output
):
    options = {"beta_schedule": "squaredcos_cap_v2"}
    if schedule == "original":
        options = {"trained_betas": original_cosine_betas(50), "set_alpha_to_one": False, "max_beta": 0.3}
    options |= {"clip_sample": clip, "prediction_type": prediction_type, "variance_type": variance_type}
    scheduler = scheduler_class(num_train_timesteps=50, clip_sample_range=0.8, **options)
    timesteps = [49, 30, 29, 7, 2] if schedule == "cosine" else original_timesteps(50, 7)
    scheduler.set_timesteps(timesteps=timesteps)
    x, output = torch.randn(SHAPE, dtype=torch.float64), torch.randn(2, 6, 4, 4, dtype=torch.float64)
    prediction, v = output.chunk(2, dim=1)
    z = torch.randn(SHAPE, generator=seeded_one(5), dtype=torch.float64)
    arguments = {"eta": eta, "use_clipped_model_output": use_clipped_model_output} if mean is ddim_mean else {}

    abars = torch.cumprod(1 - scheduler.betas, 0)
    last = torch.tensor(1.0, dtype=torch.float64) if schedule == "cosine" else abars[0]
    for t, abar_prev in zip(timesteps, [*abars[timesteps[1:]], last], strict=True):
        abar = abars[t]
        beta = (1 - abar / abar_prev).clamp(1e-10, scheduler.max_beta)
        beta_tilde = (1 - abar_prev) / (1 - abar) * beta
        x0 = {
            "epsilon": (x - (1 - abar).sqrt() * prediction) / abar.sqrt(),
            "sample": prediction,
            "v_prediction": abar.sqrt() * x - (1 - abar).sqrt() * prediction,
        }[prediction_type]
        noise = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        x0 = x0.clamp(-0.8, 0.8) if clip else x0
        if use_clipped_model_output:
            noise = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        fraction = (v + 1) / 2
        variance = {
            "fixed_small": beta_tilde,
            "fixed_large": beta,
            "learned_range": torch.exp(fraction * beta.log() + (1 - fraction) * beta_tilde.clamp(min=1e-10).log()),
        }[variance_type]
        expected = mean(x, x0, noise, abar, abar_prev, beta, beta_tilde, eta)
        if abar_prev < 1:
            expected = expected + eta * variance.sqrt() * z
        out = scheduler.step(output, t, x, generator=seeded_one(5), **arguments)
        torch.testing.assert_close(out.pred_original_sample, x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out.prev_sample, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "original"])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_classifier_guidance_is_its_formula(variance_type, schedule):
    """Dhariwal & Nichol 2021 (https://arxiv.org/abs/2105.05233), algorithm 1: the mean moves by variance x gradient.

    Where a step ends at a clean sample its posterior variance is 0, and that of the step before stands for it.
    """
    options = {"beta_schedule": "squaredcos_cap_v2"}
    if schedule == "original":
        options = {"trained_betas": original_cosine_betas(50), "set_alpha_to_one": False, "max_beta": 0.3}
    scheduler = LearnedVarianceDDPMScheduler(num_train_timesteps=50, variance_type=variance_type, **options)
    scheduler.set_timesteps(timesteps=[49, 30, 7, 2])
    x, output = torch.randn(SHAPE, dtype=torch.float64), torch.randn(2, 6, 4, 4, dtype=torch.float64)
    gradient, fraction = torch.randn(SHAPE, dtype=torch.float64), (output[:, 3:] + 1) / 2
    abars = torch.cumprod(1 - scheduler.betas, 0)[[49, 30, 7, 2]]
    last = torch.tensor([1.0 if schedule == "cosine" else 1 - scheduler.betas[0]], dtype=torch.float64)
    previous = torch.cat([abars[1:], last])
    beta = (1 - abars / previous).clamp(max=scheduler.max_beta)
    beta_tilde = (1 - previous) / (1 - abars) * beta
    least = torch.cat([beta_tilde[:3], beta_tilde[2:3] if schedule == "cosine" else beta_tilde[3:]])
    largest = beta if schedule == "original" else torch.cat([beta[:3], least[3:]])
    for i, t in enumerate(scheduler.timesteps):
        variance = {
            "fixed_small": beta_tilde[i],
            "fixed_large": largest[i],
            "learned_range": torch.exp(fraction * beta[i].log() + (1 - fraction) * least[i].log()),
        }[variance_type]
        plain, guided = (
            scheduler.step(output, t, x, generator=seeded_one(), score_gradient=each).prev_sample
            for each in (None, gradient)
        )
        torch.testing.assert_close(guided - plain, variance * gradient, rtol=1e-9, atol=1e-9)
        in_single = scheduler.step(output.float(), t, x.float(), seeded_one(), score_gradient=gradient.float())
        assert in_single.prev_sample.dtype == torch.float32


def test_noise_of_a_generator_is_noise_that_is_given():
    scheduler, sample, output = EtaDDIMScheduler(), torch.randn(SHAPE), torch.randn(2, 6, 4, 4)
    given = scheduler.step(output, 500, sample, 0.5, variance_noise=torch.randn(SHAPE, generator=seeded_one(3)))
    sampled = scheduler.step(output, 500, sample, 0.5, generator=seeded_one(3))
    assert torch.equal(given.prev_sample, sampled.prev_sample)
    # and without eta none is sampled
    generator = seeded_one()
    scheduler.step(output, 500, sample, generator=generator)
    assert torch.equal(generator.get_state(), seeded_one().get_state())


def test_extreme_interpolation_stays_finite():
    scheduler = LearnedVarianceDDPMScheduler()
    for value in (1e6, -1e6):
        output = torch.cat([torch.zeros(SHAPE), torch.full(SHAPE, value)], dim=1)
        sample = scheduler.step(output, 500, torch.zeros(SHAPE), generator=seeded_one()).prev_sample
        # exp(15) at most: the logarithm of the variance is clamped to [-30, 30]
        assert sample.isfinite().all()
        assert sample.abs().max() < 4 * 3.3e6
