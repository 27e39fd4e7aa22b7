"""How the process gives memory back to the system."""
from __future__ import annotations

import ctypes

__all__ = ['keep_freed_memory']

# Numbers of `mallopt` in glibc's malloc.h, which has no names at run time; 32 MiB is the most that the second takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next allocation, for the rest of the process.

    By default activations that a step frees go back to the system, and the next step has every page of them cleared
    again, which is 5 to 20% of the time of a training step on a CPU (docs/PERFORMANCE.md). No value changes.

    Returns:
        Whether it was done: `False` where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD))
