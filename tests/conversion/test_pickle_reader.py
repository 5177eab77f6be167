"""Files that are not what they say are refused in a sentence, and nothing in them runs.

The attacks are real: where Python's own pickle module would run one, the test sees to it first that it does.
"""

import copyreg
import io
import json
import pickle
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from imagenet64_diffusion.conversion.pickle_reader import (
    CheckpointError,
    load_optimizer,
    load_tensors,
    read_checkpoint,
    read_state_dict,
)
from imagenet64_diffusion.tests.conversion.originals import (
    SMALL_PARAMS,
    as_archive,
    as_legacy,
    number,
    original_weight_shapes,
    small_weights,
    state_dict,
    tensor,
    text,
    write_small,
)


SHAPES, WEIGHTS = original_weight_shapes(SMALL_PARAMS), small_weights()
BROKEN = "download or copy it again"


def load_state_dict(file: Path, shapes: dict, whose: str) -> dict[str, torch.Tensor]:
    return load_tensors(file.name, read_state_dict(file.name, read_checkpoint(file)), shapes, whose)


def refused(folder: Path, content: bytes, message: str, load=load_state_dict) -> None:
    """A file with this content is refused with a message that names it, and nothing appears beside it."""
    (folder / "model.pkl").write_bytes(content)
    before = sorted(folder.iterdir())
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder / "model.pkl", SHAPES, *["params.json"] * (load is load_state_dict))
    assert re.fullmatch(r".{0,400}model\.pkl.{0,400}", str(caught.value))
    assert sorted(folder.iterdir()) == before


def saved(value: object, new_format: bool = True) -> bytes:
    """The content of a file of torch.save."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=new_format)
    return buffer.getvalue()


def attacks(marker: Path) -> dict[str, tuple[bytes, str, bool]]:
    """Name -> pickle, what the refusal must name, and whether Python's pickle module makes the marker."""
    command = f"touch {marker}"
    argument, short = text(command), b"\x8c" + bytes([len(command)]) + command.encode()
    ordered, one = b"ccollections\nOrderedDict\n", tensor("0", 1, (1,), (1,))
    module = b"(" + text("module") + b"ctorch\nFloatStorage\n" + argument + argument + b"tQ"
    defaults = b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__defaults__") + b")s\x86b"
    built = {
        "GLOBAL": (b"cposix\nsystem\n" + argument + b"\x85R", "posix.system", True),
        "STACK_GLOBAL": (b"\x8c\x05posix\x8c\x06system\x93" + short + b"\x85R", "posix.system", True),
        "STACK_GLOBAL of two dicts": (b"}}\x93)R", "cannot be read", False),
        "INST": (b"(" + argument + b"iposix\nsystem\n", "INST", True),
        "OBJ": (b"(cposix\nsystem\n" + argument + b"o", "posix.system", True),
        "OBJ of an allowed type": (b"(" + ordered + b"o", "OBJ", False),
        "NEWOBJ of an allowed type": (ordered + b")\x81", "NEWOBJ", False),
        "NEWOBJ_EX": (ordered + b")}\x92", "NEWOBJ_EX", False),
        "REDUCE with arguments": (ordered + b"]\x85R", "cannot be read", False),
        "REDUCE of a storage": (b"ctorch\nFloatStorage\n)R", "cannot be read", False),
        "BUILD of a dict type": (ordered + b"}b", "sets the state", False),
        "BUILD of a function": (defaults, "sets the state", False),
        "BUILD of a tensor": (one + b"(K\x00tb", "sets the state", False),
        "BUILD of a state dict": (ordered + b")R}" + text("items") + b"K\x01sb", "model.pkl", False),
        "PERSID": (b"Pname\n", "PERSID", False),
        "BINPERSID of a module": (module, "cannot be read", False),
        "BINPERSID of a number": (b"K\x01Q", "cannot be read", False),
        "hooks of a tensor": (one.replace(ordered + b")R", b"](K\x01e"), "describes a tensor", False),
        "EXT1": (b"\x82\xf0" + argument + b"\x85R", "EXT1", True),
        "EXT2": (b"\x83\xf0\x00" + argument + b"\x85R", "EXT2", True),
        "EXT4": (b"\x84\xf0\x00\x00\x00" + argument + b"\x85R", "EXT4", True),
        "hidden among weights": (
            state_dict(good=one, bad=b"cposix\nsystem\n" + argument + b"\x85R")[2:-1], "posix.system", True
        ),
    }  # fmt: skip
    return {name: (b"\x80\x04" + opcodes + b".", named, works) for name, (opcodes, named, works) in built.items()}


@pytest.fixture
def registered_extension():
    """Code 240 stands for os.system, as an unwise program might have it."""
    copyreg.add_extension("posix", "system", 240)
    yield
    copyreg.remove_extension("posix", "system", 240)


@pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning")
@pytest.mark.parametrize("name", list(attacks(Path("marker"))))
def test_nothing_runs(tmp_path, registered_extension, name):
    marker = tmp_path / "marker"
    pickled, named, works = attacks(marker)[name]
    if works:
        # what follows would prove nothing with pickles that do not work
        unpickler = type("Unpickler", (pickle.Unpickler,), {"persistent_load": lambda self, _: torch.FloatStorage(1)})
        unpickler(io.BytesIO(pickled)).load()
        marker.unlink()
    for container in (as_archive, as_legacy, bytes):
        refused(tmp_path, container(pickled), named)
    # and in the pickles around that of the older format
    for position in range(3):
        pieces = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {})]
        refused(tmp_path, b"".join([*pieces[:position], pickled, *pieces[position + 1 :]]), "model.pkl")
    assert not marker.exists()


class WholeModel(torch.nn.Linear):
    """A model that was saved instead of its state dict."""


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_whole_models(tmp_path):
    for new_format in (True, False):
        refused(tmp_path, saved(WholeModel(2, 2), new_format), "WholeModel.*state dict alone")
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "made.pt"))
    refused(tmp_path, (tmp_path / "made.pt").read_bytes(), "holds made/code")


# a tuple of itself, forty times over: hashing it takes 2^40 steps
NESTED = b"K\x01\x85q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(40))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", BROKEN),
        (b"<!DOCTYPE html><html><title>Download warning</title></html>", "is a web page"),
        (b"\xef\xbb\xbf \n<HTML><body>404</body></HTML>", "is a web page"),
        (b"version https://git-lfs/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (json.dumps(SMALL_PARAMS).encode(), "is a JSON file"),
        (safetensors.torch.save({"a": torch.zeros(2)}), "is a safetensors file"),
        (b"\x1f\x8b\x08\x00" + bytes(30), "is no file of torch.save"),
        (pickle.dumps([1, 2], 0), "is no file of torch.save"),
        (pickle.dumps([1, 2], 2), "not as torch.save writes it"),
        (b"\x80\x02\xff.", "opcode 0xff"),
        (b"\x80\x02", BROKEN),
        (b"\x80\x02X\xff\xff\xff\xffab", BROKEN),
        (b"\x80\x02cposix", f"{BROKEN}|wants posi"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", BROKEN),
        *(
            (as_archive(b"\x80\x02" + opcodes + b"."), message)
            for opcodes, message in (
                # bombs of time and memory
                (b"}" + NESTED + b"K\x01s", "neither a name nor the number"),
                (b"}" + text("a") + NESTED + b"s", "a is a tuple"),
                (b"]" + b"2" * 100_000, "opcode DUP"),
                (b"N0", "opcode POP"),
                (b"\x8b\xff\xff\xff\x7f", "opcode LONG4"),
                (b"B\xff\xff\xff\xff", "opcode BINBYTES"),
                (b"}(" + number(2**40) + b"Nu", "neither a name nor the number"),
                (b"Nr\xff\xff\xff\xff", "holds a NoneType"),
                (b"]" * 100_000 + b"a" * 99_999, "holds a list"),
                (b"}(" + text("a") + b"N" + text("a") + b"Nu", "names 'a' twice"),
            )
        ),
    ],
)
def test_other_kinds(tmp_path, content, message):
    refused(tmp_path, content, message)


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files(tmp_path, legacy):
    content = saved(WEIGHTS, not legacy)
    for length in np.linspace(1, len(content) - 1, 12).astype(int):
        refused(tmp_path, content[:length], f"{BROKEN}|begins with")
    if not legacy:
        flipped = bytearray(content)
        flipped[content.index(WEIGHTS["unet.out.weight"].numpy().tobytes())] ^= 1
        refused(tmp_path, bytes(flipped), "wrong checksum of .*data/")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_strange_zips(tmp_path):
    million = bytes(1_000_000)
    pickled = state_dict(a=tensor("0", 250_000, (250_000,), (1,)))
    refused(tmp_path, as_archive(pickled, {"data/0": million}, zipfile.ZIP_DEFLATED), "compressed.*zip bomb")
    refused(tmp_path, as_archive(b"\x80\x02" + b"N0" * 10_000_000 + b"N."), "a pickle of 20,000,004 bytes")
    # two names for one stretch of the file
    content = bytearray(as_archive(pickled, {"data/0": million, "data/1": b""}))
    first, second = (content.rfind(b"archive/data/%d" % index) - 46 for index in (0, 1))
    content[second + 16 : second + 28] = content[first + 16 : first + 28]
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    refused(tmp_path, bytes(content), "overlap")
    # a directory that is claimed to be enormous
    content = bytearray(as_archive(pickled))
    content[-10:-6] = struct.pack("<I", 1 << 30)
    refused(tmp_path, bytes(content), "zip directory of 1,073,741,824 bytes")
    for names in (["archive/data.pkl"] * 2, ["one/data.pkl", "two/data.pkl"], ["a.npy"]):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in names:
                archive.writestr(name, pickled)
        refused(tmp_path, buffer.getvalue(), "is a zip file, but no checkpoint")
    refused(tmp_path, as_archive(pickled, {"byteorder": b"big"}), "big-endian")
    refused(tmp_path, as_legacy(state_dict()).replace(b"\x88", b"\x89", 1), "big-endian")


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape).stride()


def test_sizes_that_do_not_exist(tmp_path):
    huge = 2**45
    one = state_dict(a=tensor("0", huge, (huge,), (1,)))
    refused(tmp_path, as_archive(one, {"data/0": bytes(4)}), "'0' has 140,737,488,355,328 bytes, but it holds 4")
    refused(tmp_path, as_archive(one), "storage '0' has .* but it is missing")
    entries = {key: tensor(key, 10_000, length, strides(length)) for key, length in SHAPES.items()}
    name, shape = next(iter(SHAPES.items()))
    everything = {key: (10_000, bytes(40_000)) for key in list(SHAPES)[1:]}
    claimed = state_dict(**{**entries, name: tensor("0", huge, shape, strides(shape))})
    tracemalloc.start()
    refused(tmp_path, as_legacy(claimed, {"0": (huge, bytes(4)), **everything}), "does not hold .* cut off")
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    two_lengths = state_dict(**{**entries, name: tensor("0", 10_000, shape, strides(shape))})
    refused(tmp_path, as_legacy(two_lengths, {"0": (9_999, bytes(40_000)), **everything}), "does not hold the 40,000")
    refused(tmp_path, as_legacy(claimed, everything), "lists other storages")


def test_more_than_is_stored(tmp_path):
    largest = max(torch.Size(shape).numel() for shape in SHAPES.values())
    for described, message in {
        lambda shape: tensor("0", largest, shape, strides(shape)): "its tensors share memory",
        lambda shape: tensor("0", 1, shape, (0,) * len(shape)): "takes more than is stored",
        lambda shape: tensor("0", 1, shape, strides(shape)): "stores 1 elements for a shape of",
        lambda shape: tensor("0", largest, shape, (-1,) * len(shape)): "in a way that torch.save does not",
    }.items():
        pickled = state_dict(**{name: described(shape) for name, shape in SHAPES.items()})
        stored = 4 if b"K\x01tQ" in pickled else 4 * largest
        refused(tmp_path, as_archive(pickled, {"data/0": bytes(stored)}), message)
    twice = state_dict(a=tensor("0", 1, (1,), (1,)), b=tensor("0", 1, (1,), (1,), "HalfStorage"))
    refused(tmp_path, as_archive(twice, {"data/0": bytes(4)}), "describes the storage '0' twice")


NAME = "unet.downBlocks.0.block.0.block.0.weight"
WITHOUT = {key: value for key, value in WEIGHTS.items() if key != NAME}


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (WITHOUT, f"lacks {NAME}"),
        ({**WEIGHTS, "a.b": WEIGHTS[NAME]}, "has the unknown a.b"),
        ({**WEIGHTS, "module.x": WEIGHTS[NAME]}, "unknown module.x"),
        ({}, "lacks unet.inConv.weight and .* more"),
        ({**WEIGHTS, NAME: WEIGHTS[NAME][:-1].clone()}, rf"{NAME} has shape .*must have \(4, 1, 7, 7\)"),
        (small_weights(embCh=8), "unet.inConv.weight has shape"),
        ({**WEIGHTS, "unet.out.bias": torch.tensor([0.0, torch.nan])}, "unet.out.bias holds NaN or infinite"),
        ({**WEIGHTS, "unet.out.bias": torch.tensor([0.0, -torch.inf])}, "unet.out.bias holds NaN or infinite"),
        ({key: value.to(torch.int64) for key, value in WEIGHTS.items()}, r"wants torch\.LongStorage, which weights"),
        ({"model": WEIGHTS, "epoch": 3}, "model is a StateDict"),
        ({0: WEIGHTS[NAME]}, "lacks"),
        (list(WEIGHTS.values()), "holds a list"),
        (WEIGHTS[NAME], "holds a StoredTensor"),
        (torch.optim.AdamW([torch.zeros(1)]).state_dict(), "state is a StateDict"),
    ],
)
def test_other_weights(tmp_path, weights, message, new_format):
    refused(tmp_path, saved(weights, new_format), message)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_prefixes_and_formats(tmp_path, legacy, prefix):
    prefixed = {prefix + name: value for name, value in reversed(WEIGHTS.items())}
    file = write_small(tmp_path / "small", prefixed, legacy)[0]
    if legacy:
        # as if saved on a GPU; here everything goes to the CPU
        file.write_bytes(file.read_bytes().replace(text("cpu"), text("cuda:0")))
    loaded = load_state_dict(file, SHAPES, "params.json")
    assert list(loaded) == list(WEIGHTS)
    assert all(torch.equal(loaded[name], value) for name, value in WEIGHTS.items())


def test_views_parameters_and_half_precision(tmp_path):
    weights = {name: torch.nn.Parameter(value.half()) for name, value in WEIGHTS.items()}
    weights["unet.out.bias"] = torch.arange(40.0)[10:14:2]  # stored with all that it is a part of
    weights["unet.inConv.weight"] = WEIGHTS["unet.inConv.weight"].to(memory_format=torch.channels_last)
    loaded = load_state_dict(write_small(tmp_path / "small", weights)[0], SHAPES, "params.json")
    assert loaded["unet.out.bias"].tolist() == [10.0, 12.0]
    assert torch.equal(loaded["unet.inConv.weight"], WEIGHTS["unet.inConv.weight"])
    assert loaded["unet.out.weight"].dtype == torch.float16
    assert not any(value.requires_grad for value in loaded.values())


def optimizer_state(entry=None, **group) -> dict:
    """Of an AdamW after a step; ``entry`` changes the state of a parameter, ``group`` its group of parameters."""
    parameters = [value.clone().requires_grad_() for value in WEIGHTS.values()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4)
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][3].update(entry or {})
    state["param_groups"][0].update(group)
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (WEIGHTS, "does not hold an optimizer's state"),
        ({**optimizer_state(), "param_groups": []}, "an AdamW.s with one group"),
        (optimizer_state(params=[0, 1]), "another network: the model has"),
        (optimizer_state(amsgrad=True), "amsgrad"),
        (optimizer_state(lr="fast"), "hyper-parameters of its group"),
        (optimizer_state(weight_decay=None), "hyper-parameters of its group"),
        *(
            (optimizer_state(entry), rf"\(parameter 3\).*{message}")
            for entry, message in (
                ({"exp_avg": torch.zeros(3)}, r"exp_avg has shape \(3,\)"),
                ({"exp_avg": None}, "exp_avg is a NoneType"),
                ({"more": torch.zeros(3)}, "unknown more"),
                ({"step": torch.zeros(2)}, "step has shape"),
                ({"step": torch.tensor(torch.inf)}, "step holds NaN or infinite"),
                ({"step": torch.tensor(0.0)}, "step must be at least 1"),
                ({"exp_avg": torch.full((4,), torch.nan)}, "exp_avg holds NaN"),
                ({"exp_avg_sq": torch.full((4,), -1.0)}, "exp_avg_sq must be at least 0"),
            )
        ),
        ({**optimizer_state(), "state": {999: {}}}, "optimizer of another network"),
        ({**optimizer_state(), "state": {3: []}}, "parameter 3 is a list"),
    ],
)
def test_other_optimizers(tmp_path, state, message):
    refused(tmp_path, saved(state), message, load_optimizer)
