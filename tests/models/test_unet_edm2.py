"""EDM2's U-Net follows the formulas of its paper, and its weights stay normalised however it is trained."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

from imagenet64_diffusion import EDM2UNet2DModel
from imagenet64_diffusion.configs import CONFIG_DIR
from imagenet64_diffusion.models.unet_edm2 import EncoderBlock, MagnitudePreserving
from imagenet64_diffusion.pipelines.cached_weights import cached_weights
from imagenet64_diffusion.tests.components import seeded


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


def norm(values, dims):
    """Equations 47 and 66, with the epsilon of the published program."""
    return values / (values.square().mean(dims, keepdim=True).sqrt() + 1e-4)


def mp_conv(layer, values):
    weight = layer.weight
    weight = norm(weight, tuple(range(1, weight.ndim))) / math.sqrt(weight[0].numel())
    return F.conv2d(values, weight, padding=weight.shape[-1] // 2) if weight.ndim == 4 else values @ weight.T


def mp_silu(values):
    """Equation 81."""
    return values * values.sigmoid() / 0.596


def mp_sum(a, b, t):
    """Equation 88."""
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a, b, t):
    """Equation 103."""
    widths = a.shape[1], b.shape[1]
    scale = math.sqrt(sum(widths) / ((1 - t) ** 2 + t**2))
    return scale * torch.cat([(1 - t) / math.sqrt(widths[0]) * a, t / math.sqrt(widths[1]) * b], dim=1)


def block_of_the_paper(block, x, embedding, config, skip=None):
    """Figure 21, in plain steps; ``embedding`` before its SiLU."""
    encodes = isinstance(block, EncoderBlock)
    if block.resamples:
        batch, channels, height, width = x.shape
        if encodes:
            x = x.reshape(batch, channels, height // 2, 2, width // 2, 2).mean((3, 5))
        else:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = x if skip is None else mp_cat(x, skip, config.concat_balance)
    if encodes:
        x = norm(x if block.shortcut is None else mp_conv(block.shortcut, x), 1)
    scale = 1 + block.embedding_gain * mp_conv(block.embedding_projection, mp_silu(embedding))
    y = mp_conv(block.conv2, mp_silu(mp_conv(block.conv1, mp_silu(x)) * scale[:, :, None, None]))
    if not encodes and block.shortcut is not None:
        x = mp_conv(block.shortcut, x)
    x = mp_sum(x, y, config.res_balance)
    if block.attention is not None:
        heads = block.attention.heads
        tokens = mp_conv(block.attention.query_key_value, x).flatten(2).unflatten(1, (3, heads, -1))
        query, key, value = norm(tokens, 3).unbind(1)  # (batch, heads, channels, positions)
        weights = (query.mT @ key / math.sqrt(query.shape[2])).softmax(-1)
        y = mp_conv(block.attention.out_conv, (value @ weights.mT).reshape(x.shape))
        x = mp_sum(x, y, config.attention_balance)
    return x.clamp(-config.clip_activations, config.clip_activations)


@pytest.mark.parametrize(
    "options", [{}, {"concat_balance": 0.3, "res_balance": 0.6, "attention_balance": 0.7, "clip_activations": 0.5}]
)
def test_the_papers_formulas(options):
    """The whole network in float64, with weights of all magnitudes."""
    unet = make_unet(label_balance=0.4, **options).double()
    with torch.no_grad():
        for layer in unet.modules():
            if isinstance(layer, MagnitudePreserving):
                layer.weight.mul_(
                    torch.rand(len(layer.weight), generator=seeded(1)[0]).view(-1, *[1] * (layer.weight.ndim - 1))
                    + 0.5
                )
        sample, timestep, labels = inputs(torch.float64)
        features = math.sqrt(2) * torch.cos(
            timestep[:, None] * unet.time_fourier.frequencies + unet.time_fourier.phases
        )
        classes = mp_conv(unet.class_embedding, math.sqrt(3) * torch.eye(3).double()[labels])
        embedding = mp_sum(mp_conv(unet.time_embedding, features.double()), classes, 0.4)
        x = mp_conv(unet.conv_in, torch.cat([sample, torch.ones_like(sample[:, :1])], dim=1))
        skips = [x]
        for block in unet.encoder:
            x = block_of_the_paper(block, x, embedding, unet.config)
            skips.append(x)
        for block in unet.decoder:
            skip = skips.pop() if block.skip_channels else None
            x = block_of_the_paper(block, x, embedding, unet.config, skip)
        expected = mp_conv(unet.conv_out, x) * unet.out_gain
    assert not skips
    torch.testing.assert_close(answer(unet, sample, timestep, labels), expected, rtol=0, atol=1e-12)


def test_magnitudes_are_preserved():
    unet, magnitudes = make_unet(model_channels=64, attention_head_dim=64), []
    for block in [unet.conv_in, *unet.encoder, *unet.decoder]:
        block.register_forward_hook(lambda _, __, output: magnitudes.append(output.square().mean().sqrt().item()))
    answer(unet, torch.randn(4, 3, 16, 16, generator=seeded(0)[0]), 0.3)
    assert len(magnitudes) == 1 + len(unet.encoder) + len(unet.decoder)
    assert all(0.7 < magnitude < 1.4 for magnitude in magnitudes), magnitudes


def test_the_uncertainty():
    unet, timestep = make_unet(), inputs()[1]
    fourier = unet.logvar_fourier
    features = math.sqrt(2) * (timestep[:, None].double() * fourier.frequencies + fourier.phases).cos()
    expected = mp_conv(unet.logvar_linear.double(), features)[:, 0]
    torch.testing.assert_close(unet.float().log_variance(timestep).double(), expected, rtol=0, atol=1e-5)
    assert unet.log_variance(0.5).shape == (1,)
    with torch.autocast("cpu", torch.bfloat16):
        assert unet.log_variance(timestep).dtype == torch.float32
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


def test_gradient_checkpointing_changes_nothing():
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


def test_timestep_as_anything():
    unet = make_unet()
    sample, _, labels = inputs()
    expected = answer(unet, sample, torch.full((3,), 0.5), labels)
    for timestep in (0.5, torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64)):
        torch.testing.assert_close(answer(unet, sample, timestep, labels), expected)
    assert isinstance(unet(sample, 0.5, labels, return_dict=False), tuple)


def test_saving_and_loading(tmp_path):
    unet = make_unet(sample_size=(16, 24))
    unet.save_pretrained(tmp_path)
    loaded = EDM2UNet2DModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config.channel_mult == TINY["channel_mult"]
    assert torch.equal(answer(loaded), answer(unet))
    # half precision would make other frequencies of these
    for half in (EDM2UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16), loaded.to(torch.bfloat16)):
        assert half.dtype == torch.bfloat16
        for name, buffer in half.named_buffers():
            assert torch.equal(buffer, unet.get_buffer(name)), name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_half_precision(dtype, bound):
    unet = make_unet(model_channels=32, attention_head_dim=16)
    expected = answer(unet.double(), *inputs(torch.float64))
    output = answer(unet.to(dtype), *inputs(dtype))
    assert output.dtype == dtype
    assert (output.double() - expected).norm() < bound * expected.norm()


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
        ({"channel_mult_emb": 0}, "channel_mult_emb is 0"),
        ({"layers_per_block": 0}, "layers_per_block is 0"),
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


def test_wrong_input():
    unet, unconditional = make_unet(), make_unet(num_class_embeds=None)
    sample, label = torch.zeros(3, 3, 16, 16), torch.tensor([0])
    for message, network, *arguments in (
        (r"sample has shape \(3, 1, 16, 16\), but must be \(batch, 3, height", unet, sample[:, :1], 0.0),
        ("sample is 16x15, which 1 halvings do not divide", unet, sample[..., :15], 0.0),
        ("timestep has 2 entries, but must have 1 or 3", unet, sample, torch.zeros(2)),
        (r"class_labels has shape \(1,\), but must be \(3,\)", unet, sample, 0.0, label),
        ("class_labels were given, but num_class_embeds is None", unconditional, sample[:1], 0.0, label),
    ):
        with pytest.raises(ValueError, match=message):
            network(*arguments)
