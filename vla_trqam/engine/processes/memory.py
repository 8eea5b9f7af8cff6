"""Keeping freed memory, so that an update does not fetch its pages anew from the system."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep what is freed instead of returning it to the system.

    An update of a large network allocates and frees hundreds of megabytes; by default every tensor
    above a threshold is mapped and zeroed page by page each time. Returns whether this C library
    has the switch; without it everything works, only slower.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(
        library.mallopt(_TRIM_THRESHOLD, _NEVER) and library.mallopt(_MMAP_THRESHOLD, _NEVER)
    )
