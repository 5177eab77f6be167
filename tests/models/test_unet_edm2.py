"""EDM2's U-Net beyond its published answers: its options, and weights that stay normalised however it is trained."""

import copy
import json

import pytest
import torch

from imagenet64_diffusion import EDM2UNet2DModel
from imagenet64_diffusion.configs import CONFIG_DIR
from imagenet64_diffusion.models.unet_edm2 import MagnitudePreserving
from imagenet64_diffusion.pipelines.cached_weights import cached_weights
from imagenet64_diffusion.tests.components import seeded
from imagenet64_diffusion.tests.models.network_contract import CheckedInputContract


TINY = {
    "sample_size": 16,
    "num_class_embeds": 3,
    "model_channels": 16,
    "channel_mult": (1, 2),
    "layers_per_block": 1,
    "attention_resolutions": (8,),
    "attention_head_dim": 8,
    "logvar_channels": 8,
}


def make_unet(**options) -> EDM2UNet2DModel:
    """A tiny network with the same random weights every time; its gains, which begin at zero, are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = EDM2UNet2DModel(**{**TINY, **options}).eval()
        for parameter in unet.parameters():
            if parameter.ndim == 0:
                torch.nn.init.uniform_(parameter, 0.5, 1.0)
    return unet


def inputs(dtype=torch.float32):
    return torch.randn(3, 3, 16, 16, generator=seeded(0)[0]).to(dtype), torch.tensor([-1.5, 0.0, 1.1]), torch.arange(3)


def answer(unet, *arguments):
    with torch.no_grad():
        return unet(*(arguments or inputs())).sample


@pytest.mark.parametrize(
    ("option", "unused"),
    [("label_balance", "class_embedding"), ("res_balance", "conv2"), ("attention_balance", "attention.out_conv")],
)
def test_a_share_of_zero(option, unused):
    """It leaves the second of two terms out; the converted networks have the shares between."""
    unet = make_unet(**{option: 0.0})
    unet(*inputs()).sample.square().sum().backward()
    for name, parameter in unet.named_parameters():
        if unused in name or name == "conv_in.weight":
            assert parameter.grad.any() == (unused not in name), name


def test_skip_connections_and_the_bound():
    without, bounded, outputs = make_unet(concat_balance=0.0), make_unet(clip_activations=0.5), []
    expected = answer(without)
    for block in without.decoder:
        if block.skip_channels:
            block.register_forward_pre_hook(lambda _, given: (*given[:2], 0 * given[2]))
    assert torch.equal(answer(without), expected)
    for block in [*bounded.encoder, *bounded.decoder]:
        block.register_forward_hook(lambda _, __, output: outputs.append(output.abs().max().item()))
    answer(bounded)
    assert set(outputs) == {0.5}


def test_magnitudes_are_preserved():
    unet, magnitudes = make_unet(model_channels=64, attention_head_dim=64), []
    for block in [unet.conv_in, *unet.encoder, *unet.decoder]:
        block.register_forward_hook(lambda _, __, output: magnitudes.append(output.square().mean().sqrt().item()))
    answer(unet, torch.randn(4, 3, 16, 16, generator=seeded(0)[0]), 0.3)
    assert len(magnitudes) == 1 + len(unet.encoder) + len(unet.decoder)
    assert all(0.7 < magnitude < 1.4 for magnitude in magnitudes), magnitudes


def test_the_uncertainty_in_half_precision():
    unet, timestep = make_unet(), inputs()[1]
    expected = unet.log_variance(timestep)
    assert unet.log_variance(0.5).shape == (1,)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(unet.log_variance(timestep), expected)
        assert answer(unet).isfinite().all()


def train(unet, steps=2):
    """The gradients of the last of a few steps of training with an uncertainty."""
    optimizer = torch.optim.Adam(unet.train().parameters(), lr=0.05)
    torch.manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        log_variance = unet.log_variance(inputs()[1])[:, None, None, None]
        loss = (unet(*inputs()).sample - 1).square() / log_variance.exp() + log_variance
        loss.mean().backward()
        optimizer.step()
    return {name: parameter.grad for name, parameter in unet.named_parameters()}


def test_training_normalises_weights_and_changes_no_answer():
    unet = make_unet()
    optimized = copy.deepcopy(unet)
    train(optimized)
    expected = answer(optimized.eval())
    layers = {name: layer for name, layer in optimized.named_modules() if isinstance(layer, MagnitudePreserving)}
    grown = [layer.weight.flatten(1).square().mean(1).sqrt() for layer in layers.values()]
    assert max((magnitude - 1).abs().max() for magnitude in grown) > 1e-3
    optimized.train()
    answer(optimized)
    optimized.log_variance(0.0)
    for name, layer in layers.items():
        magnitude = layer.weight.flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(magnitude, torch.ones_like(magnitude), rtol=0, atol=2e-4, msg=name)
    torch.testing.assert_close(answer(optimized.eval()), expected, rtol=0, atol=1e-4)
    # an average of weights, or a copy, is normalised where it is used
    average = copy.deepcopy(optimized)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.7 if parameter.ndim else 1.0)
    torch.testing.assert_close(answer(average), expected, rtol=0, atol=2e-3)


class TestContract(CheckedInputContract):
    def make(self, **options):
        return make_unet(**options)

    def inputs(self):
        return inputs()

    def test_checkpointing_changes_no_gradient(self):
        """Though it calls the layers twice, it normalises once: not a bit of weights and gradients differs."""
        plain, checkpointed = make_unet(dropout=0.2), make_unet(dropout=0.2)
        checkpointed.enable_gradient_checkpointing()
        gradients = train(plain), train(checkpointed)
        assert [name for name, gradient in gradients[0].items() if gradient is None or not gradient.any()] == []
        for name, gradient in gradients[0].items():
            assert torch.equal(gradient, gradients[1][name]), name
            assert torch.equal(plain.get_parameter(name), checkpointed.get_parameter(name)), name


def test_no_class():
    unet, unconditional = make_unet(), make_unet(num_class_embeds=None)
    sample, timestep = inputs()[:2]
    none = answer(unet, sample, timestep)
    assert torch.equal(answer(unet, sample, timestep, torch.full((3,), 3)), none)
    mixed = answer(unet, sample, timestep, torch.tensor([0, 3, 2]))
    torch.testing.assert_close(mixed[1], none[1], rtol=0, atol=1e-5)
    assert all((answer(unet, *inputs())[image] - none[image]).abs().max() > 1e-3 for image in range(3))
    assert answer(unconditional, sample, timestep).shape == sample.shape


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_half_precision(tmp_path, dtype, bound):
    unet = make_unet(model_channels=32, attention_head_dim=16, sample_size=(16, 24))
    unet.save_pretrained(tmp_path)
    buffers = {name: buffer.clone() for name, buffer in unet.named_buffers()}
    expected = answer(unet.double(), *inputs(torch.float64))
    for half in (EDM2UNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype), unet.to(dtype)):
        output = answer(half, *inputs(dtype))
        assert output.dtype == dtype
        assert (output.double() - expected).norm() < bound * expected.norm()
        # it would make other frequencies of them
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in half.named_buffers())


def test_cached_weights_follow_the_weights_and_the_gains():
    unet, calls = make_unet(), []
    for layer in unet.modules():
        if isinstance(layer, MagnitudePreserving):
            layer.effective_weight = lambda prepare=layer.effective_weight: calls.append(1) or prepare()
    with cached_weights(unet):
        answer(unet)
        calls.clear()
        first = answer(unet)
        assert not calls
        for change in (
            lambda weight: weight.mul_(1.5),
            lambda weight: weight.add_(torch.linspace(0, 1, weight.numel()).view(weight.shape)),
        ):
            with torch.no_grad():
                for parameter in unet.parameters():
                    change(parameter)
            fresh = make_unet()
            fresh.load_state_dict(unet.state_dict())
            torch.testing.assert_close(answer(unet), answer(fresh), rtol=0, atol=2e-5)
            assert (answer(unet) - first).abs().max() > 0.01


@pytest.mark.parametrize(("preset", "millions"), {"xs": 125, "s": 280, "m": 498, "l": 777, "xl": 1119}.items())
def test_sizes_of_the_presets(preset, millions):
    """As the paper's tables have them."""
    config = json.loads((CONFIG_DIR / f"edm2_{preset}.json").read_text())
    with torch.device("meta"):
        unet = EDM2UNet2DModel.from_config(config)
    assert unet.num_parameters() / 1e6 == pytest.approx(millions, abs=0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_mult": ()}, "channel_mult is empty"),
        ({"channel_mult": (1, 0)}, r"channel_mult\[1\] is 0, but must be a whole number of at least 1"),
        ({"model_channels": 16.5}, "model_channels is 16.5, but must be a whole number"),
        ({"num_class_embeds": 0}, "num_class_embeds is 0, but must be a whole number"),
        ({"sample_size": 17}, "sample_size is 17x17, which 1 halvings do not divide: take multiples of 2"),
        ({"res_balance": 1.5}, r"res_balance is 1.5, but must be in \[0, 1\]"),
        ({"dropout": 1.0}, r"dropout is 1.0, but must be in \[0, 1\)"),
        ({"clip_activations": 0.0}, "clip_activations is 0.0, but must be above 0, or None"),
        ({"attention_head_dim": 10}, "attention_head_dim asks for 3 heads, but must divide 32 channels evenly"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        EDM2UNet2DModel(**{**TINY, **options})
