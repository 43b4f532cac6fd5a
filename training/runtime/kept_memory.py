"""Memory that a process on a CPU keeps once it has it, instead of giving it back after every tensor."""

import ctypes
import sys

import torch

# Names and numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_TRIM = 2**31 - 1  # the arguments are C's int
ONE_BLOCK = 2**30


def keep_freed_memory(device: torch.device) -> bool:
    """Let glibc reuse the memory of freed tensors, in a process that computes on this device.

    glibc asks the kernel for every block above 32 MB, and returns it when it is freed. The activations of an
    image tokenizer are of that size, and the kernel writes zeros into each of their pages before they are
    first written: an eighth to a quarter of a training step (benchmarks/README.md, whole steps). What a process
    holds at most grows by some per cent, and it holds it to its end. Blocks above 1 GiB are still returned.

    Returns:
        Whether this C library takes these settings. Others (macOS, musl) are left as they are, and so are
        processes that compute on a GPU.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(name, value) == 1
        for name, value in ((M_MMAP_THRESHOLD, ONE_BLOCK), (M_TRIM_THRESHOLD, LARGEST_TRIM))
    )
