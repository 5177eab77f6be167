"""The device that an option names, and the memory that a CPU run frees and takes again."""

import ctypes
import json
import sys

import pytest
import torch

from imagenet64_diffusion.tests.commands.processes import run_command
from imagenet64_diffusion.utils.devices import find_device, keep_freed_memory


@pytest.mark.parametrize("name", ["cdua", "", "cuda:99", "cpu:x"])
def test_devices_that_are_not(name):
    refusal = f"^device is {name}, but must be one that torch has on this machine, [^\n]*$"
    with pytest.raises(ValueError, match=refusal):
        find_device(name)


def main(argv):
    """Prints what glibc itself counts for a large block that comes and goes."""
    names = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
    mallinfo2 = type("Mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = mallinfo2
    if argv == ["kept"]:
        assert keep_freed_memory()
    before = libc.mallinfo2()
    block = torch.empty(100_000_000)  # more than any hole of the heap
    held = libc.mallinfo2()
    del block
    after = libc.mallinfo2()
    given_back = held.arena + held.hblkhd - after.arena - after.hblkhd
    print(json.dumps([held.hblkhd - before.hblkhd, held.arena - before.arena, given_back]))


@pytest.mark.skipif(
    not (sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallinfo2")),
    reason="another C library than glibc 2.33 or newer",
)
def test_a_large_block_comes_from_the_heap_and_stays_there():
    """As glibc itself counts: where the heap lies, and who else uses memory, makes no difference."""
    size = 400_000_000
    mapped, _, given_back = json.loads(run_command("tests.utils.test_devices", "usual").stdout)
    assert min(mapped, given_back) >= size
    mapped, heap, given_back = json.loads(run_command("tests.utils.test_devices", "kept").stdout)
    assert mapped == given_back == 0
    assert heap >= size
