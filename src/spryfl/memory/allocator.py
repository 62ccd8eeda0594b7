"""The C library's allocator, where it would keep what tensors gave back."""

import ctypes
import sys

_MMAP_THRESHOLD = -3  # mallopt's M_MMAP_THRESHOLD, glibc


def return_large_blocks(threshold_bytes: int = 2**20) -> bool:
    """Let blocks of at least this size go back to the system as soon as they are freed.

    glibc raises its own threshold to 32 MiB once such blocks are freed, and then keeps them: a pass that unpacks
    weights of 10 MB one by one stayed 100 MB above what it used. The price is a page fault for each page again.

    Returns:
        Whether the allocator took the setting; False outside Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, threshold_bytes))
