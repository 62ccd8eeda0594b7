"""Which states of a chain to keep, and how to go back through it with only those.

A chain of L steps maps state 0 to state L; its end (the head and the loss) needs state L alone. To reverse
step i one needs state i. With room for c states, the rest is computed again from the nearest kept one below.
The binomial schedule does so in the fewest steps (revolve: Griewank & Walther 2000, ACM TOMS 26, algorithm
799). Pure: it names what to do, and whoever owns the states does it.
"""

from collections.abc import Iterator, Sequence
from math import comb
from typing import NamedTuple


class Advance(NamedTuple):
    """From kept state `start`, run steps start .. stop - 1: state `stop` is now the one at hand."""

    start: int
    stop: int


class Keep(NamedTuple):
    """Keep the state at hand, which is state `step`."""

    step: int


class Reverse(NamedTuple):
    """Reverse step `step`: state `step` is kept, or else at hand."""

    step: int


class Free(NamedTuple):
    """Kept state `step` is needed no more."""

    step: int


Action = Advance | Keep | Reverse | Free


def steps_to_keep(num_steps: int, num_kept: int) -> tuple[int, ...]:
    """The states to keep while the chain is first run from state 0 to its end, 0 always among them.

    Args:
        num_steps: L, at least 1.
        num_kept: c, at least 1: states that may be kept at a time.
    """
    # The chain's end is one more step, reversed first: what stands there needs no state of its own.
    start, stop, free = 0, num_steps + 1, num_kept
    kept = [start]
    while free > 1 and stop - start > 2:
        start += _first_split(stop - start, free)
        kept.append(start)
        free -= 1
    return tuple(kept)


def reversal(num_steps: int, kept: Sequence[int], num_kept: int) -> Iterator[Action]:
    """What to do, in order, to reverse steps L - 1, .., 0 once the chain has been run to its end.

    Args:
        num_steps: L.
        kept: the states kept on the way, ascending from 0. Those of `steps_to_keep` give the fewest
            advances; any others are correct.
        num_kept: c, at least `len(kept)`: never are more states kept.
    """
    stop = num_steps
    for below, start in reversed(list(enumerate(kept))):
        yield from _reverse_segment(start, stop, num_kept - below)
        yield Free(start)
        stop = start


def num_advances(num_steps: int, num_kept: int) -> int:
    """Steps run again, beyond one each way a step, by the best schedule: 0 where every state can be kept."""
    return _fewest(num_steps + 1, num_kept) - num_steps


def _reverse_segment(start: int, stop: int, free: int) -> Iterator[Action]:
    """Reverse steps stop - 1 .. start, state `start` kept in one of `free` places."""
    while stop - start > 1 and free > 1:
        middle = start + _first_split(stop - start, free)
        yield Advance(start, middle)
        yield Keep(middle)
        yield from _reverse_segment(middle, stop, free - 1)
        yield Free(middle)
        stop = middle
    for step in reversed(range(start, stop)):
        if step > start:
            yield Advance(start, step)
        yield Reverse(step)


def _first_split(length: int, free: int) -> int:
    """How far to advance before the next state is kept: the k of the fewest advances."""
    return min(range(1, length), key=lambda k: k + _fewest(length - k, free - 1) + _fewest(k, free))


def _fewest(length: int, free: int) -> int:
    """Advances that reversing `length` steps takes at least: r l - binom(c + r, r - 1).

    r, how often a step is run at most, is the least with binom(c + r, c) >= l (theorem 6.1 of Griewank 1992).
    """
    r = 0
    while comb(free + r, free) < length:
        r += 1
    return r * length - comb(free + r, r - 1) if r else 0
