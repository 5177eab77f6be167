"""Arrays of .npz files, read in blocks and without pickles.

A .npz file is a zip of .npy members, each a short header and then the elements. numpy.load reads a member
whole, which for a set of images may be more than there is memory. Here the header is read first, and the elements
follow some megabytes at a time, stored or compressed.
"""

import contextlib
import dataclasses
import errno
import lzma
import math
import pathlib
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

import numpy as np

from .errors import DataError


_BLOCK_BYTES = 16 << 20
# What reading a zip raises when it is cut off, damaged, encrypted or packed in a way Python does not know.
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
)
# What numpy's reader of headers raises for bytes that are none: it parses them as a Python literal.
_BROKEN_HEADER = (ValueError, TypeError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError)


@dataclasses.dataclass(frozen=True)
class NpzArray:
    """An array of a .npz file whose header has been read, and whose elements have not.

    Attributes:
        path: the file.
        file_name: what errors call the file.
        key: the name of the array in the file.
        shape: its lengths.
        dtype: the type of its elements, never Python objects.
        fortran_order: whether the first index runs fastest.
        crc32: the checksum that the zip keeps of it, as eight hex digits.
    """

    path: pathlib.Path
    file_name: str
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    crc32: str

    @property
    def name(self) -> str:
        """What errors call the array."""
        return _array_name(self.file_name, self.key)

    def read(self) -> np.ndarray:
        """Reads the whole array, for small ones such as labels.

        Raises:
            DataError: the file is damaged.
        """
        whole = [block.reshape(-1) for block in self._blocks(1, math.prod(self.shape))]
        elements = np.concatenate([np.empty(0, self.dtype), *whole], dtype=self.dtype)
        return elements.reshape(self.shape, order="F" if self.fortran_order else "C")

    def read_rows(self) -> Iterator[np.ndarray]:
        """Reads an array in C order in blocks of some megabytes.

        Returns:
            Arrays (rows, ...) of the array's type, which joined along the first axis are the array; do not write to
            them.

        Raises:
            DataError: the file is damaged; a wrong checksum is seen after the last block.
        """
        for block in self._blocks(math.prod(self.shape[1:]), self.shape[0]):
            yield block.reshape(-1, *self.shape[1:])

    def _blocks(self, row_length: int, num_rows: int) -> Iterator[np.ndarray]:
        with _opened_member(self.path, self.file_name, self.key) as (_, member):
            _read_header(member, self.name)
            yield from read_blocks(member, self.name, num_rows, row_length, self.dtype)
            # the checksum is compared when the end is reached
            member.read(1)


def array_keys(path: pathlib.Path, name: str) -> list[str]:
    """Lists the arrays of a .npz file, in its order.

    Args:
        path: the file.
        name: what errors call it.

    Raises:
        DataError: it is no whole zip.
    """
    with zip_errors(name), zipfile.ZipFile(path) as archive:
        return [member.removesuffix(".npy") for member in archive.namelist() if member.endswith(".npy")]


def open_array(path: pathlib.Path, name: str, key: str) -> NpzArray:
    """Reads the header of an array.

    Args:
        path: the file.
        name: what errors call it.
        key: the name of the array, one of :func:`array_keys`.

    Raises:
        DataError: it is no array of numbers or text, or has more or fewer bytes than its shape asks for.
    """
    array_name = _array_name(name, key)
    with _opened_member(path, name, key) as (entry, member):
        shape, fortran_order, dtype = _read_header(member, array_name)
        if dtype.hasobject:
            raise DataError(
                f"{array_name} holds Python objects, which are stored as a pickle and never read here: "
                "save it as an array of integers or of text"
            )
        found, right = entry.file_size - member.tell(), math.prod(shape) * dtype.itemsize
        if found != right:
            state = "ends early" if found < right else "is longer than its shape asks for"
            raise DataError(f"{array_name} {state}: {shape} of {dtype} makes {right:,} bytes, but there are {found:,}")
    return NpzArray(path, name, key, shape, dtype, fortran_order, f"{entry.CRC:08x}")


def read_blocks(
    opened: IO[bytes], name: str, num_rows: int, row_length: int, dtype: np.dtype | type = np.uint8
) -> Iterator[np.ndarray]:
    """Reads elements that lie one after the other in a file, in blocks of some megabytes.

    Args:
        opened: the file, at the first element.
        name: what errors call it.
        num_rows: how many rows there must be.
        row_length: elements in a row; a block ends with a whole row.
        dtype: the type of an element.

    Returns:
        Read-only arrays (rows, row_length).

    Raises:
        DataError: the file ends before the last row.
    """
    row_bytes = row_length * np.dtype(dtype).itemsize
    rows_at_once = max(1, _BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, num_rows, rows_at_once):
        rows = min(rows_at_once, num_rows - start)
        data = opened.read(rows * row_bytes)
        if len(data) < rows * row_bytes:
            raise DataError(f"{name} ends early, in row {start + len(data) // row_bytes} of {num_rows}")
        # elements without bytes, such as text of no characters, cannot be counted by their bytes
        yield np.frombuffer(data, dtype).reshape(rows, row_length) if data else np.zeros((rows, row_length), dtype)


@contextlib.contextmanager
def zip_errors(name: str) -> Iterator[None]:
    """Turns what reading a damaged zip raises into a DataError that begins with the name."""
    try:
        yield
    except DataError:
        raise
    except _BROKEN_ZIP as error:
        # a damaged offset points outside of the file, and bz2 has no number for its errors; the rest is the system's
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise DataError(
            f"{name} is not a whole zip ({error}): the download stopped early or is something else"
        ) from error


@contextlib.contextmanager
def _opened_member(path: pathlib.Path, name: str, key: str) -> Iterator[tuple[zipfile.ZipInfo, IO[bytes]]]:
    with zip_errors(name), zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
        with archive.open(entry) as member:
            yield entry, member


def _array_name(file_name: str, key: str) -> str:
    return f'{file_name} array "{key}"'


def _read_header(member: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(member)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"version {version} of the format")
        shape, fortran_order, dtype = readers[version](member)
        if min(shape, default=0) < 0:
            raise ValueError(f"shape {shape}")
    except _BROKEN_HEADER as error:
        raise DataError(f"{name} is not a plain numpy array ({error})") from error
    return shape, fortran_order, dtype
