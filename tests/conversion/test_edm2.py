"""EDM2's networks become ours by their options; others, and options that fit nothing, are refused in a sentence."""

import pytest
import torch

from imagenet64_diffusion.conversion.edm import convert_edm2
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
    conversion = convert_edm2(OPTIONS, SHAPES)
    weights = conversion.convert({name: torch.zeros(shape) for name, shape in conversion.shapes.items()})
    expected = {name: weight.shape for name, weight in conversion.network.state_dict().items()}
    assert {name: weight.shape for name, weight in weights.items()} == expected
    assert conversion.shapes["unet.enc.16x16_conv.weight"] == (16, 4, 3, 3)
    assert conversion.shapes["unet.dec.8x8_in0.attn_qkv.weight"] == (96, 32, 1, 1)
    assert conversion.shapes["unet.dec.16x16_block2.conv_skip.weight"] == (16, 32, 1, 1)
    # without classes
    unconditional = convert_edm2({**OPTIONS, "label_dim": 0}, SHAPES)
    assert conversion.shapes.keys() - unconditional.shapes.keys() == {"unet.emb_label.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resample_filter": [1, 3, 3, 1]}, r"resample_filter is \[1, 3, 3, 1\], but must be one of \[1, 1\]"),
        ({"resample_filter": 2}, "resample_filter is 2"),
        ({"model_chanels": 16}, "the option 'model_chanels', which its class has not; perhaps model_channels"),
        ({"num_blocks": 10**12}, "num_blocks is 1000000000000, but must be a whole number in"),
        ({"num_blocks": 64}, "the network has 128 blocks, but 10 tensors"),
        ({"num_blocks": "many"}, "num_blocks is 'many'"),
        ({"num_blocks": 0}, "num_blocks is 0, but must be a whole number"),
        ({"channel_mult": None}, "channel_mult is None, but must be a list"),
        ({"model_channels": 10**30}, "model_channels is 1000"),
        ({"img_resolution": [16, 16]}, r"img_resolution is \[16, 16\]"),
        ({"label_balance": 2}, "describes no network: label_balance is 2"),
        ({"label_balance": "all"}, "describes no network"),
        ({"logvar_channels": 10**30}, "describes no network"),
        ({"dropout": "none"}, "dropout is 'none'"),
        ({"img_channels": None}, "img_channels is None, but must be a whole number"),
    ],
)
def test_wrong_options(options, message):
    shapes = dict.fromkeys(map(str, range(10)), ()) if options.get("num_blocks") == 64 else SHAPES
    with pytest.raises(CheckpointError, match=message):
        convert_edm2({**OPTIONS, **options}, shapes)
