"""The C library's allocator, where it would keep what tensors gave back."""

import ctypes
import sys
from contextlib import suppress

_MMAP_THRESHOLD = -3  # mallopt's M_MMAP_THRESHOLD, glibc


def return_large_blocks(threshold_bytes: int = 2**20) -> None:
    """Let blocks of at least this size go back to the system as soon as they are freed.

    glibc raises its own threshold to 32 MiB once such blocks are freed, and then keeps them: a pass that unpacks
    weights of 10 MB one by one stayed 100 MB above what it used. The price is a page fault for each page again. Outside
    Linux with glibc nothing is changed.
    """
    if sys.platform.startswith("linux"):
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, threshold_bytes)
