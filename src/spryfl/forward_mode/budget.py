"""The byte budget that every chunk size of a pass follows from, and the number of tangents in flight.

Both belong to a pass, not to a model: clients of unequal memory share one frozen model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

DEFAULT_CHUNK_BYTES = 32 * 2**20  # larger chunks were measured no faster (docs/results/memory.md)

# Shares of the budget: what stands at the same time adds up to about one of it.
ROWS_SHARE = 1  # a layer's temporaries for some rows of the batch
ATTENTION_SHARE = 4  # a block of scores, while the layer's own temporaries stand
FEED_FORWARD_SHARE = 2  # a wide middle, once attention's temporaries are gone

_chunk_bytes: ContextVar[int] = ContextVar("chunk_bytes", default=DEFAULT_CHUNK_BYTES)
_num_tangents: ContextVar[int] = ContextVar("num_tangents", default=0)


def chunk_bytes(share: int = ROWS_SHARE) -> int:
    """The present budget of temporaries, or one part in `share` of it."""
    return max(1, _chunk_bytes.get() // share)


def tangents_in_flight() -> int:
    """K of the present pass; 0 outside forward mode."""
    return _num_tangents.get()


@contextmanager
def chunks_of(num_bytes: int) -> Iterator[None]:
    """Let the passes inside keep their temporaries to about this many bytes; changes no result."""
    token = _chunk_bytes.set(num_bytes)
    try:
        yield
    finally:
        _chunk_bytes.reset(token)


@contextmanager
def carrying(num_tangents: int) -> Iterator[None]:
    """Announce K tangents to the passes inside, so that chunks are cut for them from the first layer on."""
    token = _num_tangents.set(num_tangents)
    try:
        yield
    finally:
        _num_tangents.reset(token)
