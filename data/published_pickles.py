"""Reading the published pickles without running them and without holding them in memory.

A pickle is a program, and the usual loader runs it: a file that calls itself train_data_batch_1 can do anything. And
one batch of ImageNet-64 holds 1.57 GB of pixels. So the reader here follows only the opcodes that describe lists,
dicts, numbers, strings and numpy arrays, builds its own inert records in place of numpy's objects, and notes for every
long string of bytes where it lies in the file instead of reading it.
"""

import codecs
import dataclasses
import math
import os
import pathlib
import pickle
import re
import struct
import tempfile
from collections.abc import Callable
from typing import Any, BinaryIO, cast

import numpy as np

from .errors import DataError, UnsafePickleError


# Strings of bytes longer than this stay in the file. Everything else in a batch (names, numbers, labels) is shorter.
_LONGEST_READ = 1 << 16
_COPY_CHUNK = 1 << 20

# (module, name) -> what our record of it does. numpy 2 calls numpy.core numpy._core, and Python 3 writes bytes for
# protocols 0 to 2 as a call of _codecs.encode. No other global is allowed.
_ALLOWED_GLOBALS = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
    **{
        (f"numpy.{core}.{module}", name): kind
        for core in ("core", "_core")
        for module, name, kind in (
            ("multiarray", "_reconstruct", "reconstruct"),
            ("multiarray", "scalar", "scalar"),
            ("numeric", "_frombuffer", "frombuffer"),
        )
    },
}

# Opcodes that pickle's own reader may handle: they move plain values between the stream, the stack and the memo.
# fmt: off
_PLAIN_OPCODES = (
    "PROTO", "STOP", "MARK", "POP", "POP_MARK", "DUP",
    "NONE", "NEWTRUE", "NEWFALSE",
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "SHORT_BINSTRING", "SHORT_BINBYTES", "UNICODE", "SHORT_BINUNICODE",
    "LIST", "EMPTY_LIST", "APPEND", "APPENDS", "TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "DICT", "EMPTY_DICT", "SETITEM", "SETITEMS",
    "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL",
)
# Opcodes that build objects in ways no array needs.
_REFUSED_OPCODES = (
    "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER",
)
# fmt: on

# What a broken or truncated stream makes the opcode handlers raise.
_BROKEN_STREAM = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


@dataclasses.dataclass(frozen=True)
class FileRange:
    """Bytes that lie in a file.

    Attributes:
        path: the file.
        offset: where the first byte lies.
        length: how many bytes there are.
    """

    path: pathlib.Path
    offset: int
    length: int

    def __len__(self) -> int:
        return self.length

    def read(self) -> bytes:
        """Returns all of the bytes, in memory."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


@dataclasses.dataclass(eq=False)
class StoredType:
    """The element type of a stored array.

    Attributes:
        code: numpy's type code without the byte order, such as "u1"; None for anything but plain numbers.
        byte_order: "<", ">", "|" or "=".
    """

    code: str | None
    byte_order: str = "="

    def numpy_dtype(self) -> np.dtype | None:
        """Returns the numpy type, or None when this is no integer or floating-point number."""
        if self.code is None or not re.fullmatch(r"[iu][1248]|f[248]", self.code):
            return None
        return np.dtype(self.code).newbyteorder(cast(Any, self.byte_order.replace("|", "=")))

    def __str__(self) -> str:
        dtype = self.numpy_dtype()
        return str(self.code) if dtype is None else str(dtype)


@dataclasses.dataclass(eq=False)
class StoredArray:
    """A numpy array as the pickle describes it, its elements possibly still in the file.

    Attributes:
        shape: its lengths.
        element_type: its element type.
        fortran_order: whether the first index runs fastest.
        data: its elements in that order.
    """

    shape: tuple[int, ...] = ()
    element_type: StoredType = dataclasses.field(default_factory=lambda: StoredType(None))
    fortran_order: bool = False
    data: bytes | FileRange | None = None

    def is_whole(self) -> bool:
        """Returns whether the elements are numbers and there are as many bytes of them as shape and type ask for."""
        dtype = self.element_type.numpy_dtype()
        return dtype is not None and self.data is not None and len(self.data) == math.prod(self.shape) * dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _StoredText:
    """Long UTF-8 text that stays in the file: protocols 0 to 2 write bytes in this form."""

    place: FileRange

    def __len__(self) -> int:
        return self.place.length


@dataclasses.dataclass(frozen=True)
class _Global:
    """Stands where the pickle names one of numpy's functions or types."""

    kind: str


class _OpaqueScalar:
    """Stands for a numpy scalar that is no integer."""


def read_pickle(path: pathlib.Path, name: str, spool_folder: pathlib.Path) -> Any:
    """Reads a pickle of plain values and numpy arrays, of any protocol from 0 to 5.

    Nothing in the file is run. Memory does not grow with the size of the arrays.

    Args:
        path: the file.
        name: what errors call it.
        spool_folder: an existing folder; arrays that the file holds as text (protocol 2 written by Python 3) are
            decoded into new files there, which must live as long as the result.

    Returns:
        Dicts, lists, tuples, numbers and strings; numpy integers as int, numpy arrays as :class:`StoredArray`. Strings
        of Python 2 come as bytes.

    Raises:
        UnsafePickleError: the file asks for anything else.
        DataError: it is not a whole pickle.
    """
    with path.open("rb") as file:
        if file.read(16).lstrip().startswith(b"<"):
            raise DataError(f"{name} is a web page, not data: the download did not work")
        file.seek(0)
        try:
            return _ArrayUnpickler(file, path, spool_folder).load()
        except UnsafePickleError as error:
            raise UnsafePickleError(f"{name} {error}") from None
        except _BROKEN_STREAM as error:
            reason = str(error) or type(error).__name__
            raise DataError(f"{name} is not a whole pickle: {reason} (at byte {file.tell():,})") from error


class _BoundedFile:
    """The opened file, refusing to read what does not exist or what no batch needs in one piece."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size

    def read(self, length: int) -> bytes:
        if length > _LONGEST_READ:
            raise pickle.UnpicklingError(f"an item of {length:,} bytes where a short one belongs")
        data = self._file.read(length)
        if len(data) < length:
            raise pickle.UnpicklingError("the file ends early")
        return data

    def readline(self) -> bytes:
        line = self._file.readline(_LONGEST_READ)
        if not line.endswith(b"\n"):
            raise pickle.UnpicklingError("the file ends early, or a line is too long")
        return line

    def skip(self, length: int) -> int:
        """Passes over bytes and returns where they began."""
        offset = self._file.tell()
        if length < 0 or offset + length > self.size:
            raise pickle.UnpicklingError("the file ends early")
        self._file.seek(length, os.SEEK_CUR)
        return offset


class _Handlers(dict):
    """Opcode -> handler; an opcode that is not in it is an error that names it."""

    def __missing__(self, opcode: int) -> Callable[["_ArrayUnpickler"], None]:
        raise pickle.UnpicklingError(f"unknown opcode {bytes([opcode])!r}")


# The pure-Python reader, because only it lets a subclass say what each opcode does: pickle.Unpickler reads every
# string of bytes into memory before anything can look at it, and calls what find_class returned.
class _ArrayUnpickler(pickle._Unpickler):
    # what pickle._Unpickler.load sets
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    append: Callable[[Any], None]
    stack: list[Any]

    def __init__(self, file: BinaryIO, path: pathlib.Path, spool_folder: pathlib.Path) -> None:
        self._bounded = _BoundedFile(file)
        self._path = path
        self._spool_folder = spool_folder
        # encoding="bytes": the strings of Python 2 are bytes to us, whatever they hold
        super().__init__(self._bounded, encoding="bytes")

    def find_class(self, module: str, name: str) -> _Global:
        kind = _ALLOWED_GLOBALS.get((module, name))
        if kind is None:
            raise UnsafePickleError(
                f"wants {module}.{name}, which a batch of images does not need: refused, and nothing of it was run"
            )
        return _Global(kind)

    def _skip_frame_header(self) -> None:
        # A frame only says how many bytes a reader may fetch at once, up to all of them; its content simply follows.
        self.read(8)

    def _load_sized(self, length_format: str, make_short: Callable[[bytes], Any], make_long: Callable) -> None:
        (length,) = struct.unpack(length_format, self.read(struct.calcsize(length_format)))
        if 0 <= length <= _LONGEST_READ:
            self.append(make_short(self.read(length)))
        else:
            self.append(make_long(FileRange(self._path, self._bounded.skip(length), length)))

    def _load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise UnsafePickleError("calls something that is no numpy array: refused, and nothing of it was run")
        self.stack[-1] = getattr(self, f"_make_{function.kind}")(*arguments)

    def _make_ndarray(self, *arguments: object) -> None:
        raise UnsafePickleError("calls numpy.ndarray itself, which no stored array does: refused")

    def _make_reconstruct(self, *arguments: object) -> StoredArray:
        return StoredArray()

    def _make_dtype(self, code: str | bytes, *flags: object) -> StoredType:
        return StoredType(code.decode("ascii") if isinstance(code, bytes) else str(code))

    def _make_scalar(self, element_type: StoredType, data: bytes = b"") -> int | _OpaqueScalar:
        dtype = element_type.numpy_dtype()
        if dtype is None or dtype.kind not in "iu":
            return _OpaqueScalar()
        if len(data) != dtype.itemsize:
            raise pickle.UnpicklingError(f"a number of type {dtype} with {len(data)} bytes")
        return int(np.frombuffer(data, dtype)[0])

    def _make_frombuffer(
        self, data: bytes | FileRange, element_type: StoredType, shape: tuple, order: str, *axes: object
    ) -> StoredArray:
        return _described_array(shape, element_type, order == "F", data)

    def _make_encode(self, text: str | _StoredText, encoding: str) -> bytes | FileRange:
        if encoding not in ("latin1", b"latin1"):
            raise UnsafePickleError(f"wants the codec {encoding!r} for its bytes; stored arrays use latin1: refused")
        if isinstance(text, str):
            return text.encode("latin1")
        return self._spool_text(text.place)

    def _spool_text(self, place: FileRange) -> FileRange:
        # A text of some GB cannot be decoded in memory: every byte of it would be a character.
        decoder = codecs.getincrementaldecoder("utf-8")()
        descriptor, name = tempfile.mkstemp(dir=self._spool_folder, prefix="decoded-")
        with place.path.open("rb") as encoded, os.fdopen(descriptor, "wb") as decoded:
            encoded.seek(place.offset)
            left = place.length
            while left:
                chunk = encoded.read(min(left, _COPY_CHUNK))
                if not chunk:
                    raise pickle.UnpicklingError("the file ends early")
                left -= len(chunk)
                decoded.write(decoder.decode(chunk, final=left == 0).encode("latin1"))
            length = decoded.tell()
        return FileRange(pathlib.Path(name), 0, length)

    def _load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, StoredArray) and isinstance(state, tuple) and len(state) == 5:
            _, shape, element_type, fortran_order, data = state
            built = _described_array(shape, element_type, bool(fortran_order), data)
            vars(target).update(vars(built))
        elif isinstance(target, StoredType) and isinstance(state, tuple) and len(state) >= 5:
            _, byte_order, subarray, field_names, *_ = state
            target.byte_order = byte_order.decode("ascii") if isinstance(byte_order, bytes) else str(byte_order)
            if target.byte_order not in ("<", ">", "|", "="):
                raise pickle.UnpicklingError(f"byte order {target.byte_order!r}")
            if subarray is not None or field_names is not None:
                target.code = None
        else:
            raise UnsafePickleError("sets the state of something that is no numpy array: refused")

    def _load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("utf-8") for _ in range(2))
        self.find_class(module, name)
        raise UnsafePickleError(f"builds a {module}.{name} as an old-style object, which no array is: refused")


def _described_array(shape: Any, element_type: Any, fortran_order: bool, data: Any) -> StoredArray:
    if (
        not isinstance(shape, tuple)
        or not all(isinstance(length, int) and length >= 0 for length in shape)
        or not isinstance(element_type, StoredType)
    ):
        raise pickle.UnpicklingError("an array without proper shape and type")
    if not isinstance(data, bytes | bytearray | FileRange):
        # numpy stores arrays of Python objects as a list of them
        data = None
    elif isinstance(data, bytearray):
        data = bytes(data)
    return StoredArray(shape, element_type, fortran_order, data)


def _refuse(name: str) -> Callable[[_ArrayUnpickler], None]:
    def handler(unpickler: _ArrayUnpickler) -> None:
        raise UnsafePickleError(f"uses the pickle opcode {name}, which a batch of images does not need: refused")

    return handler


def _sized(length_format: str, make_short: Callable, make_long: Callable) -> Callable[[_ArrayUnpickler], None]:
    return lambda unpickler: unpickler._load_sized(length_format, make_short, make_long)


def _keep(value: Any) -> Any:
    return value


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _handlers() -> _Handlers:
    plain = {name: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _PLAIN_OPCODES}
    own = {
        "FRAME": _ArrayUnpickler._skip_frame_header,
        "BINSTRING": _sized("<i", _keep, _keep),
        "BINBYTES": _sized("<I", _keep, _keep),
        "BINBYTES8": _sized("<Q", _keep, _keep),
        "BYTEARRAY8": _sized("<Q", _keep, _keep),
        "BINUNICODE": _sized("<I", _decode, _StoredText),
        "BINUNICODE8": _sized("<Q", _decode, _StoredText),
        "REDUCE": _ArrayUnpickler._load_reduce,
        "BUILD": _ArrayUnpickler._load_build,
        "INST": _ArrayUnpickler._load_inst,
    }
    refused = {name: _refuse(name) for name in _REFUSED_OPCODES}
    return _Handlers((getattr(pickle, name)[0], handler) for name, handler in (plain | own | refused).items())


_ArrayUnpickler.dispatch = _handlers()
