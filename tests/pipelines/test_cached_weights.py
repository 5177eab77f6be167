"""Prepared weights give the answers of the network's own weights, whatever happens to these meanwhile."""

import copy
import functools
import pickle

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import nn

from imagenet64_diffusion.models.unet_class_conditional import StandardizedConv2d
from imagenet64_diffusion.pipelines.cached_weights import cached_weights
from imagenet64_diffusion.tests.components import make_unet


ALL_LAYERS = ("resnet", "convnext", "class_attention", "self_attention", "channel_attention")


def inputs(batch=3, size=16):
    sample = torch.randn(batch, 1, size, size, generator=torch.Generator().manual_seed(0))
    return sample, torch.arange(batch) * 300, torch.arange(batch) % 4


@pytest.fixture
def unet():
    return make_unet(layer_types=ALL_LAYERS, attention_patch_size=8)


def answer(unet, *arguments):
    with torch.no_grad():
        return unet(*(arguments or inputs())).sample


def assert_right(unet, *arguments, tolerance=2e-5):
    """Its answer is that of a network with these weights that has never prepared any."""
    fresh = type(unet).from_config(unet.config).to(unet.dtype).eval()
    fresh.load_state_dict(unet.state_dict())
    torch.testing.assert_close(answer(unet, *arguments), answer(fresh, *arguments), rtol=0, atol=tolerance)


def attached(network):
    return [module for module in network.modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    ("head", "attention", "size"), [("conv", "channel", 8), ("original", "identity", 8), ("conv", "channel", (16, 32))]
)
def test_every_layer(head, attention, size):
    options = {"attention_patch_size": 4, "output_head_type": head, "class_attention_type": attention}
    unet = make_unet(layer_types=ALL_LAYERS, sample_size=size, **options)
    sample = torch.randn(2, 1, *((size, size) if isinstance(size, int) else size))
    arguments = (sample, torch.tensor([3, 700]), torch.tensor([1, 3]))
    # gradients asked for: the way of the training, which has another memory layout
    expected = unet(*arguments).sample.detach()
    with cached_weights(unet):
        torch.testing.assert_close(answer(unet, *arguments), expected, rtol=0, atol=2e-5)


def test_batches_sizes_and_dtypes_that_change(unet):
    with cached_weights(unet):
        for batch, size in ((1, 16), (3, 16), (2, 32), (1, 16)):
            assert_right(unet, *inputs(batch, size))
    with torch.autocast("cpu", torch.bfloat16):
        expected = answer(unet)
    with cached_weights(unet):
        answer(unet)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(answer(unet), expected, rtol=0, atol=0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 0.0)):
        sample, *others = inputs()
        with cached_weights(unet.to(dtype)):
            assert_right(unet, sample.to(dtype), *others, tolerance=tolerance)


@pytest.mark.parametrize(
    ("conv", "takes_part"),
    [
        (nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1), True),
        (nn.Conv2d(6, 6, 3, padding=1, stride=2), True),
        (nn.Conv2d(6, 6, 3, padding=2, groups=3, dilation=2), True),
        (nn.Conv2d(6, 4, 3, padding=1, bias=False), True),
        (StandardizedConv2d(6, 4, 3, padding=1), True),
        (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1), False),
        (nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), False),
        (nn.Conv2d(6, 4, 3, padding="same"), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(8, 8), (3, 5), (2, 3)])
def test_every_kind_of_convolution(conv, takes_part, size):
    images = torch.randn(2, 6, *size)
    with torch.no_grad():
        expected = conv(images)
        with cached_weights(conv):
            assert bool(attached(conv)) == takes_part
            torch.testing.assert_close(conv(images), expected, rtol=0, atol=1e-5)


def test_a_stock_network():
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    unet = UNet2DModel(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, **blocks).eval()
    sample = torch.randn(2, 3, 8, 8)
    expected = answer(unet, sample, 5)
    with cached_weights(unet):
        assert attached(unet)
        torch.testing.assert_close(answer(unet, sample, 5), expected, rtol=0, atol=2e-5)


def scale_in_place(unet):
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.3)


def optimizer_step(unet):
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.05)
    unet(*inputs()).sample.square().mean().backward()
    optimizer.step()


def load(unet, **options):
    unet.load_state_dict({name: 1.3 * value for name, value in unet.state_dict().items()}, **options)


def replace(unet):
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(1.3 * module.weight.detach())


def move(unet):
    # there and back: new memory with the same values, then other ones
    unet.double().float()
    scale_in_place(unet)


@pytest.mark.parametrize(
    "change", [scale_in_place, optimizer_step, load, functools.partial(load, assign=True), replace, move]
)
def test_weights_that_change_meanwhile(unet, change):
    with cached_weights(unet):
        before = answer(unet)
        change(unet)
        assert_right(unet)
    assert (answer(unet) - before).abs().max() > 1e-3


def test_the_ema_that_is_swapped_in_between(unet):
    """EMAModel writes through ``.data``, which leaves no trace on the weight."""
    ema = EMAModel(unet.parameters(), decay=0.5)
    scale_in_place(unet)
    with cached_weights(unet):
        before = answer(unet)
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    with cached_weights(unet):
        assert (answer(unet) - before).abs().max() > 1e-3
        assert_right(unet)


def test_gradients_are_those_of_the_weights(unet):
    plain = copy.deepcopy(unet)
    plain(*inputs()).sample.square().mean().backward()
    with cached_weights(unet):
        answer(unet)
        unet(*inputs()).sample.square().mean().backward()
    for (name, parameter), other in zip(unet.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_copies_have_their_own(unet, duplicate):
    with cached_weights(unet):
        before = answer(unet)
        other = duplicate(unet)
        scale_in_place(other)
        assert_right(other)
        torch.testing.assert_close(answer(unet), before, rtol=0, atol=0)


def test_in_inference_mode(unet):
    with torch.inference_mode():
        unet = copy.deepcopy(unet)
        with cached_weights(unet):
            torch.testing.assert_close(answer(unet), answer(unet), rtol=0, atol=0)


def test_weights_are_standardised_once_and_nothing_is_left(unet, monkeypatch):
    calls, names, effective_weight = [], list(unet.state_dict()), StandardizedConv2d.effective_weight
    monkeypatch.setattr(
        StandardizedConv2d, "effective_weight", lambda conv: calls.append(conv) or effective_weight(conv)
    )
    with cached_weights(unet):
        for _ in range(3):
            with cached_weights(unet):
                answer(unet)
        assert attached(unet)
        assert list(unet.state_dict()) == names
    assert len(calls) == len(set(calls)) == sum(isinstance(module, StandardizedConv2d) for module in unet.modules())
    assert not attached(unet)


def test_compiled_networks_are_left_alone():
    """Traced as torch.compile traces, without its compiler; with neither break nor retrace."""
    torch._dynamo.reset()
    unet = make_unet(block_out_channels=(8,), layer_types=("resnet",))
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    sample, _, labels = inputs()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for timestep in torch.tensor([999, 500]):
            expected = answer(unet, sample, timestep, labels)
            torch.testing.assert_close(compiled(sample, timestep, labels).sample, expected, rtol=0, atol=2e-5)
            with cached_weights(compiled):
                torch.testing.assert_close(compiled(sample, timestep, labels).sample, expected, rtol=0, atol=2e-5)
