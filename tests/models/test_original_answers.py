"""The network with the original's weights gives the original's answers."""

import pytest
import torch

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.conversion.original import map_original_weights, original_unet_config


@pytest.mark.parametrize(
    ("answers", "kind", "rows"),
    [
        ("fixed", "interleaved", slice(None)),
        ("released", "alternating", slice(None)),
        # the original samples one image at a time, whose row is even: original_sine stands for that
        ("released", "sine", slice(0, None, 2)),
    ],
)
def test_forward(original_checkpoint, answers, kind, rows):
    params, expected, state_dict = (
        getattr(original_checkpoint, name) for name in ("params", "expected", "state_dict")
    )
    unet = ClassConditionalUNet2DModel(**original_unet_config(params, f"original_{kind}")).eval()
    mapped = map_original_weights(state_dict, params)
    assert len(mapped) == len([name for name in state_dict if "Q_emb" not in name and "K_emb" not in name])
    # strict: every weight of ours comes from the checkpoint
    unet.load_state_dict(mapped)
    with torch.no_grad():
        labels = original_checkpoint.labels("forward")
        output = unet(expected["forward.sample"], expected["forward.timestep"] - 1, labels).sample
    noise, variance = output[rows].chunk(2, dim=1)
    torch.testing.assert_close(noise, expected[f"forward.{answers}.noise"][rows], atol=1e-5, rtol=0)
    torch.testing.assert_close((variance + 1) / 2, expected[f"forward.{answers}.v"][rows], atol=1e-5, rtol=0)


def test_without_classes_and_with_older_files():
    params = {"inCh": 1, "embCh": 8, "chMult": 0, "num_blocks": 1, "blk_types": ["res", "conv"], "T": 50}
    params |= {"beta_sched": "cosine", "t_dim": 8, "c_dim": None, "num_classes": 10}
    config = original_unet_config(params)
    assert config["num_class_embeds"] is None
    assert (config["attention_patch_size"], config["block_out_channels"]) == (16, (8,))
    unet = ClassConditionalUNet2DModel(**config)
    assert unet(torch.zeros(1, 1, 8, 8), 49).sample.shape == (1, 2, 8, 8)
    with pytest.raises(KeyError):
        map_original_weights({"unet.downBlocks.0.block.0.block3.proj.weight": torch.zeros(1)}, params)


def test_time_encodings_follow_their_formula():
    """Against float64 sines of the float32 phases: the phases are rounded as the original rounds them."""
    dim, timesteps = 32, torch.tensor([0, 12, 499, 999])
    frequencies = 10000.0 ** (2 * torch.arange(dim, dtype=torch.float32) / dim)
    phases = ((timesteps + 1).float()[:, None] * frequencies).double()
    expected = {
        "original_sine": phases.sin(),
        "original_interleaved": torch.where(torch.arange(dim) % 2 == 0, phases.sin(), phases.cos()),
        "original_alternating": torch.where(torch.arange(4)[:, None] % 2 == 0, phases.sin(), phases.cos()),
    }
    for kind, values in expected.items():
        unet = ClassConditionalUNet2DModel(
            stem_channels=8, block_out_channels=(8,), time_embed_dim=dim, time_embedding_type=kind
        )
        torch.testing.assert_close(unet.time_encoding(timesteps).double(), values, atol=1e-6, rtol=0)
        # fractions round to the nearest, and a trip through half precision changes nothing
        unet = unet.half().float()
        torch.testing.assert_close(unet.time_encoding(timesteps + 0.4).double(), values, atol=1e-6, rtol=0)
