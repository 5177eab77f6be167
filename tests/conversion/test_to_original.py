"""The way back to the original's files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagenet64_diffusion import ClassConditionalPipeline, ClassConditionalUNet2DModel, EtaDDIMScheduler
from imagenet64_diffusion.conversion.components import original_scheduler
from imagenet64_diffusion.conversion.converting import convert_files
from imagenet64_diffusion.conversion.errors import CheckpointError
from imagenet64_diffusion.conversion.original_weights import original_weight_shapes
from imagenet64_diffusion.conversion.to_original import write_original
from imagenet64_diffusion.tests.components import RECIPES
from imagenet64_diffusion.tests.conversion.originals import (
    SMALL_PARAMS,
    small_weights,
    write_small,
)
from imagenet64_diffusion.training.components import load_model_config


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == tensor.dtype and torch.equal(one[name], tensor) for name, tensor in other.items()
    )


def test_there_and_back(original_checkpoint, converted_original, tmp_path):
    written = write_original(converted_original, tmp_path / "new" / "theirs")
    assert [file.name for file in written] == ["model_3e_2s.pkl", "model_params_3e_2s.json"]
    assert sorted(path.name for path in (tmp_path / "new" / "theirs").iterdir()) == sorted(f.name for f in written)
    assert same(torch.load(written[0], weights_only=True), original_checkpoint.state_dict)
    assert json.loads(written[1].read_text()) == original_checkpoint.params


@pytest.mark.parametrize(
    "params",
    [
        {"blk_types": ["conv", "clsAtn", "atn"]},
        {"c_dim": None},
        {"c_dim": None, "num_classes": None},
        {"beta_sched": "linear"},
    ],
)
def test_there_and_back_with_other_networks(tmp_path, params):
    convert_files(*write_small(tmp_path / "small", **params), tmp_path / "ours")
    model, written = write_original(tmp_path / "ours", tmp_path / "theirs")
    assert same(torch.load(model, weights_only=True), small_weights(**params))
    assert json.loads(written.read_text()) == {**SMALL_PARAMS, **params}


def test_what_was_trained_on_comes_back(tmp_path):
    """With the weights without effect that the conversion kept, under another step."""
    files = write_small(tmp_path / "small", blk_types=["res", "clsAtn"])
    pipeline = convert_files(*files, tmp_path / "ours").pipeline
    with torch.no_grad():
        pipeline.unet.conv_in.weight += 1
    pipeline.unet.save_pretrained(tmp_path / "ours" / "unet")
    model, params = write_original(tmp_path / "ours", tmp_path / "theirs", epoch=2, step=900)
    assert model.name == "model_2e_900s.pkl"
    before, after = torch.load(files[0], weights_only=True), torch.load(model, weights_only=True)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"unet.inConv.weight"}
    assert json.loads(params.read_text())["step"] == 900


def test_half_precision_is_written_as_float32(tmp_path):
    convert_files(*write_small(tmp_path / "small"), tmp_path / "ours", dtype="float16", variant="fp16")
    model, _ = write_original(tmp_path / "ours", tmp_path / "theirs", variant="fp16")
    rounded = {name: tensor.half().float() for name, tensor in small_weights().items()}
    assert same(torch.load(model, weights_only=True), rounded)


def faithful(folder, scheduler=None, **options):
    """A pipeline folder with a small network of the original's form that was not converted."""
    config = {
        "in_channels": 1,
        "stem_channels": 4,
        "block_out_channels": (8, 16),
        "layer_types": ("resnet", "class_attention"),
        "num_class_embeds": 3,
        "time_embed_dim": 4,
        "class_embed_dim": 4,
        "time_embedding_type": "original_interleaved",
        "class_attention_type": "identity",
        "output_head_type": "original",
    }
    unet = ClassConditionalUNet2DModel(**{**config, **options})
    scheduler = original_scheduler({"T": 1000, "beta_sched": "cosine"}) if scheduler is None else scheduler
    ClassConditionalPipeline(unet, scheduler).save_pretrained(folder)
    return unet


def test_a_network_that_was_trained_here(tmp_path):
    unet = faithful(tmp_path / "ours")
    model, params_file_ = write_original(tmp_path / "ours", tmp_path / "theirs", epoch=4, step=800)
    state_dict, params = torch.load(model, weights_only=True), json.loads(params_file_.read_text())
    assert params == {
        "inCh": 1, "embCh": 4, "chMult": 1, "num_blocks": 2, "blk_types": ["res", "clsAtn"], "T": 1000,
        "beta_sched": "cosine", "t_dim": 4, "c_dim": 4, "num_classes": 3, "atn_resolution": 16,
        "epoch": 4, "step": 800,
    }  # fmt: skip
    shapes = original_weight_shapes(params)
    assert [(name, tuple(tensor.shape)) for name, tensor in state_dict.items()] == list(shapes.items())
    assert not any(tensor.any() for name, tensor in state_dict.items() if "Q_emb" in name or "K_emb" in name)
    # and forth again
    again = convert_files(model, params_file_, tmp_path / "again", time_embedding="original_interleaved").pipeline.unet
    assert same(again.state_dict(), unet.state_dict())


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_have_the_originals_form(recipe):
    """Every faithful recipe of this package is one that goes back."""
    config = load_model_config(f"original/{recipe}")
    stem = config["stem_channels"]
    assert config["block_out_channels"] == [2 * stem, 4 * stem, 8 * stem]
    assert (config["class_attention_type"], config["output_head_type"]) == ("identity", "original")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_embedding_type": "sinusoidal"}, "time_embedding_type sinusoidal"),
        ({"class_attention_type": "channel"}, "class_attention_type channel"),
        ({"output_head_type": "conv"}, "output_head_type conv"),
        ({"block_out_channels": (8, 12)}, "are not the original's"),
        ({"block_out_channels": (2, 4)}, "are not the original's"),
        ({"scheduler": EtaDDIMScheduler(prediction_type="v_prediction")}, "prediction_type v_prediction"),
        ({"scheduler": EtaDDIMScheduler(beta_schedule="squaredcos_cap_v2")}, "another noise schedule"),
    ],
)
def test_networks_that_the_original_cannot_compute(tmp_path, options, message):
    faithful(tmp_path / "ours", **options)
    with pytest.raises(CheckpointError, match=message):
        write_original(tmp_path / "ours", tmp_path / "theirs", epoch=1, step=1)
    assert not (tmp_path / "theirs").exists()


def test_without_class_attention_its_type_says_nothing(tmp_path):
    faithful(tmp_path / "ours", layer_types=("convnext",), class_attention_type="channel")
    assert write_original(tmp_path / "ours", tmp_path / "theirs", epoch=1, step=1)[0].is_file()


def test_wrong_input(tmp_path):
    faithful(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="epoch is not given"):
        write_original(tmp_path / "ours", tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="step is -1, but must be at least 0"):
        write_original(tmp_path / "ours", tmp_path / "theirs", epoch=1, step=-1)
    with pytest.raises(CheckpointError, match="must be a pipeline folder"):
        write_original(tmp_path / "nothing", tmp_path / "theirs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pipeline"):
        write_original(tmp_path / "empty", tmp_path / "theirs")
    (tmp_path / "ours" / "original_params.json").write_text(json.dumps(SMALL_PARAMS))
    with pytest.raises(CheckpointError, match="says num_blocks 1, but the pipeline has 2"):
        write_original(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_kept_weights_of_another_network(tmp_path):
    convert_files(*write_small(tmp_path / "small", blk_types=["res", "clsAtn"]), tmp_path / "ours")
    file = tmp_path / "ours" / "original_unused_weights.safetensors"
    kept = load_file(file)
    for wrong in ({name: tensor[:1].clone() for name, tensor in kept.items()}, {"unet.out.bias": torch.zeros(2)}):
        save_file(wrong, file)
        with pytest.raises(CheckpointError, match="which is no weight without effect"):
            write_original(tmp_path / "ours", tmp_path / "theirs")
    file.write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="cannot be read"):
        write_original(tmp_path / "ours", tmp_path / "theirs")


def test_a_null_class_that_is_not_zero(tmp_path):
    unet = faithful(tmp_path / "ours")
    with torch.no_grad():
        unet.class_embedding.weight[-1] = 1
    unet.save_pretrained(tmp_path / "ours" / "unet")
    with pytest.raises(CheckpointError, match=r"the null class of .* is not zero"):
        write_original(tmp_path / "ours", tmp_path / "theirs", epoch=1, step=1)
