"""Files of torch.save read as data: nothing in them is imported or called, and no size in them is believed.

The pickle goes through Python's own machine with only the opcodes below, and every name in it must be in `GLOBALS`,
where it stands for a function of this file. Tensors come out as `StoredTensor`: their shape is known before a byte of
them is read. Their elements stay in the file, which is mapped into memory.
"""

import dataclasses
import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError


# The pickle of a checkpoint holds names and shapes, less than 1 kB for each tensor; the weights lie beside it.
LARGEST_PICKLE = 8 << 20
_LARGEST_KEY = 1 << 20
_LARGEST_LENGTH = 1 << 48

# The first pickle of the format that torch.save wrote before version 1.6.
_LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C

# How files of other kinds begin, in lower case, and what they are.
_OTHER_KINDS = (
    (b"<!doctype html", "is a web page, maybe a file host's download page: download the file itself"),
    (b"<html", "is a web page, maybe a file host's download page: download the file itself"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file: fetch it with git lfs pull"),
    (b"\x1f\x8b", "is gzip-compressed: unpack it first"),
    (b"{", "is a JSON file: the model and its parameters may be mistaken for each other"),
)


class RefusedError(Exception):
    """What is wrong with a file, without its name."""


@dataclasses.dataclass
class Storage:
    """A run of elements in the file; ``position`` is where it begins, in bytes."""

    dtype: torch.dtype
    length: int
    position: int = 0

    @property
    def num_bytes(self) -> int:
        """How many bytes its elements take."""
        return self.length * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as the pickle describes it; ``offset`` and ``stride`` count elements of its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class StateDict(dict):
    """A dict of the file. Keys are names or small numbers: hashing others can be made to take for ever."""

    def __init__(self) -> None:
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is not str and not (type(key) is int and 0 <= key < _LARGEST_KEY):
            raise RefusedError("has a dict whose key is neither a name nor the number of a parameter: refused")
        if key in self:
            raise RefusedError(f"names {key!r:.80} twice")
        super().__setitem__(key, value)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any
) -> StoredTensor:
    numbers = (offset, *shape, *stride)
    whole = all(type(number) is int and 0 <= number < _LARGEST_LENGTH for number in numbers)
    if not isinstance(storage, Storage) or hooks or len(shape) > 16 or len(stride) != len(shape) or not whole:
        raise RefusedError("describes a tensor in a way that torch.save does not: refused")
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    # strides of zero would make a tensor of any size from one stored number
    if math.prod(shape) > storage.length or (math.prod(shape) and last >= storage.length):
        raise RefusedError(
            f"describes a tensor of shape {shape}, but stores {storage.length:,} elements for it: refused"
        )
    return StoredTensor(storage, offset, shape, stride)


# Everything that a file may name, and what stands for it: data, or a function that makes data of what is pickled with
# it. Nothing else is looked up, so that a family of files which needs more adds its names here.
GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): StateDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, requires_grad, hooks: tensor,
}
_STORAGES = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16}
for _name, _dtype in _STORAGES.items():
    GLOBALS["torch", f"{_name}Storage"] = GLOBALS["torch.storage", f"{_name}Storage"] = _dtype

# Python's handlers for what describes data. Missing are those that import by number (EXT1), make values of other
# classes (INST, OBJ, NEWOBJ) or copy at will (DUP).
# fmt: off
_OPCODES = (
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING", "EMPTY_TUPLE", "EMPTY_LIST", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT",
    "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BINPERSID",
)
# fmt: on


class _Handlers(dict):
    def __missing__(self, code: int) -> Callable:
        names = {opcode.code: opcode.name for opcode in pickletools.opcodes}
        name = names.get(chr(code), hex(code))
        raise RefusedError(f"uses the pickle opcode {name}, which weights do not need: refused, nothing of it was run")


class _Reader(pickle._Unpickler):
    """Python's pickle machine with handlers that make data alone."""

    stack: list[Any]
    append: Callable[[Any], None]

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in GLOBALS:
            raise RefusedError(
                f"wants {module}.{name}"[:200] + ", which weights do not need: refused, and nothing of it was run. A"
                " checkpoint is the state dict alone, not a whole model: save model.state_dict()"
            )
        return GLOBALS[module, name]

    def persistent_load(self, saved_id: Any) -> Storage:
        # the older format adds a view, which is None in everything written since 2017
        kind, dtype, key, _, length, *view = saved_id
        known = kind == "storage" and isinstance(dtype, torch.dtype) and type(key) is str and view in ([], [None])
        if not known or type(length) is not int or not 0 <= length < _LARGEST_LENGTH:
            raise RefusedError("describes a storage in a way that torch.save does not: refused")
        storage = self.storages.setdefault(key, Storage(dtype, length))
        if storage != Storage(dtype, length):
            raise RefusedError(f"describes the storage {key!r:.80} twice and differently: refused")
        return storage

    def load_empty_dict(self) -> None:
        self.append(StateDict())

    def load_build(self) -> None:
        # a state dict carries the versions of its modules as an attribute, which nothing here needs
        self.stack.pop()
        if type(self.stack[-1]) is not StateDict:
            raise RefusedError("sets the state of something that is no state dict: refused, nothing of it was run")

    dispatch = _Handlers(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES}
        | {pickle.EMPTY_DICT[0]: load_empty_dict, pickle.BUILD[0]: load_build}
    )


def read_pickle(data: bytes) -> tuple[Any, dict[str, Storage], int]:
    """Reads the pickle at the beginning of some bytes.

    Returns:
        Its value, made of dicts, lists, tuples, numbers, texts and `StoredTensor`; the storages by their keys; the
        length of the pickle in bytes.

    Raises:
        RefusedError: If it is no whole pickle, or does anything but describe such values.
    """
    file = io.BytesIO(data)
    reader = _Reader(file)
    try:
        value = reader.load()
    except RefusedError:
        raise
    except Exception as error:
        # a broken pickle can make the machine raise whatever Python raises
        raise RefusedError(
            f"holds a broken pickle (near byte {file.tell():,}): it is cut off or damaged, download or copy it again"
        ) from error
    return value, reader.storages, file.tell()


class CheckpointFile:
    """A file of torch.save in either format.

    Attributes:
        value: What its pickle describes, with `StoredTensor` where tensors are.

    Raises:
        CheckpointError: If it is of another kind, damaged, or describes more than it holds.
    """

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise CheckpointError(f"{file} is a folder" if file.is_dir() else f"there is no file {file}")
        if not file.stat().st_size:
            raise CheckpointError(f"{file.name} is empty: download or copy it again")
        with file.open("rb") as opened:
            # private, so that tensors can be written to and the file is not
            self.memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            try:
                if self.memory[:4] == b"PK\x03\x04":
                    self.value = _read_zip(opened, self.memory)
                else:
                    _refuse_other_kinds(self.memory[:512], len(self.memory))
                    self.value = _read_legacy(self.memory)
            except RefusedError as error:
                raise CheckpointError(f"{file.name} {error}") from error.__cause__

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """A tensor whose elements lie in the file, which must stay as it is while they are used."""
        storage = stored.storage
        elements = torch.frombuffer(self.memory, dtype=torch.uint8, count=storage.num_bytes, offset=storage.position)
        if storage.position % storage.dtype.itemsize:
            elements = elements.clone()
        return elements.view(storage.dtype).as_strided(stored.shape, stored.stride, stored.offset)


def _refuse_other_kinds(start: bytes, size: int) -> None:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, what in _OTHER_KINDS:
        if text.startswith(beginning):
            raise RefusedError(what)
    if start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < size:
        raise RefusedError("is a safetensors file, but must be a state dict that the original wrote with torch.save")
    if start[:1] != b"\x80":
        raise RefusedError(f"is no file of torch.save, which begins with PK or byte 80: it begins with {start[:8]!r}")


def _read_zip(file: Any, memory: mmap.mmap) -> Any:
    """The format of torch.save since 1.6: ``data.pkl`` and the storages as members, stored as they are."""
    # zipfile makes an object of every entry of the directory; torch.save writes nothing behind its end
    end = len(memory) - 22
    if end < 0 or memory[end : end + 4] != b"PK\x05\x06" or memory[-2:] != b"\0\0":
        raise RefusedError("is cut off (its zip directory is missing): download or copy it again")
    directory_size = struct.unpack_from("<I", memory, end + 12)[0]
    if memory[max(end - 76, 0) : max(end - 72, 0)] == b"PK\x06\x06":
        directory_size = struct.unpack_from("<Q", memory, end - 36)[0]
    if directory_size > LARGEST_PICKLE:
        raise RefusedError(f"has a zip directory of {directory_size:,} bytes, far more than a checkpoint's: refused")
    try:
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
        records = {info.filename.partition("/")[2]: info for info in members}
        if "data.pkl" not in records or len(records) < len(members):
            raise RefusedError("is a zip file, but no checkpoint: it must hold data.pkl once, as torch.save writes it")
        if "constants.pkl" in records or any(record.startswith("code/") for record in records):
            raise RefusedError("is a TorchScript archive, which holds code: save model.state_dict() with torch.save")
        for record, info in records.items():
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
                raise RefusedError(
                    f"holds {record:.80} compressed or encrypted, which torch.save never does: maybe a zip bomb"
                )
        if sum(info.file_size for info in members) > len(memory):
            raise RefusedError("holds members that overlap or reach past its end: refused")
        if records["data.pkl"].file_size > LARGEST_PICKLE:
            raise RefusedError(f"holds a pickle of {records['data.pkl'].file_size:,} bytes, far too many")
        damaged = archive.testzip()
        if damaged is not None:
            raise RefusedError(f"is damaged (wrong checksum of {damaged:.80}): download or copy it again")
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise RefusedError("was written on a big-endian machine: save it again on a little-endian one")
        pickled = archive.read(records["data.pkl"])
    except (zipfile.BadZipFile, ValueError, EOFError, struct.error, OSError, NotImplementedError) as error:
        raise RefusedError(f"is a damaged or cut off zip file ({error}): download or copy it again") from error
    value, storages, _ = read_pickle(pickled)
    for key, storage in storages.items():
        member = records.get(f"data/{key}")
        if member is None or member.file_size != storage.num_bytes:
            found = "lacks them" if member is None else f"holds {member.file_size:,}"
            raise RefusedError(f"says that storage {key!r:.80} has {storage.num_bytes:,} bytes, but {found}: refused")
        lengths = struct.unpack_from("<HH", memory, member.header_offset + 26)
        storage.position = member.header_offset + 30 + sum(lengths)
    return value


def _read_legacy(memory: mmap.mmap) -> Any:
    """The format before 1.6: pickles one after another, then the storages, each behind its length."""
    position = 0

    def next_pickle() -> tuple[Any, dict[str, Storage]]:
        nonlocal position
        value, storages, length = read_pickle(memory[position : position + LARGEST_PICKLE])
        position += length
        return value, storages

    if next_pickle()[0] != _LEGACY_MAGIC_NUMBER:
        raise RefusedError("is a pickle, but torch.save did not write it: save the state dict with torch.save")
    if next_pickle()[0] != 1001:
        raise RefusedError("is of an unknown version of torch.save's old format: save it again")
    system = next_pickle()[0]
    if type(system) is not StateDict or system.get("little_endian") is not True:
        raise RefusedError("was written on a big-endian machine: save it again on a little-endian one")
    value, storages = next_pickle()
    keys = next_pickle()[0]
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(storages):
        raise RefusedError("lists other storages than its tensors need: refused")
    for key in keys:
        storage = storages[key]
        storage.position = position + 8
        if storage.position + storage.num_bytes > len(memory):
            raise RefusedError(f"is cut off: storage {key!r:.80} of {storage.num_bytes:,} bytes is not all there")
        if struct.unpack_from("<q", memory, position)[0] != storage.length:
            raise RefusedError(f"states two lengths for storage {key!r:.80}: refused")
        position = storage.position + storage.num_bytes
    return value
