"""EDM2's networks become ours by their options; others, and options that fit nothing, are refused in a sentence."""

import pytest
import torch

from imagenet64_diffusion.conversion.edm2 import convert_network
from imagenet64_diffusion.conversion.pickle_reader import CheckpointError


OPTIONS = {
    "img_resolution": 16,
    "img_channels": 3,
    "label_dim": 5,
    "use_fp16": True,
    "sigma_data": 0.5,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 2,
    "attn_resolutions": [8],
    "channels_per_head": 8,
}
# what the file says of its weights; here only that it has that many
SHAPES = dict.fromkeys(map(str, range(300)), ())


def test_every_weight_has_a_source():
    conversion = convert_network("Precond", OPTIONS, SHAPES)
    weights = conversion.convert({name: torch.zeros(shape) for name, shape in conversion.shapes.items()})
    expected = {name: weight.shape for name, weight in conversion.network.state_dict().items()}
    assert {name: weight.shape for name, weight in weights.items()} == expected
    assert conversion.shapes["unet.enc.16x16_conv.weight"] == (16, 4, 3, 3)
    assert conversion.shapes["unet.dec.8x8_in0.attn_qkv.weight"] == (96, 32, 1, 1)
    assert conversion.shapes["unet.dec.16x16_block2.conv_skip.weight"] == (16, 32, 1, 1)
    # without classes
    unconditional = convert_network("Precond", {**OPTIONS, "label_dim": 0}, SHAPES)
    assert conversion.shapes.keys() - unconditional.shapes.keys() == {"unet.emb_label.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resample_filter": [1, 3, 3, 1]}, r"resample_filter is \[1, 3, 3, 1\], but must be \[1, 1\]"),
        ({"resample_filter": 2}, "resample_filter is 2"),
        ({"model_chanels": 16}, "the option 'model_chanels', which EDM2's has not; perhaps model_channels"),
        ({"num_blocks": 10**12}, "they ask for 2,000,000,000,000 blocks, more than the file has weights"),
        ({"num_blocks": "many"}, "describe none of EDM2's"),
        ({"num_blocks": 0}, "describe none of EDM2's: layers_per_block is 0, but must be a whole number"),
        ({"channel_mult": None}, "describe none of EDM2's"),
        ({"model_channels": 10**30}, "describe none of EDM2's"),
        ({"img_resolution": [16, 16]}, "describe none of EDM2's"),
        ({"dropout": "none"}, "describe none of EDM2's"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(CheckpointError, match=message):
        convert_network("Precond", {**OPTIONS, **options}, SHAPES)


def test_other_networks():
    with pytest.raises(CheckpointError, match="a network of class 'EDMPrecond', but EDM2's is a Precond"):
        convert_network("EDMPrecond", OPTIONS, SHAPES)
    with pytest.raises(CheckpointError, match="lacks the option img_channels"):
        convert_network("Precond", {"img_resolution": 16, "label_dim": 5}, SHAPES)
