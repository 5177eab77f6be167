"""The objectives against the original's answers and against formulas in float64, and the sampling of timesteps."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from imagenet64_diffusion import ClassConditionalUNet2DModel, EtaDDIMScheduler, LearnedVarianceDDPMScheduler
from imagenet64_diffusion.conversion.original import map_original_weights, original_unet_config
from imagenet64_diffusion.schedulers.original_schedule import original_cosine_betas
from imagenet64_diffusion.training.objectives import HybridLoss, ImportanceSampledLoss
from imagenet64_diffusion.training.randomness import StepRandomness


def original_loss() -> HybridLoss:
    options = {"trained_betas": original_cosine_betas(1000), "set_alpha_to_one": False, "max_beta": 0.999}
    return HybridLoss(LearnedVarianceDDPMScheduler(**options))


def test_original_answers(original_checkpoint):
    params, expected = original_checkpoint.params, original_checkpoint.expected
    unet = ClassConditionalUNet2DModel(**original_unet_config(params, "original_interleaved")).eval()
    unet.load_state_dict(map_original_weights(original_checkpoint.state_dict, params))
    loss = original_loss()
    timesteps = expected["loss.timestep"] - 1

    noisy = loss.add_noise(expected["loss.x0"], expected["loss.noise"], timesteps)
    torch.testing.assert_close(noisy, expected["loss.x_t"], atol=5e-6, rtol=0)
    with torch.no_grad():
        output = unet(expected["loss.x_t"], timesteps, original_checkpoint.labels("loss")).sample
    terms = loss(output, expected["loss.x0"], expected["loss.noise"], expected["loss.x_t"], timesteps)

    torch.testing.assert_close(terms.simple.mean(), expected["loss.simple"], atol=0, rtol=1e-6)
    torch.testing.assert_close(terms.total.mean(), expected["loss.total"], atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(terms.vlb.mean(), expected["loss.vlb_weighted"], atol=1e-7, rtol=0)
    total, simple, vlb = expected["loss.per_sample_total_simple_vlb"].unbind(dim=1)
    torch.testing.assert_close(terms.simple, simple, atol=0, rtol=2e-6)
    torch.testing.assert_close(terms.total, total, atol=1e-7, rtol=2e-6)
    # where beta is clamped to 1e-10 the original's own value is rounding
    settled = expected["loss.timestep"] >= 14
    torch.testing.assert_close(terms.vlb[settled], vlb[settled], atol=0, rtol=0.01)


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def batch(size=8, timesteps=None):
    generator = torch.Generator().manual_seed(0)
    original, variance = (torch.rand(2, size, 1, 4, 4, generator=generator) * 2 - 1).unbind()
    noise, prediction = torch.randn(2, size, 1, 4, 4, generator=generator).unbind()
    timesteps = torch.arange(size) * 900 // size + 20 if timesteps is None else timesteps
    return original, noise, prediction, variance, timesteps


def scheduler(prediction_type="epsilon", **options):
    return EtaDDIMScheduler(prediction_type=prediction_type, **{"beta_schedule": "squaredcos_cap_v2", **options})


def terms_of(loss, original, noise, prediction, variance, timesteps):
    """The terms of a batch with a given output of the network."""
    noisy = loss.add_noise(original, noise, timesteps)
    return loss(torch.cat([prediction, variance], dim=1), original, noise, noisy, timesteps)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear"])
def test_divergence_of_gaussians(schedule, prediction_type):
    """Against torch's divergence of the two distributions, built from their definitions in float64."""
    original, noise, prediction, variance, timesteps = (values.double() for values in batch())
    timesteps = timesteps.long()
    plan = scheduler(prediction_type, beta_schedule=schedule)
    loss = HybridLoss(plan, vlb_weight=1.0)
    noisy = loss.add_noise(original, noise, timesteps)
    terms = terms_of(loss, original, noise, prediction, variance, timesteps)

    for i, t in enumerate(timesteps.tolist()):
        abar, abar_prev = plan.alphas_cumprod[t].item(), plan.alphas_cumprod[t - 1].item()
        beta = 1 - abar / abar_prev
        beta_tilde = (1 - abar_prev) / (1 - abar) * beta

        def mean(x0, i=i, abar=abar, abar_prev=abar_prev, beta=beta):
            share_of_noisy = math.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar)
            return math.sqrt(abar_prev) * beta / (1 - abar) * x0 + share_of_noisy * noisy[i]

        signal, rate = math.sqrt(abar), math.sqrt(1 - abar)
        predicted, target = {
            "epsilon": ((noisy[i] - rate * prediction[i]) / signal, noise[i]),
            "sample": (prediction[i], original[i]),
            "v_prediction": (signal * noisy[i] - rate * prediction[i], signal * noise[i] - rate * original[i]),
        }[prediction_type]
        fraction = (variance[i] + 1) / 2
        predicted_variance = beta**fraction * beta_tilde ** (1 - fraction)
        true = torch.distributions.Normal(mean(original[i]), math.sqrt(beta_tilde))
        guess = torch.distributions.Normal(mean(predicted.clamp(-1, 1)), predicted_variance.sqrt())
        expected = torch.distributions.kl_divergence(true, guess).mean()
        assert terms.vlb[i].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6), t
        assert terms.simple[i].item() == pytest.approx((target - prediction[i]).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_bound_trains_the_variance_alone(prediction_type):
    original, noise, prediction, variance, timesteps = batch()
    inputs = (prediction.requires_grad_(), variance.requires_grad_())
    terms = terms_of(HybridLoss(scheduler(prediction_type)), original, noise, *inputs, timesteps)
    of_prediction, of_variance = torch.autograd.grad(terms.vlb.sum(), inputs, retain_graph=True)
    assert of_prediction.abs().max() == 0
    assert of_variance.abs().min() > 0
    assert torch.autograd.grad(terms.simple.sum(), variance)[0].abs().max() == 0


def test_all_timesteps_are_finite():
    """The first too, whose posterior has no variance when the last step is fully denoised; and in half precision."""
    original, noise, prediction, variance, timesteps = batch(1000, torch.arange(1000))
    losses = [HybridLoss(scheduler("v_prediction", set_alpha_to_one=value)) for value in (True, False)]
    for loss in (*losses, original_loss()):
        terms = terms_of(loss, original, noise, prediction, variance, timesteps)
        assert terms.total.isfinite().all()
        half = (prediction.bfloat16(), variance.bfloat16())
        expected = terms_of(loss, original, noise, *(values.float() for values in half), timesteps)
        assert torch.equal(terms_of(loss, original, noise, *half, timesteps).total, expected.total)


def simple_terms(plan, snr_gamma, timesteps):
    """The plain errors of one batch with their weights, and without."""
    original, noise, prediction, variance, _ = batch(len(timesteps))
    weighted, plain = (
        terms_of(HybridLoss(plan, snr_gamma=gamma), original, noise, prediction, variance, timesteps)
        for gamma in (snr_gamma, None)
    )
    assert torch.equal(weighted.vlb, plain.vlb)
    torch.testing.assert_close(weighted.total, weighted.simple + weighted.vlb)
    return weighted.simple, plain.simple


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("gamma", [0.5, 5.0, 1e30])
def test_min_snr_weights(prediction_type, gamma):
    """In float64 against the paper's weights."""
    weighted, plain = simple_terms(scheduler(prediction_type), gamma, torch.arange(1000))
    alpha_prod = scheduler().alphas_cumprod.double()
    snr = alpha_prod / (1 - alpha_prod)
    divisor = {"epsilon": snr, "sample": 1, "v_prediction": snr + 1}[prediction_type]
    torch.testing.assert_close(weighted.double(), snr.clamp(max=gamma) / divisor * plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_where_nothing_is_left_of_the_signal(prediction_type):
    plan = DDIMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    weighted, plain = simple_terms(plan, 5.0, torch.tensor([999]))
    assert weighted.item() == pytest.approx((prediction_type == "epsilon") * plain.item(), abs=1e-6)


def test_wrong_options():
    for gamma in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="but must be above 0"):
            HybridLoss(scheduler(), snr_gamma=gamma)
    with pytest.raises(ValueError, match="prediction_type is flow_prediction, but must be epsilon, sample"):
        HybridLoss(DDPMScheduler(prediction_type="flow_prediction"))


def make_objective(kind, *updates, **options):
    """An objective of 20 timesteps that has seen some losses of all of them."""
    objective = kind(scheduler(num_train_timesteps=20), **options)
    for losses in updates:
        objective.update(np.arange(20), losses)
    return objective


RISING = [np.arange(1.0, 21.0)] * 10


@pytest.mark.parametrize("kind", [HybridLoss, ImportanceSampledLoss])
def test_sampled_timesteps(kind):
    """Over the whole range, with weights that make the weighted mean the plain mean over all timesteps."""
    values = np.square(np.arange(20.0))
    for objective in (make_objective(kind), make_objective(kind, *RISING)):
        timesteps, weights = objective.sample_noise_levels(np.array([0.0, 0.5, np.nextafter(1.0, 0.0)]))
        assert timesteps.dtype == np.int64
        assert (timesteps[0], timesteps[-1]) == (0, 19)
        assert (weights > 0).all()
        timesteps, weights = objective.sample_noise_levels((np.arange(200_000) + 0.5) / 200_000)
        assert np.mean(weights * values[timesteps]) == pytest.approx(values.mean(), rel=1e-3)
    if kind is HybridLoss:
        np.testing.assert_array_equal(np.bincount(timesteps), np.full(20, 10_000))


def test_importance_sampling_is_uniform_until_all_histories_are_full():
    objective = make_objective(ImportanceSampledLoss, history_length=2)
    objective.update(np.repeat(np.arange(20), 2)[:-1], np.arange(39.0))
    np.testing.assert_array_equal(objective.probabilities(), np.full(20, 1 / 20))
    objective.update(np.array([19]), np.array([100.0]))
    assert objective.probabilities()[19] > objective.probabilities()[0]
    # and where there is no loss anywhere
    objective.update(np.tile(np.arange(20), 2), np.zeros(40))
    np.testing.assert_array_equal(objective.probabilities(), np.full(20, 1 / 20))


def test_importance_sampling_formula():
    """p_t ~ sqrt(mean of the last ten squared losses), mixed with a uniform share of 0.001."""
    losses = np.random.default_rng(0).random((14, 20))
    objective = make_objective(ImportanceSampledLoss, *losses)
    moments = np.sqrt(np.mean(losses[-10:] ** 2, axis=0))
    expected = 0.999 * moments / moments.sum() + 0.001 / 20
    np.testing.assert_allclose(objective.probabilities(), expected, rtol=1e-12)
    resumed = make_objective(ImportanceSampledLoss)
    # the second is of a run that sampled uniformly
    for state in (objective.state_dict(), {}):
        resumed.load_state_dict(state)
        np.testing.assert_array_equal(resumed.probabilities(), objective.probabilities())
    timesteps, weights = objective.sample_noise_levels((np.arange(100_000) + 0.5) / 100_000)
    np.testing.assert_allclose(np.bincount(timesteps) / 100_000, expected, atol=2e-5)
    np.testing.assert_allclose(weights, 1 / (20 * expected[timesteps]))


def test_random_numbers_belong_to_the_place_in_the_batch():
    """Not to the rank or the pass that needs them; and each seed and step has its own."""

    def numbers(images=slice(0, 10_000), seed=0, step=3, probability=0.25):
        return StepRandomness(seed, step, images, 10_000, probability)

    cpu, whole = torch.device("cpu"), numbers()
    pieces = [numbers(slice(start, start + 2500)) for start in range(0, 10_000, 2500)]
    for name in ("uniforms", "drops_class", "flips", "noise_seeds"):
        together = np.concatenate([getattr(piece, name) for piece in pieces])
        np.testing.assert_array_equal(together, getattr(whole, name))
    noise = torch.cat([piece.noise((1, 2, 2), cpu) for piece in pieces])
    assert torch.equal(noise, whole.noise((1, 2, 2), cpu))
    assert len({tuple(row) for row in noise.flatten(1).tolist()}) == 10_000
    for other in (numbers(seed=1), numbers(step=4)):
        assert (other.noise((1, 2, 2), cpu) != noise).any(dim=(1, 2, 3)).all()
        assert (other.uniforms != whole.uniforms).all()
    assert not numbers(probability=0.0).drops_class.any()
    assert numbers(probability=1.0).drops_class.all()
    # and they have the distributions that they should
    assert whole.uniforms.min() >= 0
    assert whole.uniforms.max() < 1
    for name, mean in (("uniforms", 0.5), ("drops_class", 0.25), ("flips", 0.5)):
        assert getattr(whole, name).mean() == pytest.approx(mean, abs=0.02)
    assert max(abs(noise.mean()), abs(noise.std() - 1)) < 0.02
