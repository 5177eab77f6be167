"""Arrays of .npz files and of pickles, read in blocks; nothing in a file is run, and no length in it is believed.

A pickle is a program, and the usual loader runs it. Here it finds inert functions of ours in place of numpy's, and
nothing else; and its bytes stay in the file, which is mapped: a batch of ImageNet-64 has 1.57 GB of pixels.
"""

import dataclasses
import math
import mmap
import os
import pathlib
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any, BinaryIO, ClassVar

import numpy as np
from numpy.lib import format as npy

from .errors import DataError, naming_damage


_BLOCK_BYTES = 16 << 20
# what the pickle machine and numpy's reader of headers are led to by a crafted or damaged file
_CRAFTED = (AttributeError, LookupError, TypeError, pickle.UnpicklingError)


@dataclasses.dataclass(frozen=True)
class NpzArray:
    """An array of a .npz file whose elements have not been read: numpy.load would read all of them into memory."""

    file: pathlib.Path | IO[bytes]  # the .npz file, opened or its path
    name: str  # what errors call the array
    entry: zipfile.ZipInfo
    header_bytes: int
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


def open_arrays(file: pathlib.Path | IO[bytes], name: str) -> dict[str, NpzArray]:
    """Reads the headers of all arrays of a .npz file; DataError where one does not tell how many bytes follow."""
    arrays = {}
    with naming_damage(name), zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if not entry.filename.endswith(".npy"):
                continue
            key = entry.filename.removesuffix(".npy")
            array_name = f'{name} array "{key}"'
            with naming_damage(array_name, *_CRAFTED), archive.open(entry) as member:
                version = npy.read_magic(member)
                header = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(member)
                array = NpzArray(file, array_name, entry, member.tell(), *header)
                found, right = entry.file_size - array.header_bytes, math.prod(array.shape) * array.dtype.itemsize
                # Python objects are a pickle, of any length, which nothing here reads
                if (found != right and not array.dtype.hasobject) or min(array.shape, default=0) < 0:
                    raise ValueError(f"{array.shape} of {array.dtype} is {right:,} bytes, but there are {found:,}")
            arrays[key] = array
    return arrays


def read_rows(array: np.ndarray | NpzArray) -> Iterator[np.ndarray]:
    """Reads an array in read-only blocks of rows, of some megabytes; a damaged file may be a DataError at its end."""
    rows_at_once = max(1, _BLOCK_BYTES // max(1, math.prod(array.shape[1:]) * array.dtype.itemsize))
    if isinstance(array, np.ndarray):
        yield from (array[start : start + rows_at_once] for start in range(0, len(array), rows_at_once))
        return
    if array.fortran_order:
        raise DataError(f"{array.name} is in Fortran order: store numpy.ascontiguousarray of it")
    with naming_damage(array.name), zipfile.ZipFile(array.file) as archive, archive.open(array.entry) as member:
        member.read(array.header_bytes)
        for start in range(0, array.shape[0], rows_at_once):
            shape = (min(rows_at_once, array.shape[0] - start), *array.shape[1:])
            data = member.read(math.prod(shape) * array.dtype.itemsize)
            yield np.frombuffer(data, array.dtype).reshape(shape)
        # the checksum is compared when the end is reached
        member.read(1)


def read_pickle(file: BinaryIO, name: str) -> dict[Any, Any]:
    """Reads a pickle of a dict of plain values and numpy arrays, of any protocol from 0 to 5; others are a DataError.

    Arrays of numbers come read-only, others as None, keys as text. The file is mapped, so nobody may shorten it.
    """
    with naming_damage(name, *_CRAFTED):
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        content = _ArrayUnpickler(memory).load()
    return plain_dict(content, name)


def plain_dict(content: Any, name: str) -> dict[Any, Any]:
    """A dict from a pickle, or one inside of it, as `read_pickle` gives it."""
    if not isinstance(content, dict):
        raise DataError(f"{name} holds a {type(content).__name__} instead of a dict")
    return {_text(key): value.array if isinstance(value, _Array) else value for key, value in content.items()}


def _text(value: Any) -> Any:
    """Strings of Python 2 come as bytes."""
    return value.decode("latin1") if isinstance(value, bytes) else value


class _DataType:
    """Stands for a numpy.dtype; of others than numbers nothing is kept."""

    def __init__(self, code: Any, *flags: Any) -> None:
        self.dtype = np.dtype(_text(code)) if re.fullmatch(r"[iu][1248]|f[248]", _text(code)) else None

    def __setstate__(self, state: Any) -> None:
        if self.dtype is not None:
            self.dtype = self.dtype.newbyteorder(_text(state[1]).replace("|", "="))


class _Array:
    """Stands for a numpy.ndarray: numpy's own trusts what a pickle says of its memory."""

    array: np.ndarray | None = None

    def __init__(self, *state: Any) -> None:
        if state:
            self.__setstate__(state)

    def __setstate__(self, state: Any) -> None:
        _, shape, element_type, fortran_order, data = state
        if element_type.dtype is not None:
            elements = np.frombuffer(data, element_type.dtype)
            self.array = elements.reshape(shape, order="F" if fortran_order else "C")


# numpy 2 calls numpy.core numpy._core, and Python 3 writes bytes for protocols 0 to 2 as a call of _codecs.encode.
_FUNCTIONS: dict[str, Callable] = {
    # which no stored array calls: it is only named
    "numpy.ndarray": lambda *arguments: None,
    "numpy.dtype": _DataType,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),
    "numpy.core.multiarray._reconstruct": lambda *arguments: _Array(),
    "numpy.core.multiarray.scalar": lambda kind, data: np.frombuffer(data, kind.dtype).tolist()[0],
    "numpy.core.numeric._frombuffer": lambda data, kind, shape, order, *_: _Array(1, shape, kind, order != "C", data),
}


def _bytes_opcode(length_format: str) -> Callable[[Any], None]:
    """Handles an opcode that holds a length and as many bytes, which stay in the file."""

    def load(unpickler: Any) -> None:
        (length,) = struct.unpack(length_format, unpickler.read(struct.calcsize(length_format)))
        start = unpickler.memory.tell()
        # refuses what lies behind the end
        unpickler.memory.seek(length, os.SEEK_CUR)
        unpickler.append(memoryview(unpickler.memory)[start : start + length])

    return load


# The pure-Python reader, because only it lets a subclass leave bytes in the file.
class _ArrayUnpickler(pickle._Unpickler):
    dispatch: ClassVar = {
        **pickle._Unpickler.dispatch,
        pickle.BINSTRING[0]: _bytes_opcode("<I"),
        pickle.BINBYTES[0]: _bytes_opcode("<I"),
        pickle.BINBYTES8[0]: _bytes_opcode("<Q"),
        pickle.BYTEARRAY8[0]: _bytes_opcode("<Q"),
        # it only says how many bytes a reader may fetch at once, up to all of them; the content simply follows
        pickle.FRAME[0]: lambda unpickler: unpickler.read(8),  # type: ignore[attr-defined]
    }

    def __init__(self, memory: mmap.mmap) -> None:
        super().__init__(memory, encoding="bytes")
        self.memory = memory

    def find_class(self, module: str, name: str) -> Callable:
        function = _FUNCTIONS.get(f"{module}.{name}".replace("numpy._core.", "numpy.core."))
        if function is None:
            raise pickle.UnpicklingError(f"wants {module}.{name}, which arrays do not need; nothing of it was run")
        # each time a new one: a pickle can set attributes on what it was given
        return lambda *arguments: function(*arguments)
