"""The byte budget that every chunk size of a pass follows from, and the number of tangents in flight.

Both belong to a pass, not to a model: clients of unequal memory share one frozen model. So does a dry run,
which leaves out chunks that are like others: it tells what a pass takes, and its results mean nothing.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Part = TypeVar("Part")

NO_LIMIT = 2**62  # a budget that no pass needs chunks for
DEFAULT_CHUNK_BYTES = 32 * 2**20  # a row of 512 tokens through a layer of BERT-large with one tangent

# Shares of the budget: what stands at the same time adds up to about one of it.
ROWS_SHARE = 1  # a layer's temporaries for some rows of the batch
ATTENTION_SHARE = 4  # a block of scores, while the layer's own temporaries stand
FEED_FORWARD_SHARE = 2  # a wide middle, once attention's temporaries are gone

_chunk_bytes: ContextVar[int] = ContextVar("chunk_bytes", default=DEFAULT_CHUNK_BYTES)
_num_tangents: ContextVar[int] = ContextVar("num_tangents", default=0)
_dry: ContextVar[bool] = ContextVar("dry", default=False)


def chunk_bytes(share: int = ROWS_SHARE) -> int:
    """The present budget of temporaries, or one part in `share` of it."""
    return max(1, _chunk_bytes.get() // share)


def tangents_in_flight() -> int:
    """K of the present pass; 0 outside forward mode."""
    return _num_tangents.get()


@contextmanager
def chunks_of(num_bytes: int | None) -> Iterator[None]:
    """Let the passes inside keep their temporaries to about this many bytes; changes no result. None: as before."""
    if num_bytes is None:
        yield
        return
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


def each(parts: Iterable[Part]) -> Iterable[Part]:
    """The parts of work done in chunks; in a dry run, of many only the first two and the last.

    The second part differs from the first in what the first left standing (outputs); those
    between it and the last differ in nothing.
    """
    if not is_dry():
        return parts
    known = list(parts)
    return known if len(known) <= 3 else [*known[:2], known[-1]]


def is_dry() -> bool:
    """Whether this is a dry run, whose tensors hold no data to ask questions of."""
    return _dry.get()


@contextmanager
def dry_run() -> Iterator[None]:
    """Let the passes inside leave out chunks that are like others; of what they do, only the memory is right."""
    token = _dry.set(True)
    try:
        yield
    finally:
        _dry.reset(token)
