"""Freed memory stays with the process between forward passes instead of going back and forth."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

# From `malloc.h`, and the values up to which glibc raises the two thresholds by itself, should a
# process once free a block that large; a small model's passes stop just short of that.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP = 32 * 2**20


def keep_freed_memory() -> None:
    """Have glibc keep up to 64 MiB of freed memory for the rest of the process.

    Otherwise every pass may hand its activations back and have the system clear the same pages
    again for the next one: measured as up to 40 % of a small model's time on a CPU. Nothing
    happens without glibc, or where the user has set `MALLOC_...` variables of his own.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with suppress(AttributeError, OSError, TypeError):  # no mallopt, no such library to ask
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP)
