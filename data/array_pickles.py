"""Reading pickles of numpy arrays without running them and without holding the arrays in memory.

A pickle is a program, and the usual loader runs it. Here it finds inert functions of ours in place of numpy's, and
nothing else; and long strings of bytes stay in the file, as one batch of ImageNet-64 has 1.57 GB of pixels.
"""

import contextlib
import io
import math
import os
import pathlib
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from typing import IO, Any, BinaryIO, ClassVar, NamedTuple

import numpy as np

from .errors import DataError, naming_damage
from .npz_source import read_blocks


# Strings of bytes longer than this stay in the file.
_LONGEST_READ = 1 << 16


class FileRange(NamedTuple):
    """Bytes that lie in a file."""

    path: pathlib.Path
    offset: int
    length: int


class StoredArray:
    """An array as the pickle describes it, its elements possibly still in the file.

    Attributes:
        shape: its lengths.
        dtype: the type of its elements, integers or floating-point numbers; None for anything else.
        fortran_order: whether the first index runs fastest.
    """

    shape: tuple[int, ...] = ()
    dtype: np.dtype | None = None
    fortran_order = False
    _data: bytes | FileRange = b""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, element_type, self.fortran_order, self._data = state
        self.dtype = element_type.dtype
        # arrays of Python objects have a list of them here, and no number as their type
        stored = self._data.length if isinstance(self._data, FileRange) else len(self._data)
        if not all(type(length) is int and 0 <= length < 1 << 48 for length in self.shape) or len(self.shape) > 32:
            raise ValueError(f"an array of shape {self.shape!r:.80}")
        if self.dtype is not None and stored != math.prod(self.shape) * self.dtype.itemsize:
            raise ValueError(f"{stored:,} bytes for an array of shape {self.shape} and type {self.dtype}")

    def read_rows(self, name: str) -> Iterator[np.ndarray]:
        """Reads an array of numbers in C order in blocks of some megabytes.

        Args:
            name: what errors call it.
        """
        opened: IO[bytes]
        if isinstance(self._data, FileRange):
            opened = self._data.path.open("rb")
            opened.seek(self._data.offset)
        else:
            opened = io.BytesIO(self._data)
        with contextlib.closing(opened):
            yield from read_blocks(opened, name, self.shape, np.dtype(self.dtype))


class _ElementType:
    """Stands for a numpy.dtype."""

    def __init__(self, code: Any, *flags: Any) -> None:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        self.dtype = np.dtype(code) if re.fullmatch(r"[iu][1248]|f[248]", code) else None

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if self.dtype is not None:
            self.dtype = self.dtype.newbyteorder(order.replace("|", "="))


def _reconstruct(*arguments: Any) -> StoredArray:
    return StoredArray()


def _from_buffer(data: Any, element_type: Any, shape: Any, order: str, *axes: Any) -> StoredArray:
    array = StoredArray()
    array.__setstate__((1, shape, element_type, order != "C", data))
    return array


def _scalar(element_type: Any, data: bytes) -> int | float:
    (value,) = np.frombuffer(data, element_type.dtype).tolist()
    return value


def _encode(text: str, encoding: str | bytes) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"wants the codec {encoding!r:.80}, which stored arrays do not")
    return text.encode("latin1")


def _only_named(*arguments: Any) -> None:
    raise pickle.UnpicklingError("calls numpy.ndarray itself, which no stored array does")


# numpy 2 calls numpy.core numpy._core, and Python 3 writes bytes for protocols 0 to 2 as a call of _codecs.encode.
_FUNCTIONS: dict[str, Callable] = {
    "numpy.ndarray": _only_named,
    "numpy.dtype": _ElementType,
    "_codecs.encode": _encode,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
}


def read_pickle(path: pathlib.Path, name: str) -> Any:
    """Reads a pickle of plain values and numpy arrays, of any protocol from 0 to 5.

    Nothing in the file is run. Memory does not grow with the size of the arrays, but for those written as text
    (protocols 0 to 2 by Python 3).

    Args:
        path: the file; it must live as long as the result.
        name: what errors call it.

    Returns:
        Dicts, lists, tuples, numbers and strings; numpy numbers as int or float, numpy arrays as `StoredArray`.
        Strings of Python 2 come as bytes.

    Raises:
        DataError: it is not a whole pickle, or asks for anything else.
    """
    with path.open("rb") as file, naming_damage(name):
        if file.read(16).lstrip().startswith(b"<"):
            raise DataError(f"{name} is a web page, not data: the download did not work")
        file.seek(0)
        return _ArrayUnpickler(_BoundedFile(file, path), encoding="bytes").load()


class _BoundedFile:
    """The opened file, which takes no memory for what it does not hold."""

    def __init__(self, file: BinaryIO, path: pathlib.Path) -> None:
        self._file = file
        self._path = path
        self._size = os.fstat(file.fileno()).st_size
        self.readline = file.readline

    def read(self, length: int) -> bytes:
        if length < 0 or (length > _LONGEST_READ and length > self._size - self._file.tell()):
            raise EOFError("the file ends early")
        data = self._file.read(length)
        if len(data) < length:
            raise EOFError("the file ends early")
        return data

    def read_later(self, length: int) -> bytes | FileRange:
        if length <= _LONGEST_READ:
            return self.read(length)
        offset = self._file.tell()
        if offset + length > self._size:
            raise EOFError("the file ends early")
        self._file.seek(length, os.SEEK_CUR)
        return FileRange(self._path, offset, length)


def _bytes_opcode(length_format: str) -> Callable[[Any], None]:
    def load(unpickler: Any) -> None:
        (length,) = struct.unpack(length_format, unpickler.read(struct.calcsize(length_format)))
        unpickler.append(unpickler.file.read_later(length))

    return load


def _skip_frame_header(unpickler: Any) -> None:
    # it only says how many bytes a reader may fetch at once, up to all of them; the content simply follows
    unpickler.read(8)


# The pure-Python reader, because only it lets a subclass leave bytes in the file.
class _ArrayUnpickler(pickle._Unpickler):
    dispatch: ClassVar = {
        **pickle._Unpickler.dispatch,
        pickle.BINSTRING[0]: _bytes_opcode("<i"),
        pickle.BINBYTES[0]: _bytes_opcode("<I"),
        pickle.BINBYTES8[0]: _bytes_opcode("<Q"),
        pickle.BYTEARRAY8[0]: _bytes_opcode("<Q"),
        pickle.FRAME[0]: _skip_frame_header,
    }

    def __init__(self, file: _BoundedFile, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self.file = file

    def find_class(self, module: str, name: str) -> Callable:
        function = _FUNCTIONS.get(f"{module}.{name}".replace("numpy._core.", "numpy.core."))
        if function is None:
            raise pickle.UnpicklingError(f"wants {module}.{name}, which arrays do not need; nothing of it was run")
        # each time a new one: a pickle can set attributes on what it was given
        return lambda *arguments: function(*arguments)
