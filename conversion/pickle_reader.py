"""Files of torch.save read as data: nothing in them is imported or called, and no size in them is believed.

Every name in a pickle must be in `GLOBALS`. Elements stay in the file, mapped, until the shapes have been compared.
`network_pickles` reads the pickles of EDM and EDM2 in the same way.
"""

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


# The pickle of a checkpoint holds names and shapes, some kB for each tensor; the weights lie beside it or are skipped.
LARGEST_PICKLE = 8 << 20
_LARGEST_KEY, _LARGEST_LENGTH, _LONGEST_LINE = 1 << 20, 1 << 48, 256

# How files of other kinds begin.
_OTHER_KINDS = {
    rb"(\xef\xbb\xbf)?\s*<(!doctype )?html": "is a web page, maybe of a file host: download the file itself",
    rb"version https://git-lfs": "is a Git LFS pointer, not the file: fetch it with git lfs pull",
    rb"\s*\{": "is a JSON file: the model and its parameters may be mistaken for each other",
    rb"...\0{5}\{": "is a safetensors file, but must be one of torch.save",
    rb"(?!PK\x03\x04|\x80)": "is no file of torch.save, which begins with PK or byte 80",
}
DAMAGED = "it is damaged or cut off, download or copy it again"


class CheckpointError(ValueError):
    """A checkpoint, its parameters or its optimizer are not what they should be; nothing in them was run."""


def require(fits: object, problem: str) -> None:
    """Raises CheckpointError with the problem unless something fits."""
    if not fits:
        raise CheckpointError(problem)


@dataclass
class Storage:
    dtype: torch.dtype
    length: int
    data: memoryview = field(default=memoryview(b""), compare=False)


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
    stored = last < storage.length or not math.prod(shape)
    require(stored, f"stores {storage.length:,} elements for a shape of {shape}")
    return StoredTensor(storage, offset, shape, stride)


# All that a file may name, and what stands for it: data, or a function that makes data of what is pickled with it.
GLOBALS: dict[tuple[str, str], Any] = {
    # without arguments, which would take keys past StateDict's check
    ("collections", "OrderedDict"): lambda: StateDict(),
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, requires_grad, hooks: tensor,
}
_STORAGES = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16}
for _name, _dtype in _STORAGES.items():
    GLOBALS["torch", f"{_name}Storage"] = GLOBALS["torch.storage", f"{_name}Storage"] = _dtype

# What describes data; not what imports by number (EXT1), makes other objects (INST, OBJ, NEWOBJ) or copies (DUP).
_OPCODES = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    SHORT_BINUNICODE SHORT_BINSTRING EMPTY_TUPLE EMPTY_LIST TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS
    BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE"""


class Handlers(dict):
    """What a reader does at each opcode; at any other it says that it does nothing."""

    def __missing__(self, code: int) -> Callable:
        name = next((opcode.name for opcode in pickletools.opcodes if opcode.code == chr(code)), hex(code))
        raise CheckpointError(f"uses the pickle opcode {name}, which weights do not need: nothing of it was run")


class MappedFile:
    """What pickle reads from: memory, of which no more than a checkpoint's pickle is copied."""

    def __init__(self, memory: memoryview) -> None:
        self.memory, self.position, self.num_read = memory, 0, 0

    def skip(self, length: int) -> memoryview:
        start = self.position
        self.position = min(start + length, len(self.memory))
        return self.memory[start : self.position]

    def read(self, length: int) -> bytes:
        read = bytes(self.skip(min(length, LARGEST_PICKLE + 1)))
        self.num_read += len(read)
        require(self.num_read <= LARGEST_PICKLE, "holds a pickle that is far larger than a checkpoint's")
        return read

    def readline(self) -> bytes:
        found = bytes(self.memory[self.position : self.position + _LONGEST_LINE]).find(b"\n")
        return self.read(found + 1 or _LONGEST_LINE)


class Reader(pickle._Unpickler):
    """Python's pickle machine with handlers that make data alone."""

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    globals = GLOBALS

    def __init__(self, memory: memoryview) -> None:
        self.file = MappedFile(memory)
        super().__init__(self.file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        refused = f"wants {module}.{name}"[:200] + ", which weights do not need: nothing of it was run."
        known = (module, name) in self.globals
        require(known, f"{refused} Save the state dict alone, model.state_dict(), not the model")
        return self.globals[module, name]

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

    def load_frame(self) -> None:
        # says how much to read at once, which is of no use in mapped memory
        self.read(8)

    usual = Handlers(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES.split()}
        | {pickle.EMPTY_DICT[0]: load_empty_dict, pickle.FRAME[0]: load_frame}
    )
    dispatch = Handlers(
        usual | {pickle.BUILD[0]: load_build, pickle.BINPERSID[0]: pickle._Unpickler.dispatch[pickle.BINPERSID[0]]}
    )


def read_legacy(memory: memoryview) -> Any:
    """The format before 1.6: pickles one after another, then the storages, each behind its length."""
    found: list[Any] = []
    position = 0
    # a magic number, the version, the writer's system, what was saved, and the keys of its storages
    for expected in (0x1950A86A20F9469CFC6C, 1001, None, None, None):
        reader = Reader(memory[position:])
        found.append((reader.load(), reader.storages))
        usual = expected is None or found[-1][0] == expected
        require(usual, "is a pickle, but not as torch.save writes it: save the state dict with torch.save")
        position += reader.file.position
    (system, _), (value, storages), (keys, _) = found[2:]
    little = type(system) is StateDict and system.get("little_endian") is True
    named = type(keys) is list and all(type(key) is str for key in keys) and sorted(keys) == sorted(storages)
    require(little and named, "was written on a big-endian machine, or lists other storages than its tensors need")
    for key in keys:
        storage, start = storages[key], position + 8
        position = start + storage.length * storage.dtype.itemsize
        whole = position <= len(memory) and struct.unpack_from("<q", memory, start - 8)[0] == storage.length
        require(whole, f"does not hold the {position - start:,} bytes of storage {key!r:.80}: {DAMAGED}")
        storage.data = memory[start:position]
    return value


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are; fifty times as fast as ``isfinite().all()``, since NaN passes into both ends."""
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def read_checkpoint(file: Path, read_pickle: Callable[[memoryview], Any] = read_legacy) -> Any:
    """What a file of torch.save, in either format, describes: its containers, with `StoredTensor` for tensors.

    ``read_pickle`` reads files that are not of the newer format, and need not be of the older.
    """
    require(file.is_file(), f"{file} is a folder" if file.is_dir() else f"there is no file {file}")
    with file.open("rb") as opened:
        try:
            # private, so that tensors can be written to and the file is not
            memory = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))
            for beginning, what in _OTHER_KINDS.items():
                require(not re.match(beginning, memory[:512], re.IGNORECASE | re.DOTALL), what)
            return _read_zip(opened, memory) if bytes(memory[:2]) == b"PK" else read_pickle(memory)
        except CheckpointError as error:
            raise CheckpointError(f"{file.name} {error}") from None
        except Exception as error:
            # a broken pickle or zip makes Python raise whatever it raises
            raise CheckpointError(f"{file.name} cannot be read ({type(error).__name__}): {DAMAGED}") from error


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
        require(stored, f"holds {info.filename:.80} compressed or encrypted, unlike torch.save: maybe a zip bomb")
    require(sum(info.file_size for info in members) <= len(memory), "holds members that overlap or reach past its end")
    size = records["data.pkl"].file_size
    require(size <= LARGEST_PICKLE, f"holds a pickle of {size:,} bytes, far more than a checkpoint's")
    damaged = archive.testzip()
    require(not damaged, f"has a wrong checksum of {damaged!s:.80}: {DAMAGED}")
    little = "byteorder" not in records or archive.read(records["byteorder"]) == b"little"
    require(little, "was written on a big-endian machine: save it again on a little-endian one")
    reader = Reader(memoryview(archive.read(records["data.pkl"])))
    value = reader.load()
    for key, storage in reader.storages.items():
        member, size = records.get(f"data/{key}"), storage.length * storage.dtype.itemsize
        if member is None or member.file_size != size:
            held = "is missing" if member is None else f"holds {member.file_size:,}"
            raise CheckpointError(f"says that storage {key!r:.80} has {size:,} bytes, but it {held}")
        start = member.header_offset + 30 + sum(struct.unpack_from("<HH", memory, member.header_offset + 26))
        storage.data = memory[start : start + size]
    return value


def load_tensors(
    name: str, described: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], whose: str
) -> dict[str, torch.Tensor]:
    """Finite tensors of exactly these names and shapes, which lie in the file; errors say ``name`` and ``whose``."""
    for key, value in described.items():
        known = isinstance(value, StoredTensor)
        require(known, f"{name}: {key:.80} is a {type(value).__name__}, but must be a tensor")
    missing, unknown = [key for key in shapes if key not in described], [key for key in described if key not in shapes]
    for keys, what in ((missing, "lacks"), (unknown, "has the unknown")):
        words = f"{what} {''.join(keys[:1]):.80}{f' and {len(keys) - 1} more' if keys[1:] else ''}"
        require(not keys, f"{name} does not belong to {whose}, or is not whole: it {words}")
    used: Counter[int] = Counter()
    tensors = {}
    for key, wanted in shapes.items():
        storage, offset, shape, stride = described[key]
        require(shape == wanted, f"{name} does not belong to {whose}: {key} has shape {shape}, but must have {wanted}")
        # a small file could describe a network of any size by sharing, or with strides of zero
        used[id(storage)] += math.prod(shape)
        fits = used[id(storage)] <= storage.length
        require(fits, f"{name}: {key} takes more than is stored for it, or its tensors share memory")
        elements = torch.frombuffer(storage.data, dtype=torch.uint8)
        if elements.data_ptr() % storage.dtype.itemsize:
            elements = elements.clone()
            if hasattr(mmap, "MADV_DONTNEED") and isinstance(storage.data.obj, mmap.mmap):
                # what has been copied need not stay in memory, too
                storage.data.obj.madvise(mmap.MADV_DONTNEED)
        tensors[key] = elements.view(storage.dtype).as_strided(shape, stride, offset)
        require(is_finite(tensors[key]), f"{name}: {key} holds NaN or infinite numbers: take another checkpoint")
    return tensors


def read_state_dict(name: str, found: Any) -> dict[str, Any]:
    """The entries of a state dict by their names without what wrappers put before them (``"module."``)."""
    require(type(found) is StateDict, f"{name} holds a {type(found).__name__}, but must hold a state dict")
    wrappers = {re.match(r"((module|_orig_mod)\.)*", str(key))[0] for key in found}  # type: ignore[index]
    wrapper = wrappers.pop() if len(wrappers) == 1 else ""
    return {str(key).removeprefix(wrapper): value for key, value in found.items()}


def load_optimizer(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The state dict of an AdamW over weights of these shapes."""
    name, found = file.name, read_checkpoint(file)
    match found:
        case {"state": StateDict() as state, "param_groups": [StateDict() as group]} if len(found) == 2:
            pass
        case _:
            raise CheckpointError(f"{name} does not hold an optimizer's state, an AdamW's with one group")
    same = group.get("params") == list(range(len(shapes))) and state.keys() <= set(group["params"])
    require(same, f"{name} is the optimizer of another network: the model has {len(shapes)} parameters")
    require(not group.get("amsgrad"), f"{name}: amsgrad is on, but the original's AdamW has it off")
    try:
        hyperparameters = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        torch.optim.AdamW([torch.zeros(1)], **hyperparameters)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: the hyper-parameters of its group are not AdamW's ({error})") from error
    loaded: dict[int, dict[str, torch.Tensor]] = {}
    for index, entry in state.items():
        require(type(entry) is StateDict, f"{name}: parameter {index} is a {type(entry).__name__}, but must be a dict")
        shape, place = list(shapes.values())[index], f"{name} (parameter {index})"
        described = {str(key): value for key, value in entry.items()}
        if type(step := entry.get("step")) in (int, float) and 0 <= step < _LARGEST_LENGTH:
            # as torch before 1.12 wrote it
            number = Storage(torch.float64, 1, memoryview(bytearray(struct.pack("<d", step))))
            described["step"] = StoredTensor(number, 0, (), ())
        tensors = load_tensors(place, described, {"step": (), "exp_avg": shape, "exp_avg_sq": shape}, "the model")
        for key, least in (("step", 1), ("exp_avg_sq", 0)):
            require(tensors[key].min() >= least, f"{place}: {key} must be at least {least}")
        loaded[index] = tensors
    return {"state": loaded, "param_groups": [{**hyperparameters, "params": group["params"]}]}
