"""What goes wrong with data, as errors that a command line prints in one line."""

import contextlib
import errno
import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator


# what zipfile, its decompressors and numpy raise for damaged files; RuntimeError for those that they do not support
_READING_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, EOFError, MemoryError, OverflowError, RuntimeError, SyntaxError, ValueError),
    *(struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tokenize.TokenError),
)


class DataError(ValueError):
    """Data, or options for it, that are not what they should be; the message names the file or option."""


@contextlib.contextmanager
def naming_damage(name: str, *more: type[Exception]) -> Iterator[None]:
    """Turns what reading a damaged file raises, and ``more``, into a DataError that begins with its name."""
    try:
        yield
    except DataError:
        raise
    except _READING_ERRORS + more as error:
        # a damaged offset points outside of the file, and bz2 has no number for its errors; the rest is the system's
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{name} cannot be read ({reason}): it is cut off, damaged or something else") from error
