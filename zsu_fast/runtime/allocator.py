"""Keeps memory that is freed and allocated again at each step from going back to the system."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# <malloc.h>: (parameter, environment variable, value after the block unless that is set, value in
# the block). glibc raises its thresholds by itself until they reach those values.
_TRIM = (-1, "MALLOC_TRIM_THRESHOLD_", 64 << 20, (1 << 31) - 1)
_TOP_PAD = (-2, "MALLOC_TOP_PAD_", 128 << 10, 64 << 20)
_MMAP_THRESHOLD = (-3, "MALLOC_MMAP_THRESHOLD_", 32 << 20, 32 << 20)
_MMAP_MAX = (-4, "MALLOC_MMAP_MAX_", 65536, 0)
_PARAMETERS = (_TRIM, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX)


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """In the block, glibc's ``malloc`` keeps freed memory for the next allocation.

    Otherwise it takes activations of more than 32 MB from the system at each step, and gives others
    back; each page of 4 KB then faults and is cleared again. In an ascent on EfficientNet-lite0 in
    batches of 16 that is a third of the time. At the end, the memory goes back to the system. With
    another C library, the block just runs.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    for parameter, _, _, inside in _PARAMETERS:
        libc.mallopt(parameter, inside)
    try:
        yield
    finally:
        for parameter, variable, default, _ in _PARAMETERS:
            libc.mallopt(parameter, int(os.environ.get(variable) or default))
        libc.malloc_trim(0)
