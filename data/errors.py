"""What goes wrong with data, as errors that a command line can print in one line."""

import contextlib
import errno
import lzma
import pickle
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator


class DataError(ValueError):
    """Data, or options for it, that are not what they should be.

    The message names the file or option, what was found and what would be right.
    """


# What zipfile and its decompressors, numpy's reader of headers (which parses a Python literal) and the pickle machine
# raise for bytes that are cut off, damaged or something else.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, pickle.UnpicklingError, struct.error, tokenize.TokenError),
    *(SyntaxError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError),
    # numpy makes strings of any four bytes, also of those that are no character
    *(ValueError, OSError, SystemError),
)


@contextlib.contextmanager
def naming_damage(name: str) -> Iterator[None]:
    """Turns what reading a damaged file raises into a DataError that begins with its name."""
    try:
        yield
    except DataError:
        raise
    except _DAMAGE as error:
        # a damaged offset points outside of the file, and bz2 has no number for its errors; the rest is the system's
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{name} cannot be read ({reason}): it is cut off, damaged or something else") from error
