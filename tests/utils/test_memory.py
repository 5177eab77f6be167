"""Memory that a CPU run frees and takes again."""

import subprocess
import sys

import pytest

from imagenet64_diffusion.utils.memory import keep_freed_memory


PROGRAM = """
import resource, sys
import torch
from imagenet64_diffusion.utils.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()

def step():
    return [torch.ones(10_000_000) for _ in range(3)]

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="another C library than glibc")
def test_pages_come_once():
    """Fifteen blocks of 40 MB are 150,000 pages, each of which is a fault when it comes from the system.

    Where the heap has a gap at a wrong place, one block or two may be taken from the system all the same.
    """
    faults = {
        name: int(subprocess.run([sys.executable, "-c", PROGRAM, name], check=True, capture_output=True).stdout)
        for name in ("given_back", "kept")
    }
    assert faults["given_back"] > 4 * faults["kept"]
