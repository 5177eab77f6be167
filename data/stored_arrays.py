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

from .errors import DataError, naming_damage


_BLOCK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class NpzArray:
    """An array of a .npz file whose header has been read, and whose elements have not.

    numpy.load reads an array whole, which for a set of images may be more than there is memory.
    """

    file: pathlib.Path | IO[bytes]  # the .npz file, opened or its path
    name: str  # what errors call the array
    entry: zipfile.ZipInfo
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


def open_arrays(file: pathlib.Path | IO[bytes], name: str) -> dict[str, NpzArray]:
    """Reads the headers of all arrays of a .npz file.

    Raises:
        DataError: it is no whole zip, or an array has more or fewer bytes than its shape asks for.
    """
    arrays = {}
    with naming_damage(name), zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if not entry.filename.endswith(".npy"):
                continue
            key = entry.filename.removesuffix(".npy")
            with naming_damage(f'{name} array "{key}"'), archive.open(entry) as member:
                array = NpzArray(file, f'{name} array "{key}"', entry, *_read_header(member))
                found, right = entry.file_size - member.tell(), math.prod(array.shape) * array.dtype.itemsize
                # Python objects are a pickle, of any length, which nothing here reads
                if (found != right and not array.dtype.hasobject) or min(array.shape, default=0) < 0:
                    raise ValueError(f"{array.shape} of {array.dtype} is {right:,} bytes, but there are {found:,}")
            arrays[key] = array
    return arrays


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    if np.lib.format.read_magic(member) == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


def read_rows(array: np.ndarray | NpzArray) -> Iterator[np.ndarray]:
    """Reads an array in blocks of some megabytes.

    Returns:
        Read-only arrays (rows, ...), which joined along the first axis are the array.

    Raises:
        DataError: a .npz file is damaged, which may be seen after the last block only, or the array in it is in
            Fortran order.
    """
    rows_at_once = max(1, _BLOCK_BYTES // max(1, math.prod(array.shape[1:]) * array.dtype.itemsize))
    if isinstance(array, np.ndarray):
        yield from (array[start : start + rows_at_once] for start in range(0, len(array), rows_at_once))
        return
    if array.fortran_order:
        raise DataError(f"{array.name} is in Fortran order: store numpy.ascontiguousarray of it")
    with naming_damage(array.name), zipfile.ZipFile(array.file) as archive, archive.open(array.entry) as member:
        _read_header(member)
        for start in range(0, array.shape[0], rows_at_once):
            shape = (min(rows_at_once, array.shape[0] - start), *array.shape[1:])
            data = member.read(math.prod(shape) * array.dtype.itemsize)
            yield np.frombuffer(data, array.dtype).reshape(shape)
        # the checksum is compared when the end is reached
        member.read(1)


def read_pickle(file: BinaryIO, name: str) -> dict[Any, Any]:
    """Reads a pickle of a dict of plain values and numpy arrays, of any protocol from 0 to 5.

    Nothing in the file is run. Memory does not grow with the size of the arrays, but for those written as text
    (protocols 0 to 2 by Python 3).

    Returns:
        The dict, its keys as text; numpy numbers as int or float, arrays of numbers read-only, other arrays as None.

    Raises:
        DataError: it is not a whole pickle, asks for anything else, or holds something else than a dict.
    """
    with naming_damage(name):
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if memory[:16].lstrip().startswith(b"<"):
            raise DataError(f"{name} is a web page, not data: the download did not work")
        content = _ArrayUnpickler(memory).load()
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

    def __setstate__(self, state: Any) -> None:
        _, shape, element_type, fortran_order, data = state
        if element_type.dtype is not None:
            elements = np.frombuffer(data, element_type.dtype)
            self.array = elements.reshape(shape, order="F" if fortran_order else "C")


def _from_buffer(data: Any, element_type: Any, shape: Any, order: str, *axes: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, element_type, order != "C", data))
    return array


# numpy 2 calls numpy.core numpy._core, and Python 3 writes bytes for protocols 0 to 2 as a call of _codecs.encode.
_FUNCTIONS: dict[str, Callable] = {
    # which no stored array calls: it is only named
    "numpy.ndarray": lambda *arguments: None,
    "numpy.dtype": _DataType,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),
    "numpy.core.multiarray._reconstruct": lambda *arguments: _Array(),
    "numpy.core.multiarray.scalar": lambda element_type, data: np.frombuffer(data, element_type.dtype).tolist()[0],
    "numpy.core.numeric._frombuffer": _from_buffer,
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
