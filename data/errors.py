"""What goes wrong with data, as errors that a command line can print in one line."""

import contextlib
import errno
from collections.abc import Iterator


class DataError(ValueError):
    """Data, or options for it, that are not what they should be.

    The message names the file or option, what was found and what would be right.
    """


@contextlib.contextmanager
def naming_damage(name: str) -> Iterator[None]:
    """Turns what reading a damaged file raises into a DataError that begins with its name."""
    try:
        yield
    except DataError:
        raise
    # zipfile, its decompressors, numpy's reader of headers and the pickle machine raise nearly anything
    except Exception as error:
        # a damaged offset points outside of the file, and bz2 has no number for its errors; the rest is the system's
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{name} cannot be read ({reason}): it is cut off, damaged or something else") from error
