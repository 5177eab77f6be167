"""ADM's U-Net is diffusers' where the two are the same, and follows the paper's formulas where they are not."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from imagenet64_diffusion import ADMUNet2DModel
from imagenet64_diffusion.tests.components import seeded
from imagenet64_diffusion.tests.models.network_contract import NetworkContract


TINY = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "layers_per_block": 1,
    "num_class_embeds": 3,
    "resnet_time_scale_shift": "scale_shift",
}
CONVOLUTIONS = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "downsample_type": "conv",
    "upsample_type": "conv",
    "resnet_time_scale_shift": "default",
}


def make_unet(network_class=ADMUNet2DModel, **options):
    """A tiny network with the same random weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network_class(**{**TINY, **options}).eval()


def inputs():
    return torch.randn(3, 3, 16, 16, generator=seeded(0)[0]), torch.tensor([-0.7, 0.0, 999.0]), torch.arange(3)


class TestContract(NetworkContract):
    def make(self):
        return make_unet(num_attention_heads=2, min_channels_per_group=8, time_embedding_channels=16)

    def inputs(self):
        return inputs()


@pytest.mark.parametrize("options", [{}, CONVOLUTIONS], ids=["resnet", "conv"])
@pytest.mark.parametrize("num_class_embeds", [None, 3])
def test_the_answers_of_diffusers_network(options, num_class_embeds):
    stock = make_unet(
        UNet2DModel, **options, num_class_embeds=num_class_embeds, attention_head_dim=16, attn_norm_num_groups=32
    )
    unet = ADMUNet2DModel.from_config(stock.config).eval()
    weights = stock.state_dict()
    if num_class_embeds is not None:
        weights["class_embedding.weight"] = F.pad(weights["class_embedding.weight"], (0, 0, 0, 1))
    unet.load_state_dict(weights)
    sample, timestep, labels = inputs()
    labels = None if num_class_embeds is None else labels
    torch.testing.assert_close(unet(sample, timestep, labels).sample, stock(sample, timestep, labels).sample)


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({"num_attention_heads": 4}, [4, 4]),
        ({"attention_head_dim": 16}, [2, 4]),
        # EDM's: as many heads as there is room for, wider ones if need be
        ({"attention_head_dim": 24}, [1, 2]),
    ],
)
def test_heads(options, heads):
    types = {"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2}
    unet = make_unet(**types, **options).double()
    for level, num_heads in enumerate(heads):
        attention = unet.down_blocks[level].attentions[0]
        features = torch.randn(2, attention.query_dim, 4, 4, generator=seeded(0)[0], dtype=torch.float64)
        tokens = F.group_norm(features, 32, attention.group_norm.weight, attention.group_norm.bias).flatten(2).mT
        query, key, value = (
            layer(tokens).unflatten(2, (num_heads, -1)).movedim(2, 1)
            for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        # (batch, heads, places, places)
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        mixed = attention.to_out[0]((weights @ value).movedim(1, 2).flatten(2))
        torch.testing.assert_close(attention(features), features + mixed.mT.unflatten(2, (4, 4)))


def test_narrow_layers_have_groups_of_four_channels():
    unet = make_unet(block_out_channels=(32, 128), min_channels_per_group=4)
    norms = {m.num_channels: m.num_groups for m in unet.modules() if isinstance(m, torch.nn.GroupNorm)}
    # Karras et al. 2022, as published: min(32, channels // 4)
    assert norms == {32: 8, 64: 16, 128: 32, 160: 32, 256: 32}
    assert unet.config.norm_num_groups == 32


def test_the_time_embedding_may_be_narrower_than_the_first_level():
    unet, (_, timesteps, _) = make_unet(time_embedding_channels=16), inputs()
    angles = timesteps.double()[:, None] * 10_000 ** -(torch.arange(8) / 8)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(unet.time_proj(timesteps).double(), expected, rtol=0, atol=1e-4)
    assert unet.time_embedding.linear_1.weight.shape == (128, 16)


def test_no_class_is_a_zero_that_does_not_learn():
    unet = make_unet()
    sample, timestep, _ = inputs()
    without = unet(sample, timestep).sample
    torch.testing.assert_close(unet(sample, timestep, torch.full((3,), 3)).sample, without)
    table = unet.class_embedding.weight
    assert not table[3].any()
    unet(sample, timestep, torch.tensor([3, 0, 3])).sample.sum().backward()
    assert [table.grad[row].any().item() for row in (0, 3)] == [True, False]
    # which the same network without classes says too
    unconditional = make_unet(num_class_embeds=None)
    unconditional.load_state_dict({name: w for name, w in unet.state_dict().items() if "class" not in name})
    torch.testing.assert_close(unconditional(sample, timestep).sample, without)
    with pytest.raises(ValueError, match="class_embedding"):
        unconditional(sample, timestep, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num_attention_heads": 3}, "64 channels, which cannot have 3 heads"),
        ({"attention_head_dim": 128}, "64 channels, which cannot have 0 heads"),
        ({"norm_num_groups": 24}, "32 channels, which cannot have 24 groups"),
        ({"min_channels_per_group": 5}, "32 channels, which cannot have 6 groups"),
    ],
)
def test_what_does_not_divide_is_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        make_unet(**options)
