"""EDM's objective against the formulas of its papers in float64, and what objectives make of other networks."""

import math

import numpy as np
import pytest
import torch

from imagenet64_diffusion import EDM2UNet2DModel, EDMHeunScheduler, EtaDDIMScheduler
from imagenet64_diffusion.training.objectives import EDMLoss, HybridLoss, TrainedNetwork


SIGMAS = torch.tensor([1e-4, 0.02, 0.5, 3.0, 80.0])


def random(*shape, seed=0):
    return torch.randn(len(SIGMAS), *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sigma_data", [0.5, 0.8])
@pytest.mark.parametrize("log_variance", [None, random(seed=4)], ids=["plain", "uncertain"])
def test_table_1(sigma_data, log_variance):
    """Noisy image, what the network sees, and the weighted error of D, by Karras et al. 2022, as they are written."""
    original, noise, output = (random(2, 4, 4, seed=seed) for seed in (1, 2, 3))
    loss = EDMLoss(EDMHeunScheduler(sigma_data=sigma_data))
    noisy = loss.add_noise(original, noise, SIGMAS)
    sample, timestep = loss.model_inputs(noisy, SIGMAS)
    terms = loss(output, original, noise, noisy, SIGMAS, log_variance)
    # of a network that predicts a variance too, that is left aside
    both = torch.cat([output, noise], dim=1)
    assert torch.equal(loss(both, original, noise, noisy, SIGMAS, log_variance).total, terms.total)
    assert loss(loss.target(original, noise, SIGMAS), original, noise, noisy, SIGMAS).total.abs().max() == 0

    original, noise, output, sigma = (values.double() for values in (original, noise, output, SIGMAS))
    sigma = sigma[:, None, None, None]
    squares = sigma**2 + sigma_data**2
    c_skip, c_out = sigma_data**2 / squares, sigma * sigma_data / squares.sqrt()
    exact = original + sigma * noise
    denoised = c_skip * exact + c_out * output
    weight = squares / (sigma * sigma_data) ** 2
    expected = (weight * (denoised - original) ** 2).mean(dim=(1, 2, 3))
    if log_variance is not None:
        # Karras et al. 2024, equation 16
        expected = expected / log_variance.double().exp() + log_variance
    torch.testing.assert_close(terms.total.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(noisy.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sample.double(), exact / squares.sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(timestep.double(), sigma.flatten().log() / 4, rtol=1e-6, atol=1e-6)


def test_log_normal_noise_levels():
    """The share of levels below each is the normal distribution's, also at both ends of the uniform numbers."""
    loss = EDMLoss(EDMHeunScheduler(), p_mean=-0.4, p_std=1.0)
    uniforms = np.array([0.0, 2.0**-53, 0.1, 0.5, 0.9, np.nextafter(1.0, 0.0)])
    sigmas, weights = loss.sample_noise_levels(uniforms)
    np.testing.assert_array_equal(weights, np.ones(6))
    assert sigmas.dtype == np.float32
    assert (np.diff(sigmas) > 0).all()
    shares = [(1 + math.erf((math.log(sigma) + 0.4) / math.sqrt(2))) / 2 for sigma in sigmas.tolist()]
    np.testing.assert_allclose(shares, uniforms, atol=1e-6)
    np.testing.assert_allclose(loss.quantiles(torch.from_numpy(sigmas)), uniforms, atol=1e-5)


def test_the_other_sign_is_refused():
    with pytest.raises(ValueError, match="prediction_type is v_prediction, but EDM's loss needs epsilon"):
        EDMLoss(EDMHeunScheduler(prediction_type="v_prediction"))


@pytest.mark.parametrize("log_variance", [None, random(seed=4)], ids=["plain", "uncertain"])
def test_ddpm_without_a_variance(log_variance):
    """The plain error alone, which an uncertainty weighs as in EDM's loss."""
    original, noise, output = (random(2, 4, 4, seed=seed) for seed in (1, 2, 3))
    loss = HybridLoss(EtaDDIMScheduler(prediction_type="epsilon"))
    timesteps = torch.arange(5) * 200
    terms = loss(output, original, noise, loss.add_noise(original, noise, timesteps), timesteps, log_variance)
    expected = (noise - output).square().mean(dim=(1, 2, 3))
    if log_variance is not None:
        expected = expected / log_variance.exp() + log_variance
    torch.testing.assert_close(terms.simple, expected)
    assert torch.equal(terms.total, terms.simple)


def test_one_forward_pass_reaches_every_parameter():
    """Which DDP asks for: the uncertainty's too. Gradients are those of the network called by hand."""
    torch.manual_seed(0)
    sizes = {"sample_size": 4, "model_channels": 8, "channel_mult": (1,), "layers_per_block": 1, "logvar_channels": 4}
    unet = EDM2UNet2DModel(**sizes, in_channels=2, num_class_embeds=3, attention_head_dim=8).train()
    torch.nn.init.ones_(unet.out_gain)
    original, noise, labels = random(2, 4, 4, seed=1), random(2, 4, 4, seed=2), torch.arange(5) % 4
    loss = EDMLoss(EDMHeunScheduler())
    noisy = loss.add_noise(original, noise, SIGMAS)
    sample, timestep = loss.model_inputs(noisy, SIGMAS)

    def gradients(output, log_variance):
        total = loss(output, original, noise, noisy, SIGMAS, log_variance).total.mean()
        return dict(zip(names, torch.autograd.grad(total, list(unet.parameters()), allow_unused=True), strict=True))

    names = [name for name, _ in unet.named_parameters()]
    found = gradients(*TrainedNetwork(unet)(sample, timestep, labels))
    assert [name for name in names if found[name] is None] == []
    expected = gradients(unet(sample, timestep, labels).sample, unet.log_variance(timestep))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
