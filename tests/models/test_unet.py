"""The class-conditional U-Net: a diffusers model that gives the original's answers with the original's weights."""

import inspect
import itertools
import json
from typing import ClassVar

import pytest
import torch

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.configs import CONFIG_DIR
from imagenet64_diffusion.conversion.original import map_original_weights, original_unet_config
from imagenet64_diffusion.models.unet_class_conditional import LAYER_TYPE_ALIASES, LAYER_TYPES
from imagenet64_diffusion.tests.components import TINY_UNET, make_unet, seeded
from imagenet64_diffusion.tests.models.network_contract import CheckedInputContract


def inputs():
    return torch.randn(3, 1, 16, 16, generator=seeded(0)[0]), torch.arange(3) * 300, torch.arange(3)


@pytest.mark.parametrize("head", ["conv", "original"])
def test_orders_of_layers_and_numbers_of_channels(head):
    """Every order of one or two layer types that may begin a stack, and two of all."""
    orders = [*itertools.permutations(LAYER_TYPES, 1), *itertools.permutations(LAYER_TYPES, 2)]
    orders += [tuple(LAYER_TYPES), ("convnext", "self_attention", "class_attention", "resnet", "channel_attention")]
    for order in orders:
        if LAYER_TYPES[order[0]].changes_width:
            output = make_unet(layer_types=order, output_head_type=head, attention_patch_size=8)(*inputs()).sample
            assert output.shape == (3, 2, 16, 16), order
            assert output.isfinite().all(), order
    for channels in (2, 3, 6):
        unet = make_unet(in_channels=channels, output_head_type=head, sample_size=(16, 24))
        assert unet(torch.zeros(2, channels, 16, 24), 5).sample.shape == (2, 2 * channels, 16, 24)


class TestContract(CheckedInputContract):
    options: ClassVar[dict] = {}

    def make(self, **options):
        layers = [name for name in LAYER_TYPES if "num_class_embeds" not in options or name != "class_attention"]
        return make_unet(layer_types=tuple(layers), attention_patch_size=8, **self.options, **options)

    def inputs(self):
        return inputs()


class TestContractOfTheOriginal(TestContract):
    options: ClassVar[dict] = {"output_head_type": "original", "time_embedding_type": "original_alternating"}


def test_the_null_class():
    unet = make_unet()
    sample, timestep, _ = inputs()
    torch.testing.assert_close(unet(sample, timestep, torch.full((3,), 3)).sample, unet(sample, timestep).sample)
    # it is zero and stays so: training with it moves the other rows alone
    optimizer, table = torch.optim.AdamW(unet.train().parameters(), lr=0.1), unet.class_embedding.weight
    unet(sample, timestep, torch.tensor([3, 0, 3])).sample.square().mean().backward()
    optimizer.step()
    assert [row.any().item() for row in (table[3], table.grad[3], table.grad[0])] == [False, False, True]


def test_the_first_prediction_is_zero_and_layers_have_the_originals_names_too():
    unet = ClassConditionalUNet2DModel(**TINY_UNET, layer_types=tuple(LAYER_TYPE_ALIASES), attention_patch_size=8)
    assert not unet(*inputs()).sample.any()
    assert unet.config.layer_types == tuple(LAYER_TYPE_ALIASES.values())


@pytest.mark.parametrize("file", sorted(CONFIG_DIR.rglob("[!e]*.json")), ids=lambda file: file.stem)
def test_every_config_file_is_whole(file):
    config, faithful = json.loads(file.read_text()), file.parent.name == "original"
    assert set(config) <= {*inspect.signature(ClassConditionalUNet2DModel).parameters, "_class_name"}
    assert config["output_head_type"] == ("original" if faithful else "conv")
    assert config["class_attention_type"] == ("identity" if faithful else "channel")
    assert config["time_embedding_type"].startswith("original") == faithful
    if faithful:
        # what goes back to the original
        assert config["block_out_channels"] == [config["stem_channels"] * factor for factor in (2, 4, 8)]


@pytest.mark.parametrize(("recipe", "millions"), [("res", 123.5), ("res_conv", 144.1)])
def test_sizes_of_the_recipes(recipe, millions):
    """The sizes of the original's networks, which the sound heads and attention leave as they were."""
    with torch.device("meta"):
        unet = ClassConditionalUNet2DModel.from_config(json.loads((CONFIG_DIR / f"{recipe}.json").read_text()))
    assert unet.num_parameters() / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_types": ("class_attention", "resnet")}, "begins with 'class_attention'.*begin with resnet or conv"),
        ({"layer_types": ("chnAtn",)}, "begins with 'channel_attention'"),
        ({"layer_types": ("resnet", "dense")}, "names 'dense', but must be made of resnet, convnext"),
        ({"layer_types": ()}, "layer_types is empty"),
        ({"num_class_embeds": None}, "'class_attention', which needs classes, but num_class_embeds is None"),
        ({"num_class_embeds": 0}, "num_class_embeds is 0, but must be a whole number of at least 1"),
        ({"sample_size": 18}, "sample_size is 18x18, which 2 levels cannot halve: take multiples of 4"),
        ({"sample_size": (16, 17)}, "sample_size is 16x17"),
        ({"layer_types": ("resnet", "self_attention"), "attention_patch_size": 3}, "must divide .* map of 16x16"),
        (
            {"layer_types": ("resnet", "self_attention"), "attention_patch_size": 8, "sample_size": 24},
            "attention_patch_size is 8, but must divide .* map of 12x12 that sample_size 24 gives at level 1",
        ),
        ({"block_out_channels": ()}, "block_out_channels is empty"),
        ({"block_out_channels": (8, 0)}, r"block_out_channels\[1\] is 0, but must be a whole number"),
        ({"stem_channels": 0}, "stem_channels is 0"),
        ({"dropout": 1.0}, "dropout is 1.0, but must be in"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier', but must be one of sinusoidal"),
        ({"class_attention_type": "none"}, "class_attention_type is 'none', but must be one of channel, identity"),
        ({"output_head_type": "linear"}, "output_head_type is 'linear', but must be one of conv, original"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ClassConditionalUNet2DModel(**{**TINY_UNET, **options})


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("layers", [("resnet", "convnext"), ("resnet", "resnet", "self_attention")])
def test_half_precision(dtype, bound, layers):
    """The relative error on random networks, which is about that of trained ones."""
    unet = make_unet(
        stem_channels=32,
        block_out_channels=(64, 128),
        layer_types=(*layers, "class_attention", "channel_attention"),
        attention_patch_size=16,
    )
    sample, *others = inputs()
    with torch.no_grad():
        expected = unet.double()(sample.double(), *others).sample
        output = unet.to(dtype)(sample.to(dtype), *others).sample
    for part, reference in zip(output.chunk(2, dim=1), expected.chunk(2, dim=1), strict=True):
        assert (part.double() - reference).norm() / reference.norm() < bound


@pytest.mark.parametrize(
    ("answers", "kind", "rows"),
    [
        ("fixed", "interleaved", slice(None)),
        ("released", "alternating", slice(None)),
        # the original samples one image at a time, whose row is even: original_sine stands for that
        ("released", "sine", slice(0, None, 2)),
    ],
)
def test_the_originals_answers(original_checkpoint, answers, kind, rows):
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
        unet = make_unet(time_embed_dim=dim, time_embedding_type=kind)
        torch.testing.assert_close(unet.time_encoding(timesteps).double(), values, atol=1e-6, rtol=0)
        # fractions round to the nearest, and a trip through half precision changes nothing
        unet = unet.half().float()
        torch.testing.assert_close(unet.time_encoding(timesteps + 0.4).double(), values, atol=1e-6, rtol=0)
