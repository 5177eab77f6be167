"""Hostile and damaged files of EDM, EDM2 and ADM are refused in a sentence, and nothing in them runs.

The pickles are made by Python's own pickle module of objects that reduce as those of the official programs do, whose
loader runs the source text that they hold.
"""

import contextlib
import io
import os
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from imagenet64_diffusion.conversion.network_pickles import read_network, read_pickle
from imagenet64_diffusion.conversion.pickle_reader import CheckpointError, load_tensors, read_checkpoint
from imagenet64_diffusion.convert_checkpoints import convert_checkpoint
from imagenet64_diffusion.tests.components import FIXTURES
from imagenet64_diffusion.tests.conversion.originals import as_archive, as_legacy, state_dict, tensor, text


NETWORK = FIXTURES / "peers" / "edm2" / "gnet.pkl"
ADM = FIXTURES / "peers" / "adm"


def _reconstruct_persistent_obj(meta: dict) -> object:
    exec(meta["module_src"])
    return types.SimpleNamespace(**meta["state"])


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


@pytest.fixture(autouse=True)
def official_modules(monkeypatch):
    """What these pickles name, so that Python's pickle module writes and loads them."""
    persistence = types.SimpleNamespace(_reconstruct_persistent_obj=_reconstruct_persistent_obj)
    for name, module in (("torch_utils", types.SimpleNamespace()), ("torch_utils.persistence", persistence)):
        monkeypatch.setitem(sys.modules, name, module)


class Called:
    """An object that is pickled as a call of a function."""

    def __init__(self, function, *arguments) -> None:
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class Module:
    """A module as torch_utils.persistence pickles it."""

    def __init__(self, class_name: str, tensors: dict, options: dict, source: str = "pass", **state) -> None:
        self.state = {"_init_args": (), "_init_kwargs": options, "_parameters": {}, "_buffers": {}, "_modules": {}}
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name}
        inside: dict = {}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            if rest:
                inside.setdefault(part, {})[rest] = value
            else:
                self.state["_parameters"][part] = value
        self.state["_modules"] = {part: Module("Part", members, {}, source) for part, members in inside.items()}
        self.state |= state

    def __reduce__(self):
        return _reconstruct_persistent_obj, ({**self.meta, "state": self.state},)


def network(source: str = "pass", options=None, tensors=None, class_name: str = "Precond", **state) -> Module:
    """A network like the stored one, with changes; what is changed to None is left out."""
    stored = read_network(NETWORK.name, read_checkpoint(NETWORK, read_pickle))
    weights = load_tensors(
        NETWORK.name, stored.tensors, {name: kept.shape for name, kept in stored.tensors.items()}, ""
    )
    changed = {name: value for name, value in {**weights, **(tensors or {})}.items() if value is not None}
    return Module(class_name, changed, {**stored.options, **(options or {})}, source, **state)


def refused(folder: Path, content: bytes, message: str, **options) -> None:
    """A file with this content is refused with a message, one sentence, and nothing appears beside it."""
    (folder / "net.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_checkpoint(folder / "net.pkl", output_dir=folder / "out", **options)
    assert re.fullmatch(r".{0,400}net\.pkl.{0,400}", str(caught.value))
    assert [path.name for path in folder.iterdir()] == ["net.pkl"]


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_what_the_files_hold_is_read_and_their_source_is_not(tmp_path):
    marker = tmp_path / "marker"
    content = pickle.dumps({"ema": network(f"open({str(marker)!r}, 'w')"), "dataset_kwargs": {"path": "x.zip"}})
    pickle.loads(content)
    marker.unlink()
    (tmp_path / "net.pkl").write_bytes(content)
    pipelines = [
        convert_checkpoint(file, output_dir=tmp_path / name)
        for name, file in (("a", NETWORK), ("b", tmp_path / "net.pkl"))
    ]
    one, other = (pipeline.unet.state_dict() for pipeline in pipelines)
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    assert not marker.exists()


# Each writes a file, of a command that makes a marker.
ATTACKS = {
    "instead of the network": lambda evil, _: pickle.dumps({"ema": evil}),
    "instead of the dict": lambda evil, _: pickle.dumps(evil),
    "beside the network": lambda evil, _: pickle.dumps({"ema": network(), "loss_fn": evil}),
    "instead of a weight": lambda evil, _: pickle.dumps({"ema": network(tensors={"unet.out_gain": evil})}),
    "as an option": lambda evil, _: pickle.dumps({"ema": network(options={"dropout": evil})}),
    "as an attribute": lambda evil, _: pickle.dumps({"ema": network(_forward_hooks={0: evil})}),
    "in a persistent object": lambda evil, _: pickle.dumps({"ema": Called(_reconstruct_persistent_obj, evil)}),
    "in the bytes of a storage": lambda _, command: pickle.dumps(
        {
            "ema": Called(
                torch.storage._load_from_bytes, as_legacy(b"\x80\x02cposix\nsystem\n" + text(command) + b"\x85R.")
            )
        }
    ),
    "in a zip as the bytes": lambda _, command: pickle.dumps(
        {
            "ema": Called(
                torch.storage._load_from_bytes, as_archive(b"\x80\x02cposix\nsystem\n" + text(command) + b"\x85R.")
            )
        }
    ),
    "by eval": lambda _, command: pickle.dumps({"ema": Called(eval, f"__import__('os').system({command!r})")}),
    "by a new object": lambda _, command: (
        b"\x80\x02}" + text("ema") + b"csubprocess\nPopen\n(" + text("touch") + text(command[6:]) + b"l\x85\x85\x81s."
    ),
    "by INST": lambda _, command: b"\x80\x02}" + text("ema") + b"(" + text(command) + b"iposix\nsystem\ns.",
    "by OBJ": lambda _, command: b"\x80\x02}" + text("ema") + b"(cposix\nsystem\n" + text(command) + b"os.",
    "in a state dict of ADM": lambda evil, _: saved({"input_blocks.0.0.weight": torch.zeros(1), "out.0.bias": evil}),
}


@pytest.mark.parametrize("name", list(ATTACKS))
def test_nothing_runs(tmp_path, name):
    marker, folder = tmp_path / "marker", tmp_path / "folder"
    folder.mkdir()
    content = ATTACKS[name](Called(os.system, f"touch {marker}"), f"touch {marker}")
    # what follows would prove nothing with files that do not work
    if name != "by a new object":
        with contextlib.suppress(Exception):
            torch.load(io.BytesIO(content), weights_only=False) if "ADM" in name else pickle.loads(content)
        marker.unlink()
    refused(folder, content, r"net\.pkl (wants|uses the pickle opcode|is a pickle, but not)")
    assert not marker.exists()


NAN = torch.tensor(torch.nan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {"unet.out_gain": NAN}}, "unet.out_gain holds NaN or infinite numbers"),
        ({"tensors": {"unet.out_gain": None}}, "it lacks unet.out_gain"),
        ({"tensors": {"unet.more": torch.zeros(1)}}, "has the unknown unet.more"),
        ({"tensors": {"unet.out_gain": torch.zeros(2)}}, r"unet.out_gain has shape \(2,\), but must have \(\)"),
        ({"tensors": {"unet.out_gain": torch.zeros((), dtype=torch.int64)}}, "wants torch.LongStorage"),
        ({"tensors": {"unet.out_gain": 1.0}}, "unet.out_gain is a float, but must be a tensor"),
        ({"tensors": {"unet." + "a" * 41: torch.zeros(1)}}, "is no name of a network's"),
        ({"tensors": {"unet" + ".a" * 10: torch.zeros(1)}}, "or too deep"),
        ({"tensors": {"unet.enc.16x16_conv.weight": torch.zeros(1, 1, 1, 1).expand(16, 4, 3, 3)}}, "share memory"),
        ({"options": {"num_blocks": 10**9}}, "num_blocks|blocks"),
        ({"options": {"model_channels": 10**12}}, "net.pkl"),
        ({"options": {"channel_mult": [1] * 1000}}, "channel_mult is no number, text or list"),
        ({"options": {"img_resolution": "16"}}, "net.pkl"),
        ({"options": {"img_resolution": 16.0}}, "net.pkl"),
        ({"options": {"dropout": float("nan")}}, "net.pkl"),
        ({"options": {"label_dim": -1}}, "net.pkl"),
        ({"options": {"sigma_data": float("nan")}}, "net.pkl: sigma_data is nan"),
        ({"options": {"sigma_data": 0}}, "net.pkl: sigma_data is 0"),
        ({"options": {"more": 1}}, "more"),
        ({"class_name": "VPPrecond"}, "VPPrecond"),
        ({"class_name": "EDMPrecond", "options": {"model_type": "SongUNet"}}, "SongUNet|channels_per_head"),
        ({"_init_kwargs": None}, "a Precond has no _init_kwargs"),
        ({"_init_args": (16, 3, 5, False)}, "does not name the options of its network"),
        ({"_modules": {"unet": 1}}, "unet is no module"),
        ({"_parameters": [1]}, "a Precond has no _parameters"),
    ],
)
def test_other_networks(tmp_path, changes, message):
    refused(tmp_path, pickle.dumps({"ema": network(**changes)}), message)


def load_storage(content: bytes) -> Called:
    return Called(torch.storage._load_from_bytes, content)


def weight(storage: Called) -> Called:
    return Called(torch._utils._rebuild_tensor_v2, storage, 0, (), (), False, {})


def twice() -> Module:
    whole = network()
    parts = whole.state["_modules"]["unet"].state["_modules"]
    parts["again"] = parts["enc"]
    return whole


_REFERENCE = tensor("0", 1, (1,), (1,))
# the opcodes of the reference to a storage of one number
STORAGE = _REFERENCE[_REFERENCE.index(b"(" + text("storage")) : _REFERENCE.index(b"tQ") + 2]
ONE = as_legacy(b"\x80\x02" + STORAGE + b".", {"0": (1, bytes(4))})
# a module that holds itself
CYCLE = b"ctorch.nn.modules.container\nModuleDict\n)\x81q\x00}(" + text("_init_args") + b")"
CYCLE += b"".join(text(name) + b"}" for name in ("_init_kwargs", "_parameters", "_buffers"))
CYCLE += text("_modules") + b"}" + text("a") + b"h\x00sub"
# a tuple of itself, forty times over: hashing it takes 2^40 steps
NESTED = b"K\x01\x85q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(40))


def with_weights(**weights) -> bytes:
    return pickle.dumps({"ema": network(tensors={f"unet.{name}": value for name, value in weights.items()})})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: pickle.dumps({"net": network()}), "holds no network of EDM or EDM2, which is under 'ema'"),
        (lambda: pickle.dumps({"ema": twice()}), "lies in two places"),
        (lambda: with_weights(out_gain=weight(one := load_storage(ONE)), more=weight(one)), "share|unknown"),
        (lambda: with_weights(out_gain=weight(load_storage(ONE)), more=weight(load_storage(ONE))), "several tensors"),
        (lambda: with_weights(out_gain=weight(load_storage(ONE[:-1]))), "does not hold the 4 bytes of storage"),
        (
            lambda: with_weights(out_gain=weight(load_storage(as_archive(b"\x80\x02" + STORAGE + b".")))),
            "opcode PERSID",
        ),
        (lambda: with_weights(out_gain=weight(load_storage(as_legacy(state_dict())))), "a StateDict where a storage"),
        (lambda: pickle.dumps({"ema": network()})[:-100], "download or copy it again"),
    ]
    + [
        (lambda opcodes=opcodes: b"\x80\x04}" + text("ema") + opcodes + b"s.", message)
        for opcodes, message in (
            (CYCLE, "lies in two places"),
            (STORAGE, "opcode BINPERSID"),
            (b"N" + text("ema") + b"Nu", "cannot be read"),
            (b"}" + NESTED + b"Ns", "neither a name nor the number"),
            (b"B\xff\xff\xff\x7fab", "ends within the 2,147,483,647 bytes"),
            (b"\x82\xf0", "opcode EXT1"),
            (b"}}b", "sets the state of something"),
            (b"ccollections\nOrderedDict\n)\x81", "opcode NEWOBJ for what networks do not need"),
            (b"cnumpy\nload\n" + text("x.npy") + b"\x85R", "wants numpy.load"),
            (b"ctorch\nload\n" + text("x.pt") + b"\x85R", "wants torch.load"),
        )
    ],
)
def test_other_pickles(tmp_path, content, message):
    refused(tmp_path, content(), message)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"out.0.bias": torch.full((32,), torch.inf)}, "out.0.bias holds NaN or infinite"),
        ({"out.0.bias": torch.zeros(31)}, r"out.0.bias has shape \(31,\)"),
        ({"out.0.bias": torch.zeros(1).expand(32)}, "share memory"),
        ({"out.0.bias": None}, "lacks out.0.bias"),
        ({"more": torch.zeros(1)}, "has the unknown more"),
        ({"time_embed.0.weight": torch.zeros(0, 2**40)}, "time_embed.0.weight is"),
        ({"input_blocks.0.0.weight": torch.zeros(1).expand(2**21, 3, 3, 3)}, "input_blocks.0.0.weight"),
        (
            {f"input_blocks.{index}.0.op.weight": torch.zeros(1) for index in range(50)},
            "no network of guided-diffusion",
        ),
    ],
)
def test_other_weights_of_adm(tmp_path, weights, message):
    stored = torch.load(ADM / "diffusion.pt", weights_only=True)
    content = saved({name: value for name, value in {**stored, **weights}.items() if value is not None})
    refused(tmp_path, content, message, params=ADM / "flags.json")
