"""Files that are not what they say are refused in a sentence, and nothing in them runs.

The attacks are real: where Python's own pickle module would run one, the test sees to it first that it does.
"""

import copyreg
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from imagenet64_diffusion.conversion.errors import CheckpointError
from imagenet64_diffusion.conversion.original_weights import original_weight_shapes
from imagenet64_diffusion.conversion.safe_loading import load_optimizer, load_weights
from imagenet64_diffusion.tests.conversion.originals import (
    SMALL_PARAMS,
    as_archive,
    as_legacy,
    number,
    small_weights,
    state_dict,
    tensor,
    text,
    write_small,
)


SHAPES = original_weight_shapes(SMALL_PARAMS)


def load(file: Path) -> dict[str, torch.Tensor]:
    return load_weights(file, SHAPES, "params.json")


def refused(file: Path, content: bytes, message: str) -> None:
    """The file with this content is refused with a message that names it, and nothing appears beside it."""
    file.write_bytes(content)
    before = sorted(file.parent.iterdir())
    with pytest.raises(CheckpointError, match=message) as caught:
        load(file)
    assert file.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(file.parent.iterdir()) == before


# ---------------------------------------------------------------------- code


def attacks(marker: Path) -> dict[str, tuple[bytes, str, bool]]:
    """Name -> pickle, what the refusal must name, and whether Python's pickle module makes the marker."""
    command = f"touch {marker}"
    argument, short = text(command), b"\x8c" + bytes([len(command)]) + command.encode()
    evaluated = text(f"open({str(marker)!r},'w')")
    ordered, one = b"ccollections\nOrderedDict\n", tensor("0", 1, (1,), (1,))
    module = b"(" + text("module") + b"ctorch\nFloatStorage\n" + argument + argument + b"tQ"
    built = {
        "GLOBAL": (b"cposix\nsystem\n" + argument + b"\x85R", "posix.system", True),
        "GLOBAL of builtins": (b"cbuiltins\neval\n" + evaluated + b"\x85R", "eval", True),
        "GLOBAL of torch": (b"ctorch\nload\n" + argument + b"\x85R", "torch.load", False),
        "STACK_GLOBAL": (b"\x8c\x05posix\x8c\x06system\x93" + short + b"\x85R", "posix.system", True),
        "STACK_GLOBAL of two dicts": (b"}}\x93)R", "broken pickle", False),
        "INST": (b"(" + argument + b"iposix\nsystem\n", "INST", True),
        "OBJ": (b"(cposix\nsystem\n" + argument + b"o", "posix.system", True),
        "OBJ of an allowed type": (b"(" + ordered + b"o", "OBJ", False),
        "NEWOBJ": (b"csubprocess\nPopen\n)\x81", "subprocess.Popen", False),
        "NEWOBJ of an allowed type": (ordered + b")\x81", "NEWOBJ", False),
        "NEWOBJ_EX": (ordered + b")}\x92", "NEWOBJ_EX", False),
        "REDUCE of a text": (argument + argument + b"\x85R", "broken pickle", False),
        "REDUCE with arguments": (ordered + b"]\x85R", "broken pickle", False),
        "REDUCE of a storage": (b"ctorch\nFloatStorage\n)R", "broken pickle", False),
        "BUILD of a dict type": (ordered + b"}b", "sets the state", False),
        "BUILD of a function": (b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__defaults__") + b")s\x86b",
                                "sets the state", False),
        "BUILD of a tensor": (one + b"(K\x00tb", "sets the state", False),
        "PERSID": (b"Pname\n", "PERSID", False),
        "BINPERSID of a module": (module, "broken pickle", False),
        "BINPERSID of a number": (b"K\x01Q", "broken pickle", False),
        "hooks of a tensor": (one.replace(ordered + b")R", b"](K\x01e"), "describes a tensor", False),
        "EXT1": (b"\x82\xf0" + argument + b"\x85R", "EXT1", True),
        "EXT2": (b"\x83\xf0\x00" + argument + b"\x85R", "EXT2", True),
        "EXT4": (b"\x84\xf0\x00\x00\x00" + argument + b"\x85R", "EXT4", True),
    }  # fmt: skip
    return {name: (b"\x80\x04" + opcodes + b".", named, works) for name, (opcodes, named, works) in built.items()}


CONTAINERS = {"zip": as_archive, "legacy": as_legacy, "bare": bytes}


@pytest.fixture
def registered_extension():
    """Code 240 stands for os.system, as an unwise program might have it."""
    copyreg.add_extension("posix", "system", 240)
    yield
    copyreg.remove_extension("posix", "system", 240)


@pytest.mark.parametrize("name", list(attacks(Path("marker"))))
def test_nothing_runs(tmp_path, registered_extension, name):
    marker = tmp_path / "marker"
    pickled, named, works = attacks(marker)[name]
    if works:
        # what follows would prove nothing with pickles that do not work
        pickle.loads(pickled)
        marker.unlink()
    for container in CONTAINERS.values():
        refused(tmp_path / "model.pkl", container(pickled), named)
    assert not marker.exists()


def test_attributes_are_not_set(tmp_path):
    """The versions of modules that a state dict carries, or what a file has in their place, are left out."""
    attributes = b"}" + text("items") + b"K\x01sb"
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R" + attributes + b"."
    refused(tmp_path / "model.pkl", as_archive(pickled), "does not belong to params.json.* missing")


def test_attack_hidden_among_weights(tmp_path):
    marker = tmp_path / "marker"
    attack = b"cposix\nsystem\n" + text(f"touch {marker}") + b"\x85R"
    pickled = state_dict(good=tensor("0", 1, (1,), (1,)), bad=attack)
    for content in (as_archive(pickled, {"data/0": bytes(4)}), as_legacy(pickled, {"0": (1, bytes(4))})):
        refused(tmp_path / "model.pkl", content, "wants posix.system")
    # and in the pickles around that of the older format
    for position in range(3):
        pieces = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {})]
        pieces[position] = b"\x80\x02" + attack + b"."
        refused(tmp_path / "model.pkl", b"".join(pieces), "wants posix.system")
    assert not marker.exists()


class WholeModel(torch.nn.Linear):
    """A model that was saved instead of its state dict."""


@pytest.mark.parametrize("new_format", [True, False])
def test_whole_model(tmp_path, new_format):
    torch.save(WholeModel(2, 2), tmp_path / "made.pkl", _use_new_zipfile_serialization=new_format)
    refused(tmp_path / "model.pkl", (tmp_path / "made.pkl").read_bytes(), "WholeModel.*state dict alone")


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_torchscript(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "made.pt"))
    refused(tmp_path / "model.pkl", (tmp_path / "made.pt").read_bytes(), "TorchScript archive, which holds code")


# ---------------------------------------------------------------------- files of other kinds, and broken ones


def small_file(folder: Path, legacy=False) -> bytes:
    return write_small(folder / "whole", legacy=legacy)[0].read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><title>Download warning</title></html>", "is a web page"),
        (b"\xef\xbb\xbf \n<HTML><body>404</body></HTML>", "is a web page"),
        (b"version https://git-lfs/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (json.dumps(SMALL_PARAMS).encode(), "is a JSON file"),
        (safetensors.torch.save({"a": torch.zeros(2)}), "is a safetensors file"),
        (b"\x1f\x8b\x08\x00" + bytes(30), "is gzip-compressed"),
        (b"\x93NUMPY" + bytes(30), "is no file of torch.save"),
        (b"hello", "is no file of torch.save"),
        (pickle.dumps([1, 2], 0), "is no file of torch.save"),
        (pickle.dumps([1, 2], 2), "torch.save did not write it"),
        (b"\x80\x02\xff.", "opcode 0xff"),
        (b"\x80\x02", "broken pickle"),
        (b"\x80\x02X\xff\xff\xff\xffab", "broken pickle"),
        (b"\x80\x02cposix", "broken pickle|wants posi"),
        (b"\x80\x02h\x05.", "broken pickle"),
        (b"\x80\x02(.", "broken pickle"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", "broken pickle"),
        (b"\x80\x02K\x01K\x01s.", "broken pickle"),
        (b"\x80\x02K\x01K\x02.", "torch.save did not write it"),
    ],
)
def test_other_kinds(tmp_path, content, message):
    refused(tmp_path / "model.pkl", content, message)


def test_numpy_archive(tmp_path):
    np.savez(tmp_path / "made.npz", a=np.zeros(3))
    refused(tmp_path / "model.pkl", (tmp_path / "made.npz").read_bytes(), "is a zip file, but no checkpoint")


def test_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        load(tmp_path / "nothing.pkl")
    with pytest.raises(CheckpointError, match="is a folder"):
        load(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_cut_off_anywhere(tmp_path, legacy):
    content = small_file(tmp_path, legacy)
    for length in np.linspace(1, len(content) - 1, 12).astype(int):
        refused(tmp_path / "model.pkl", content[:length], "cut off|download or copy it again|begins with")


def test_a_flipped_bit(tmp_path):
    content = bytearray(small_file(tmp_path))
    with zipfile.ZipFile(tmp_path / "whole" / "model_1e_7s.pkl") as archive:
        offset = next(info.header_offset for info in archive.infolist() if info.filename.endswith("/data/3"))
    name_length, extra_length = struct.unpack("<HH", content[offset + 26 : offset + 30])
    content[offset + 30 + name_length + extra_length] ^= 1
    refused(tmp_path / "model.pkl", bytes(content), "damaged .wrong checksum of .*data/3")


def test_zip_bombs(tmp_path):
    million = bytes(1_000_000)
    pickled = state_dict(a=tensor("0", 250_000, (250_000,), (1,)))
    file = tmp_path / "model.pkl"
    refused(file, as_archive(pickled, {"data/0": million}, zipfile.ZIP_DEFLATED), "compressed.*zip bomb")
    refused(file, as_archive(b"\x80\x02" + b"N0" * 10_000_000 + b"N."), "a pickle of 20,000,004 bytes")
    # two names for one stretch of the file
    content = bytearray(as_archive(pickled, {"data/0": million, "data/1": b""}))
    first, second = (content.rfind(b"archive/data/%d" % index) - 46 for index in (0, 1))
    content[second + 16 : second + 28] = content[first + 16 : first + 28]
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    refused(file, bytes(content), "overlap")
    # a directory that is claimed to be enormous
    content = bytearray(as_archive(pickled))
    content[-10:-6] = struct.pack("<I", 1 << 30)
    refused(file, bytes(content), "zip directory of 1,073,741,824 bytes")


def test_zip_of_strange_shape(tmp_path):
    pickled = state_dict(a=tensor("0", 1, (1,), (1,)))
    file = tmp_path / "model.pkl"
    with zipfile.ZipFile(tmp_path / "twice", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
    refused(file, (tmp_path / "twice").read_bytes(), "no checkpoint")
    with zipfile.ZipFile(tmp_path / "roots", "w") as archive:
        for root in ("one", "two"):
            archive.writestr(f"{root}/data.pkl", pickled)
    refused(file, (tmp_path / "roots").read_bytes(), "no checkpoint")
    refused(file, as_archive(pickled, {"byteorder": b"big"}), "big-endian")
    refused(file, as_archive(state_dict()), "does not belong to params.json.* missing")


# ---------------------------------------------------------------------- bombs inside the pickle


def all_weights_as(describe) -> bytes:
    """A state dict of every name, each described by ``describe(shape)``."""
    return state_dict(**{name: describe(shape) for name, shape in SHAPES.items()})


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape).stride()


def test_sizes_that_do_not_exist(tmp_path):
    file, huge = tmp_path / "model.pkl", 2**45
    one = state_dict(a=tensor("0", huge, (huge,), (1,)))
    refused(file, as_archive(one, {"data/0": bytes(4)}), "storage '0' has 140,737,488,355,328 bytes, but holds 4")
    name, shape = next(iter(SHAPES.items()))

    def with_first(described: bytes) -> bytes:
        entries = {key: tensor(key, 10_000, length, strides(length)) for key, length in SHAPES.items()}
        return state_dict(**{**entries, name: described})

    claimed = with_first(tensor("0", huge, shape, strides(shape)))
    refused(file, as_archive(claimed, {"data/0": bytes(4)}), "storage '0' has .* bytes, but holds 4")
    refused(file, as_archive(claimed), "storage '0' has .* but lacks")
    tracemalloc.start()
    everything = {key: (10_000, bytes(40_000)) for key in list(SHAPES)[1:]}
    refused(file, as_legacy(claimed, {"0": (huge, bytes(4)), **everything}), "cut off")
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    two_lengths = {"0": (9_999, bytes(40_000)), **everything}
    refused(file, as_legacy(with_first(tensor("0", 10_000, shape, strides(shape))), two_lengths), "states two lengths")
    refused(file, as_legacy(claimed, everything), "lists other storages")


def test_more_than_is_stored(tmp_path):
    file = tmp_path / "model.pkl"
    repeated = state_dict(a=tensor("0", 1, (2**20, 2**20), (0, 0)))
    refused(file, as_archive(repeated, {"data/0": bytes(4)}), "stores 1 elements for it")
    beyond = state_dict(a=tensor("0", 4, (2, 2), (3, 1)))
    refused(file, as_archive(beyond, {"data/0": bytes(16)}), "stores 4 elements for it")
    negative = state_dict(a=tensor("0", 4, (2,), (-1,)))
    refused(file, as_archive(negative, {"data/0": bytes(16)}), "in a way that torch.save does not")
    largest = max(torch.Size(shape).numel() for shape in SHAPES.values())
    shared = all_weights_as(lambda shape: tensor("0", largest, shape, strides(shape)))
    refused(file, as_archive(shared, {"data/0": bytes(4 * largest)}), "its tensors share memory")
    twice = state_dict(a=tensor("0", 1, (1,), (1,)), b=tensor("0", 1, (1,), (1,), "HalfStorage"))
    refused(file, as_archive(twice, {"data/0": bytes(4)}), "describes the storage '0' twice")


def test_bombs_of_time_and_memory(tmp_path):
    file = tmp_path / "model.pkl"
    # a tuple of itself, forty times over: hashing it takes 2^40 steps
    nested = b"K\x01\x85q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(40))
    refused(file, as_archive(b"\x80\x02}" + nested + b"K\x01s."), "neither a name nor the number")
    value = b"\x80\x02}" + text("a") + nested + b"s."
    refused(file, as_archive(value), "'a', a tuple")
    refused(file, as_archive(b"\x80\x02]" + b"2" * 100_000 + b"."), "opcode DUP")
    refused(file, as_archive(b"\x80\x02N0."), "opcode POP")
    refused(file, as_archive(b"\x80\x02\x8b\xff\xff\xff\x7f."), "opcode LONG4")
    refused(file, as_archive(b"\x80\x02B\xff\xff\xff\xff."), "opcode BINBYTES")
    refused(file, as_archive(b"\x80\x02}(" + number(2**40) + b"Nu."), "neither a name nor the number")
    refused(file, as_archive(b"\x80\x02Nr\xff\xff\xff\xff."), "holds a NoneType")
    refused(file, as_archive(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."), "holds a list")
    refused(file, as_archive(b"\x80\x02}(" + text("a") + b"N" + text("a") + b"Nu."), "names 'a' twice")


# ---------------------------------------------------------------------- weights that are not the network's


def refused_weights(tmp_path: Path, weights: object, message: str) -> None:
    for new_format in (True, False):
        torch.save(weights, tmp_path / "made", _use_new_zipfile_serialization=new_format)
        content = (tmp_path / "made").read_bytes()
        (tmp_path / "made").unlink()
        refused(tmp_path / "model.pkl", content, message)


def test_other_weights(tmp_path):
    weights = small_weights()
    name = "unet.downBlocks.0.block.0.block.0.weight"
    without = {key: value for key, value in weights.items() if key != name}
    refused_weights(tmp_path, without, f"{name} missing")
    refused_weights(tmp_path, {**without, "a.b": weights[name]}, f"{name} missing, a.b unknown")
    refused_weights(tmp_path, {**weights, "a.b": weights[name]}, "a.b unknown")
    refused_weights(tmp_path, {}, "unet.inConv.weight and .* more weights missing")
    refused_weights(
        tmp_path, {**weights, name: weights[name][:-1].clone()}, rf"{name} has shape .*must have \(4, 1, 7, 7\)"
    )
    refused_weights(tmp_path, small_weights(embCh=8), "unet.inConv.weight has shape")
    refused_weights(tmp_path, {**weights, "module.x": weights[name]}, "module.x unknown")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_are_no_weights(tmp_path, dtype):
    weights = {key: value.to(dtype) for key, value in small_weights().items()}
    refused_weights(tmp_path, weights, r"wants torch\.\w+Storage, which weights do not need")


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "holds NaN"), (float("-inf"), "holds infinite numbers")]
)
def test_numbers_that_are_none(tmp_path, value, message):
    weights = small_weights()
    weights["unet.out.bias"][1] = value
    refused_weights(tmp_path, weights, f"unet.out.bias {message}")


def test_what_is_no_state_dict(tmp_path):
    weights = small_weights()
    refused_weights(tmp_path, {"model": weights, "epoch": 3}, "'model', a StateDict")
    refused_weights(tmp_path, {**weights, "step": 3}, "'step', a int")
    refused_weights(tmp_path, {0: weights["unet.out.bias"]}, "holds 0, a StoredTensor")
    refused_weights(tmp_path, list(weights.values()), "holds a list")
    refused_weights(tmp_path, weights["unet.out.bias"], "holds a StoredTensor|holds a tensor")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    refused_weights(tmp_path, optimizer.state_dict(), "holds an optimizer's state")


# ---------------------------------------------------------------------- files that are right


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_prefixes_and_formats(tmp_path, legacy, prefix):
    weights = small_weights()
    prefixed = {prefix + name: value for name, value in reversed(weights.items())}
    loaded = load(write_small(tmp_path / "small", prefixed, legacy)[0])
    assert list(loaded) == list(weights)
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_views_parameters_and_half_precision(tmp_path):
    weights = small_weights()
    whole = torch.arange(40.0)
    saved = {name: torch.nn.Parameter(value.half()) for name, value in weights.items()}
    saved["unet.out.bias"] = whole[10:14:2]  # stored with all that it is a part of
    saved["unet.inConv.weight"] = weights["unet.inConv.weight"].to(memory_format=torch.channels_last)
    loaded = load(write_small(tmp_path / "small", saved)[0])
    assert loaded["unet.out.bias"].tolist() == [10.0, 12.0]
    assert torch.equal(loaded["unet.inConv.weight"], weights["unet.inConv.weight"])
    assert loaded["unet.out.weight"].dtype == torch.float16
    assert not any(value.requires_grad for value in loaded.values())


@pytest.mark.parametrize("legacy", [False, True])
def test_saved_on_a_gpu(tmp_path, legacy):
    """The place is written beside each storage; here everything goes to the CPU."""
    file = write_small(tmp_path / "small", legacy=legacy)[0]
    if legacy:
        content = file.read_bytes().replace(text("cpu"), text("cuda:0"))
    else:
        with zipfile.ZipFile(file) as archive:
            members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        pickled = members.pop("data.pkl").replace(text("cpu"), text("cuda:0"))
        content = as_archive(pickled, {name: value for name, value in members.items() if name != "version"})
    assert b"cuda:0" in content
    file.write_bytes(content)
    assert all(torch.equal(value, small_weights()[name]) for name, value in load(file).items())


# ---------------------------------------------------------------------- optimizers


def optimizer_state(**group) -> dict:
    parameters = [torch.nn.Parameter(value) for value in small_weights().values()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0].update(group)
    return state


def change(place: str, value: object) -> dict:
    state = optimizer_state()
    state["state"][3][place] = value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (small_weights, "does not hold an optimizer's state"),
        (lambda: {**optimizer_state(), "more": 1}, "does not hold an optimizer's state"),
        (lambda: {**optimizer_state(), "param_groups": []}, "one group of parameters"),
        (lambda: optimizer_state(params=[0, 1]), "another network: the model has"),
        (lambda: optimizer_state(amsgrad=True), "amsgrad"),
        (lambda: optimizer_state(lr="fast"), "hyper-parameters of its group"),
        (lambda: optimizer_state(betas=(0.9, 1.5)), "hyper-parameters of its group"),
        (lambda: optimizer_state(weight_decay=None), "hyper-parameters of its group"),
        (lambda: change("exp_avg", torch.zeros(3)), r"exp_avg of parameter 3 is \(3,\)"),
        (lambda: change("exp_avg", None), "exp_avg of parameter 3 is NoneType"),
        (lambda: change("more", torch.zeros(3)), "must have step, exp_avg and exp_avg_sq"),
        (lambda: change("step", torch.zeros(2)), "parameter 3: its step must be a number"),
        (lambda: change("step", torch.tensor(float("inf"))), "parameter 3: its step must be a number"),
        (lambda: change("exp_avg", torch.full((4,), torch.nan)), "exp_avg of parameter 3 holds NaN"),
        (lambda: change("exp_avg_sq", torch.full((4,), -1.0)), "exp_avg_sq of parameter 3 is negative"),
        (lambda: {**optimizer_state(), "state": {999: {}}}, "parameter 999 does not exist"),
    ],
)
def test_other_optimizers(tmp_path, state, message):
    torch.save(state(), tmp_path / "optim.pkl")
    with pytest.raises(CheckpointError, match=message):
        load_optimizer(tmp_path / "optim.pkl", SHAPES)
    assert os.listdir(tmp_path) == ["optim.pkl"]  # noqa: PTH208


@pytest.mark.parametrize("legacy", [False, True])
def test_a_right_optimizer(tmp_path, legacy):
    state = optimizer_state()
    torch.save(state, tmp_path / "optim.pkl", _use_new_zipfile_serialization=not legacy)
    loaded = load_optimizer(tmp_path / "optim.pkl", SHAPES)
    assert all(state["param_groups"][0][key] == value for key, value in loaded["param_groups"][0].items())
    assert torch.equal(loaded["state"][3]["exp_avg"], state["state"][3]["exp_avg"])
