"""How a process that computes on a CPU takes its memory from the system: once, and not again for every step."""

import ctypes
import sys


# Options of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Has the C library keep freed memory for the next step, where it can be told so.

    glibc gets every large block from the system and gives it back when it is freed, and the system clears the pages
    each time they come again. A step takes and frees all its activations so, which was a tenth of the time of the
    demo's training steps. The peak of the process's memory stays what it was; between steps less of it is given back.
    The setting is the whole process's, so command lines choose it and no class does.

    Returns:
        Whether there was a glibc to tell.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # no block of its own for a large request; give nothing back at the top; and ask for 64 MiB at a time
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return all(library.mallopt(option, value) == 1 for option, value in options)
