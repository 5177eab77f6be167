"""The network with the original's weights gives the original's answers."""

import pytest
import torch

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.conversion.original import map_original_weights, original_unet_config


@pytest.mark.parametrize(
    ("answers", "time_embedding_type"),
    [("fixed", "original_interleaved"), ("released", "original_alternating")],
)
def test_forward(original_checkpoint, answers, time_embedding_type):
    params, expected = original_checkpoint.params, original_checkpoint.expected
    unet = ClassConditionalUNet2DModel(**original_unet_config(params, time_embedding_type)).eval()
    # strict: every weight of ours comes from the checkpoint
    unet.load_state_dict(map_original_weights(original_checkpoint.state_dict, params))
    with torch.no_grad():
        output = unet(
            expected["forward.sample"], expected["forward.timestep"] - 1, original_checkpoint.labels("forward")
        ).sample
    noise, variance = output.chunk(2, dim=1)
    torch.testing.assert_close(noise, expected[f"forward.{answers}.noise"], atol=1e-5, rtol=0)
    torch.testing.assert_close((variance + 1) / 2, expected[f"forward.{answers}.v"], atol=1e-5, rtol=0)


def test_a_batch_of_one_is_all_sine(original_checkpoint):
    """The original draws one image at a time, whose row is even: original_sine stands for that."""
    params, expected = original_checkpoint.params, original_checkpoint.expected
    unet = ClassConditionalUNet2DModel(**original_unet_config(params, "original_sine")).eval()
    unet.load_state_dict(map_original_weights(original_checkpoint.state_dict, params))
    labels = original_checkpoint.labels("forward")
    with torch.no_grad():
        output = unet(expected["forward.sample"], expected["forward.timestep"] - 1, labels).sample
    for row in (0, 2):
        noise = output[row].chunk(2)[0]
        torch.testing.assert_close(noise, expected["forward.released.noise"][row], atol=1e-5, rtol=0)


def test_every_weight_of_the_original_has_one_place(original_checkpoint):
    state_dict, params = original_checkpoint.state_dict, original_checkpoint.params
    mapped = map_original_weights(state_dict, params)
    dead = [name for name in state_dict if "Q_emb" in name or "K_emb" in name]
    assert len(mapped) == len(state_dict) - len(dead)


@pytest.mark.parametrize(
    "name", ["unet.nothing.weight", "unet.downBlocks.0.block.0.block3.proj.weight", "out_mean.block.7.bias", "x"]
)
def test_unknown_weights_are_refused(original_checkpoint, name):
    with pytest.raises(KeyError):
        map_original_weights({name: torch.zeros(1)}, original_checkpoint.params)


def test_without_classes_and_with_older_files():
    params = {"inCh": 1, "embCh": 8, "chMult": 0, "num_blocks": 1, "blk_types": ["res", "conv"], "T": 50}
    params |= {"beta_sched": "cosine", "t_dim": 8, "c_dim": None, "num_classes": 10}
    config = original_unet_config(params)
    assert config["num_class_embeds"] is None
    assert config["attention_patch_size"] == 16
    assert config["block_out_channels"] == (8,)
    unet = ClassConditionalUNet2DModel(**config)
    assert unet(torch.zeros(1, 1, 8, 8), 49).sample.shape == (1, 2, 8, 8)


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
