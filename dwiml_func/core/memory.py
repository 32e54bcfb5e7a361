"""Memory that one step frees is kept for the next, where the C library would give it back to the system.

A training step frees tensors of megabytes, and the next step asks for as many again. By default glibc returns large
free blocks to the system, which hands them out again page by page, filled with zeros: a tenth of the time and more.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
_KEPT = 1 << 30
_LARGEST = 32 << 20  # bytes of a block; glibc takes no more


def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GB of freed memory, from blocks of up to 32 MB, until it ends.

    No result changes. The commands call it at their start; a script may do so once, before its first step.

    Returns:
        Whether the C library does so. False where it is not glibc, or where the environment tells it what to keep:
        a `MALLOC_...` variable or `GLIBC_TUNABLES`.

    Example:
        >>> from dwiml_func import keep_freed_memory
        >>> is_kept = keep_freed_memory()
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _KEPT))
