"""Files of torch.save read as data: nothing in them is imported or called, and no size in them is believed.

The pickle goes through Python's own machine with only the opcodes below, and every name in it must be in `GLOBALS`,
where it stands for a function of this file. Tensors come out as `StoredTensor`, whose shapes are compared with those
that are wanted before a byte of them is read. Their elements stay in the file, which is mapped into memory.
"""

import io
import math
import mmap
import pickle
import pickletools
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch


# The pickle of a checkpoint holds names and shapes, less than 1 kB for each tensor; the weights lie beside it.
LARGEST_PICKLE = 8 << 20
_LARGEST_KEY, _LARGEST_LENGTH = 1 << 20, 1 << 48
# The first pickle of the format that torch.save wrote before version 1.6.
_LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C

# How files of other kinds begin, and what they are.
_OTHER_KINDS = {
    rb"(\xef\xbb\xbf)?\s*<(!doctype )?html": "is a web page, maybe of a file host: download the file itself",
    rb"version https://git-lfs": "is a Git LFS pointer, not the file: fetch it with git lfs pull",
    rb"\s*\{": "is a JSON file: the model and its parameters may be mistaken for each other",
    rb"...\0{5}\{": "is a safetensors file, but must be one of torch.save",
    rb"(?!PK\x03\x04|\x80)": "is no file of torch.save, which begins with PK or byte 80",
}
_DAMAGED = "it is damaged or cut off, download or copy it again"


class CheckpointError(ValueError):
    """A checkpoint, its parameters or its optimizer are not what they should be.

    The message names the file, what was found and what would be right. Nothing of the file has been executed, and
    nothing has been written.
    """


def require(fits: object, problem: str) -> None:
    """Raises CheckpointError with the problem unless something fits."""
    if not fits:
        raise CheckpointError(problem)


@dataclass
class Storage:
    """A run of elements in the file."""

    dtype: torch.dtype
    length: int
    data: memoryview = field(default=memoryview(b""), compare=False)

    @property
    def num_bytes(self) -> int:
        return self.length * self.dtype.itemsize


class StoredTensor(NamedTuple):
    """A tensor as the pickle describes it; ``offset`` and ``stride`` count elements of its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class StateDict(dict):
    """A dict of the file. Keys are names or small numbers: hashing others can be made to take for ever."""

    def __setitem__(self, key: Any, value: Any) -> None:
        known = type(key) is str or (type(key) is int and 0 <= key < _LARGEST_KEY)
        require(known, "has a dict whose key is neither a name nor the number of a parameter")
        require(key not in self, f"names {key!r:.80} twice")
        super().__setitem__(key, value)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, _: Any, hooks: Any) -> StoredTensor:
    whole = all(type(number) is int and 0 <= number < _LARGEST_LENGTH for number in (offset, *shape, *stride))
    usual = isinstance(storage, Storage) and not hooks and len(shape) == len(stride) <= 16 and whole
    require(usual, "describes a tensor in a way that torch.save does not")
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    require(
        last < storage.length or not math.prod(shape), f"stores {storage.length:,} elements for a shape of {shape}"
    )
    return StoredTensor(storage, offset, shape, stride)


# Everything that a file may name, and what stands for it: data, or a function that makes data of what is pickled with
# it. Nothing else is looked up, so that a family of files which needs more adds its names here.
GLOBALS: dict[tuple[str, str], Any] = {
    # without arguments, which would take keys past StateDict's check
    ("collections", "OrderedDict"): lambda: StateDict(),
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, requires_grad, hooks: tensor,
}
_STORAGES = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16}
for _name, _dtype in _STORAGES.items():
    GLOBALS["torch", f"{_name}Storage"] = GLOBALS["torch.storage", f"{_name}Storage"] = _dtype

# Python's handlers for what describes data. Missing are those that import by number (EXT1), make values of other
# classes (INST, OBJ, NEWOBJ) or copy at will (DUP).
_OPCODES = re.findall(
    r"\w+",
    """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    SHORT_BINSTRING EMPTY_TUPLE EMPTY_LIST TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS BINGET
    LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BINPERSID""",
)


class _Handlers(dict):
    def __missing__(self, code: int) -> Callable:
        name = next((opcode.name for opcode in pickletools.opcodes if opcode.code == chr(code)), hex(code))
        raise CheckpointError(f"uses the pickle opcode {name}, which weights do not need: nothing of it was run")


class _Reader(pickle._Unpickler):
    """Python's pickle machine with handlers that make data alone."""

    stack: list[Any]
    append: Callable[[Any], None]

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        refused = (
            f"wants {module}.{name}"[:200] + ", which weights do not need: nothing of it was run. A checkpoint is"
        )
        require((module, name) in GLOBALS, f"{refused} the state dict alone: save model.state_dict(), not the model")
        return GLOBALS[module, name]

    def persistent_load(self, saved_id: Any) -> Storage:
        # the older format adds a view, which is None in everything written since 2017
        kind, dtype, key, _, length, *view = saved_id
        known = kind == "storage" and isinstance(dtype, torch.dtype) and type(key) is str and view in ([], [None])
        whole = type(length) is int and 0 <= length < _LARGEST_LENGTH
        require(known and whole, "describes a storage in a way that torch.save does not")
        storage = self.storages.setdefault(key, Storage(dtype, length))
        require(storage == Storage(dtype, length), f"describes the storage {key!r:.80} twice and differently")
        return storage

    def load_empty_dict(self) -> None:
        self.append(StateDict())

    def load_build(self) -> None:
        # a state dict carries the versions of its modules as an attribute, which nothing here needs
        self.stack.pop()
        require(type(self.stack[-1]) is StateDict, "sets the state of something that is no state dict")

    dispatch = _Handlers(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES}
        | {pickle.EMPTY_DICT[0]: load_empty_dict, pickle.BUILD[0]: load_build}
    )


def _read_pickle(data: bytes) -> tuple[Any, dict[str, Storage], int]:
    """The value of the pickle at the beginning of some bytes, its storages by their keys, its length in bytes."""
    file = io.BytesIO(data)
    reader = _Reader(file)
    return reader.load(), reader.storages, file.tell()


def read_checkpoint(file: str | Path) -> Any:
    """Reads a file of torch.save, in either of its formats.

    Returns:
        What its pickle describes: `StateDict`, lists, tuples, numbers, texts, and `StoredTensor` where tensors are.

    Raises:
        CheckpointError: If it is of another kind, damaged, or not what torch.save writes for such values.
    """
    file = Path(file)
    require(file.is_file(), f"{file} is a folder" if file.is_dir() else f"there is no file {file}")
    with file.open("rb") as opened:
        try:
            # private, so that tensors can be written to and the file is not
            memory = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))
            for beginning, what in _OTHER_KINDS.items():
                require(not re.match(beginning, memory[:512], re.IGNORECASE | re.DOTALL), what)
            return _read_zip(opened, memory) if bytes(memory[:2]) == b"PK" else _read_legacy(memory)
        except CheckpointError as error:
            raise CheckpointError(f"{file.name} {error}") from None
        except Exception as error:
            # a broken pickle or zip makes Python raise whatever it raises
            raise CheckpointError(f"{file.name} cannot be read ({type(error).__name__}): {_DAMAGED}") from error


def _read_zip(file: BinaryIO, memory: memoryview) -> Any:
    """The format of torch.save since 1.6: ``data.pkl`` and the storages as members, stored as they are."""
    # zipfile makes an object of every entry of the directory, whose size is the fifth entry here
    size = (zipfile._EndRecData(file) or [0] * 6)[5]  # type: ignore[attr-defined]
    require(size <= LARGEST_PICKLE, f"has a zip directory of {size:,} bytes, far more than a checkpoint's")
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    records = {info.filename.partition("/")[2]: info for info in members}
    whole = "data.pkl" in records and len(records) == len(members)
    require(whole, "is a zip file, but no checkpoint: it must hold data.pkl once, as torch.save writes it")
    for info in members:
        stored = not info.compress_type and info.compress_size == info.file_size and not info.flag_bits & 1
        require(
            stored, f"holds {info.filename:.80} compressed or encrypted, as torch.save never does: maybe a zip bomb"
        )
    require(sum(info.file_size for info in members) <= len(memory), "holds members that overlap or reach past its end")
    size = records["data.pkl"].file_size
    require(size <= LARGEST_PICKLE, f"holds a pickle of {size:,} bytes, far more than a checkpoint's")
    damaged = archive.testzip()
    require(not damaged, f"has a wrong checksum of {damaged!s:.80}: {_DAMAGED}")
    little = "byteorder" not in records or archive.read(records["byteorder"]) == b"little"
    require(little, "was written on a big-endian machine: save it again on a little-endian one")
    value, storages, _ = _read_pickle(archive.read(records["data.pkl"]))
    for key, storage in storages.items():
        says = f"says that storage {key!r:.80} has {storage.num_bytes:,} bytes, but it"
        require(f"data/{key}" in records, f"{says} is missing")
        member = records[f"data/{key}"]
        require(member.file_size == storage.num_bytes, f"{says} holds {member.file_size:,}")
        start = member.header_offset + 30 + sum(struct.unpack_from("<HH", memory, member.header_offset + 26))
        storage.data = memory[start : start + storage.num_bytes]
    return value


def _read_legacy(memory: memoryview) -> Any:
    """The format before 1.6: pickles one after another, then the storages, each behind its length."""
    found: list[Any] = []
    position = 0
    # a magic number, the version, the writer's system, what was saved, and the keys of its storages
    for expected in (_LEGACY_MAGIC_NUMBER, 1001, None, None, None):
        value, storages, length = _read_pickle(bytes(memory[position : position + LARGEST_PICKLE]))
        usual = expected is None or value == expected
        require(usual, "is a pickle, but not as torch.save writes it: save the state dict with torch.save")
        found.append((value, storages))
        position += length
    (system, _), (value, storages), (keys, _) = found[2:]
    little = type(system) is StateDict and system.get("little_endian") is True
    named = type(keys) is list and all(type(key) is str for key in keys) and sorted(keys) == sorted(storages)
    require(little and named, "was written on a big-endian machine, or lists other storages than its tensors need")
    for key in keys:
        storage, start = storages[key], position + 8
        position = start + storage.num_bytes
        whole = position <= len(memory) and struct.unpack_from("<q", memory, start - 8)[0] == storage.length
        require(whole, f"does not hold the {storage.num_bytes:,} bytes of storage {key!r:.80}: {_DAMAGED}")
        storage.data = memory[start:position]
    return value


# ---------------------------------------------------------------------- what is read, compared with what is wanted


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are; fifty times as fast as ``isfinite().all()``, since NaN passes into both ends."""
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def load_tensors(
    name: str, described: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], whose: str
) -> dict[str, torch.Tensor]:
    """Makes tensors of what a file describes by name, which must be finite and have exactly these names and shapes.

    They lie in the file, which must stay as it is while they are used. Errors say ``name`` for the file, ``whose`` for
    what has the shapes.
    """
    for key, value in described.items():
        require(
            isinstance(value, StoredTensor), f"{name}: {key:.80} is a {type(value).__name__}, but must be a tensor"
        )
    missing, unknown = [key for key in shapes if key not in described], [key for key in described if key not in shapes]
    for keys, what in ((missing, "lacks"), (unknown, "has the unknown")):
        words = f"{what} {''.join(keys[:1]):.80}{f' and {len(keys) - 1} more' if keys[1:] else ''}"
        require(not keys, f"{name} does not belong to {whose}, or is not whole: it {words}")
    used: Counter[int] = Counter()
    for key, shape in shapes.items():
        storage, found = described[key].storage, described[key].shape
        require(found == shape, f"{name} does not belong to {whose}: {key} has shape {found}, but must have {shape}")
        # a small file could describe a network of any size by sharing, or with strides of zero
        used[id(storage)] += math.prod(shape)
        fits = used[id(storage)] <= storage.length
        require(fits, f"{name}: {key} takes more than is stored for it, or its tensors share memory")
    tensors = {}
    for key in shapes:
        storage, offset, shape, stride = described[key]
        elements = torch.frombuffer(storage.data, dtype=torch.uint8)
        elements = elements.clone() if elements.data_ptr() % storage.dtype.itemsize else elements
        tensors[key] = elements.view(storage.dtype).as_strided(shape, stride, offset)
        require(is_finite(tensors[key]), f"{name}: {key} holds NaN or infinite numbers: take another checkpoint")
    return tensors


def load_state_dict(file: str | Path, shapes: Mapping[str, tuple[int, ...]], whose: str) -> dict[str, torch.Tensor]:
    """Loads a state dict that has exactly the weights of a network; as `load_tensors`.

    What wraps a module puts its name before those of the weights (``"module."``): that is removed.
    """
    name, found = Path(file).name, read_checkpoint(file)
    require(type(found) is StateDict, f"{name} holds a {type(found).__name__}, but must hold a state dict")
    optimizer = set(found) == {"state", "param_groups"}
    require(not optimizer, f"{name} holds an optimizer's state, but must hold a model's: give it as the optimizer")
    wrappers = {re.match(r"((module|_orig_mod)\.)*", str(key))[0] for key in found}  # type: ignore[index]
    wrapper = wrappers.pop() if len(wrappers) == 1 else ""
    return load_tensors(name, {str(key).removeprefix(wrapper): value for key, value in found.items()}, shapes, whose)


def load_optimizer(file: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The state dict of an AdamW over weights of these shapes; as `load_tensors`."""
    name, found = Path(file).name, read_checkpoint(file)
    match found:
        case {"state": StateDict() as state, "param_groups": [StateDict() as group]} if len(found) == 2:
            pass
        case _:
            raise CheckpointError(
                f"{name} does not hold an optimizer's state, an AdamW's with one group of parameters"
            )
    same = group.get("params") == list(range(len(shapes))) and state.keys() <= set(group["params"])
    require(same, f"{name} is the optimizer of another network: the model has {len(shapes)} parameters")
    require(not group.get("amsgrad"), f"{name}: amsgrad is on, but the original's AdamW has it off")
    try:
        hyperparameters = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        torch.optim.AdamW([torch.zeros(1)], **hyperparameters)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: the hyper-parameters of its group are not AdamW's ({error})") from error
    described: dict[str, Any] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    for index, entry in state.items():
        require(type(entry) is StateDict, f"{name}: parameter {index} is a {type(entry).__name__}, but must be a dict")
        if type(step := entry.get("step")) in (int, float) and 0 <= step < _LARGEST_LENGTH:
            # as torch before 1.12 wrote it
            number = Storage(torch.float64, 1, memoryview(bytearray(struct.pack("<d", step))))
            entry = {**entry, "step": StoredTensor(number, 0, (), ())}
        shape = list(shapes.values())[index]
        described |= {f"{kind} of parameter {index}": value for kind, value in entry.items()}
        wanted |= {f"{kind} of parameter {index}": shape for kind in ("exp_avg", "exp_avg_sq")}
        wanted[f"step of parameter {index}"] = ()
    tensors = load_tensors(name, described, wanted, "the model")
    for key, tensor in tensors.items():
        least = 1 if key.startswith("step") else 0 if key.startswith("exp_avg_sq") else -math.inf
        require(tensor.min() >= least, f"{name}: {key} must be at least {least}")
    kinds = ("step", "exp_avg", "exp_avg_sq")
    loaded = {index: {kind: tensors[f"{kind} of parameter {index}"] for kind in kinds} for index in state}
    return {"state": loaded, "param_groups": [{**hyperparameters, "params": group["params"]}]}
