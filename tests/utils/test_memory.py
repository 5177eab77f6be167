"""Memory that a CPU run frees and takes again."""

import ctypes
import json
import subprocess
import sys

import pytest

from imagenet64_diffusion.utils.memory import keep_freed_memory


PROGRAM = """
import ctypes, json, sys
import torch
from imagenet64_diffusion.utils.memory import keep_freed_memory

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2
if sys.argv[1] == "kept":
    assert keep_freed_memory()
before = libc.mallinfo2()
block = torch.ones(10_000_000)
held = libc.mallinfo2()
del block
after = libc.mallinfo2()
print(json.dumps({"mapped": held.hblkhd - before.hblkhd, "heap": held.arena - before.arena,
                  "given_back": held.arena + held.hblkhd - after.arena - after.hblkhd}))
"""


@pytest.mark.skipif(
    not (sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallinfo2")),
    reason="another C library than glibc 2.33 or newer",
)
def test_a_large_block_comes_from_the_heap_and_stays_there():
    """As glibc itself counts: where the heap lies, and who else uses memory, makes no difference."""
    usual, kept = (
        json.loads(subprocess.run([sys.executable, "-c", PROGRAM, name], check=True, capture_output=True).stdout)
        for name in ("usual", "kept")
    )
    size = 40_000_000
    assert usual["mapped"] >= size
    assert usual["given_back"] >= size
    assert kept["mapped"] == 0
    assert kept["heap"] >= size
    assert kept["given_back"] == 0


def test_elsewhere_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
