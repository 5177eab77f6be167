"""The JSON beside a checkpoint: what it must hold, and what is refused."""

import json

import pytest
import torch

from imagenet64_diffusion.conversion.errors import CheckpointError
from imagenet64_diffusion.conversion.original_params import read_params, unknown_params
from imagenet64_diffusion.conversion.original_weights import build_empty_unet, original_weight_shapes
from imagenet64_diffusion.tests.conversion.originals import SMALL_PARAMS, params_file


def read(tmp_path, content):
    file = tmp_path / "model_params.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_params(file)


def test_original_files(original_checkpoint):
    assert read_params(params_file(original_checkpoint.recipe)) == original_checkpoint.params
    assert unknown_params(original_checkpoint.params) == []


def test_shapes_are_those_of_the_original_in_its_order(original_checkpoint):
    shapes = original_weight_shapes(original_checkpoint.params)
    found = [(name, tuple(tensor.shape)) for name, tensor in original_checkpoint.state_dict.items()]
    assert list(shapes.items()) == found
    assert sum(map(torch.Size.numel, map(torch.Size, shapes.values()))) > 100_000


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("class_dim", [None, -1])
def test_no_classes(tmp_path, class_dim, num_classes):
    params = read(tmp_path, {**SMALL_PARAMS, "c_dim": class_dim, "num_classes": num_classes})
    assert params["c_dim"] is None
    assert not [name for name in original_weight_shapes(params) if "c_emb" in name or "clsProj" in name]


def test_older_and_newer_files(tmp_path):
    older = {name: value for name, value in SMALL_PARAMS.items() if name not in ("atn_resolution", "epoch", "step")}
    assert read(tmp_path, older) == older
    assert unknown_params(read(tmp_path, {**older, "remark": "x"})) == ["remark"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"T": ' + b"9" * 10_000 + b"}", "is not JSON"),
        (b" " * (1 << 21), "has 2,097,152 bytes"),
        ([], "holds a list"),
        ({}, "lacks inCh, embCh"),
        ({name: value for name, value in SMALL_PARAMS.items() if name != "T"}, "lacks T"),
        ({**SMALL_PARAMS, "embCh": "128"}, "embCh is '128', but must be a whole number"),
        ({**SMALL_PARAMS, "embCh": 128.0}, "embCh is 128.0"),
        ({**SMALL_PARAMS, "embCh": True}, "embCh is True"),
        ({**SMALL_PARAMS, "embCh": None}, "embCh is None"),
        ({**SMALL_PARAMS, "num_classes": None}, "num_classes is None"),
        ({**SMALL_PARAMS, "inCh": 0}, "inCh is 0, but must be a whole number in"),
        ({**SMALL_PARAMS, "T": 10**9}, "T is 1000000000"),
        ({**SMALL_PARAMS, "T": float("inf")}, "T is inf"),
        ({**SMALL_PARAMS, "num_blocks": 7}, "num_blocks is 7"),
        ({**SMALL_PARAMS, "embCh": 16_384, "num_blocks": 6}, "makes 1,048,576 channels"),
        ({**SMALL_PARAMS, "step": -1}, "step is -1"),
        ({**SMALL_PARAMS, "c_dim": "none"}, "c_dim is 'none'"),
        ({**SMALL_PARAMS, "c_dim": 0}, "c_dim is 0"),
        ({**SMALL_PARAMS, "blk_types": "res"}, "must be a list"),
        ({**SMALL_PARAMS, "blk_types": []}, "must be a list"),
        ({**SMALL_PARAMS, "blk_types": ["res"] * 65}, "must be a list"),
        ({**SMALL_PARAMS, "blk_types": ["res", "swin"]}, "blk_types is .*, but must be made of res, conv.*'swin'"),
        ({**SMALL_PARAMS, "blk_types": ["res", {}]}, "but must be made of .* not {}"),
        ({**SMALL_PARAMS, "beta_sched": "sigmoid"}, "beta_sched is 'sigmoid', but must be one of cosine, linear"),
        ({**SMALL_PARAMS, "beta_sched": ["x" * 500]}, r"\.\.\.x+'\], but must be one of"),
    ],
)
def test_wrong_files(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, content)
    assert "model_params.json" in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"blk_types": ["chnAtn"]}, "begins with 'channel_attention'"),
        ({"blk_types": ["res", "clsAtn"], "c_dim": None}, "'class_attention', which needs classes"),
        ({"blk_types": ["res", "atn"], "atn_resolution": 24}, "attention_patch_size is 24"),
    ],
)
def test_networks_that_do_not_exist(tmp_path, params, message):
    with pytest.raises(CheckpointError, match=f"params.json describes no network: .*{message}"):
        build_empty_unet(read(tmp_path, {**SMALL_PARAMS, **params}), params_name="params.json")


def test_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_params(tmp_path / "nothing.json")
