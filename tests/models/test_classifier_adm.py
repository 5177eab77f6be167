"""ADM's classifier is the encoder of its U-Net and one attention that pools."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from imagenet64_diffusion import ADMClassifierModel
from imagenet64_diffusion.tests.components import seeded
from imagenet64_diffusion.tests.models.network_contract import NetworkContract


TINY = {
    "sample_size": 16,
    "num_classes": 5,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 16,
}
CONVOLUTIONS = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "downsample_type": "conv",
    "resnet_time_scale_shift": "default",
}


def make_classifier(**options) -> ADMClassifierModel:
    """A tiny network with the same random weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ADMClassifierModel(**{**TINY, **options}).eval()


def inputs():
    return torch.randn(2, 3, 16, 16, generator=seeded(0)[0]), torch.tensor([0, 999])


class TestContract(NetworkContract):
    def make(self):
        return make_classifier(time_embedding_channels=16)

    def inputs(self):
        return inputs()


@pytest.mark.parametrize("options", [{}, CONVOLUTIONS], ids=["resnet", "conv"])
def test_the_encoder_of_diffusers_network(options):
    """The features that are pooled are those in the middle of a ``UNet2DModel`` with the same weights."""
    classifier = make_classifier(**options, pool_type="adaptive")
    shared = {
        key: classifier.config[key]
        for key in inspect.signature(UNet2DModel).parameters.keys() & classifier.config.keys()
    }
    up_block_types = ("AttnUpBlock2D", "UpBlock2D")
    unet = UNet2DModel(**shared, up_block_types=up_block_types, attn_norm_num_groups=32).eval()
    encoder = {name: w for name, w in classifier.state_dict().items() if not name.startswith(("pool", "conv_norm"))}
    missing = unet.load_state_dict(encoder, strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == {"up_blocks", "conv_norm_out", "conv_out"}
    features = []
    unet.mid_block.register_forward_hook(lambda module, arguments, output: features.append(output))
    unet(*inputs())
    norm, (_, head, _) = classifier.conv_norm_out, classifier.pool
    normalized = F.silu(F.group_norm(features[0], 32, norm.weight, norm.bias)).mean((2, 3))
    expected = F.linear(normalized, head.weight.flatten(1), head.bias)
    torch.testing.assert_close(classifier(*inputs()).logits, expected)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"pool_type": "spatial"}, "pool_type is 'spatial', but must be 'attention' or 'adaptive'"),
        ({"attention_head_dim": 24}, "attention_head_dim is 24, but must divide 64 channels"),
        ({"down_block_types": ("AttnDownBlock2D",)}, "must have 2 types"),
    ],
)
def test_wrong_options_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        make_classifier(**options)
