"""Freed memory is kept by processes on a CPU: the second tensor of a size touches no new page."""

import platform
import subprocess
import sys

import pytest
import torch

from training.runtime.kept_memory import keep_freed_memory

# Ten tensors of 64 MB are written, once others have made room. What counts is the new pages for that.
COUNT = """
import resource, sys
import torch
from training.runtime.kept_memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory(torch.device("cpu"))
for _ in range(30):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(pages * resource.getpagesize() / 2**26)
"""


def blocks_touched(how: str) -> float:
    """Return how many tensors' worth of new pages ten tensors took."""
    command = [sys.executable, "-c", COUNT, how]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.soak
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_freed_blocks_are_reused_by_the_next():
    assert blocks_touched("plain") > 9
    assert blocks_touched("kept") < 1


def test_processes_on_a_gpu_are_left_as_they_are():
    assert not keep_freed_memory(torch.device("cuda"))
