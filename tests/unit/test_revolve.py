"""The binomial schedule: valid for any chain and room, optimal against a search of every schedule."""

from heapq import heappop, heappush
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spryfl.gradients.revolve import Advance, Free, Keep, Reverse, num_advances, reversal, steps_to_keep


def perform(num_steps: int, kept: tuple[int, ...], num_kept: int) -> int:
    """Carry a schedule out on state numbers, checking each action; returns the steps run again."""
    states, at_hand, advances, left = set(kept), None, 0, num_steps
    for action in reversal(num_steps, kept, num_kept):
        if isinstance(action, Advance):
            assert action.start in states
            assert action.start < action.stop < left
            at_hand, advances = action.stop, advances + action.stop - action.start
        elif isinstance(action, Keep):
            assert action.step == at_hand
            states.add(action.step)
            at_hand = None
        elif isinstance(action, Free):
            states.remove(action.step)
        else:
            assert isinstance(action, Reverse)
            assert action.step == left - 1  # every step once, in order
            assert action.step == at_hand if at_hand is not None else action.step in states
            left, at_hand = action.step, None
        assert len(states) <= num_kept
    assert left == 0
    assert not states
    return advances


@given(st.integers(1, 60), st.integers(1, 70))
def test_schedules_are_valid(num_steps: int, num_kept: int) -> None:
    kept = steps_to_keep(num_steps, num_kept)
    assert kept[0] == 0
    assert len(kept) <= num_kept
    assert list(kept) == sorted(set(kept) & set(range(num_steps)))
    advances = perform(num_steps, kept, num_kept)
    assert advances == num_advances(num_steps, num_kept)
    if num_kept >= num_steps:
        assert advances == 0
    if num_kept == 1:
        assert advances == num_steps * (num_steps - 1) // 2


@given(st.data())
def test_any_kept_states_serve(data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(1, 20))
    kept = (0, *sorted(data.draw(st.sets(st.integers(1, num_steps)).map(lambda s: s - {num_steps}))))
    num_kept = data.draw(st.integers(len(kept), 25))
    assert perform(num_steps, kept, num_kept) >= num_advances(num_steps, num_kept)


def fewest_by_search(num_steps: int, num_kept: int) -> int:
    """Dijkstra over (states kept, state at hand, steps left): every schedule there is, none assumed good."""
    starts = [(0, (0, *others)) for size in range(num_kept) for others in combinations(range(1, num_steps), size)]
    queue: list[tuple[int, tuple[int, ...], int, int]] = [(cost, kept, -1, num_steps) for cost, kept in starts]
    done = set()
    while queue:
        cost, kept, hand, left = heappop(queue)
        if left == 0:
            return cost
        if (kept, hand, left) in done:
            continue
        done.add((kept, hand, left))
        if left - 1 in kept or left - 1 == hand:
            heappush(queue, (cost, kept, -1, left - 1))
        for state in kept:  # take a kept state in hand, or free it
            heappush(queue, (cost, kept, state, left))
            if len(kept) > 1:
                heappush(queue, (cost, tuple(s for s in kept if s != state), hand, left))
        if hand >= 0:
            if hand + 1 < left:
                heappush(queue, (cost + 1, kept, hand + 1, left))
            if hand not in kept and len(kept) < num_kept:
                heappush(queue, (cost, tuple(sorted((*kept, hand))), hand, left))
    raise AssertionError("no schedule found")


@pytest.mark.parametrize("num_kept", [1, 2, 3, 4])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 7, 8])
def test_no_schedule_advances_less(num_steps: int, num_kept: int) -> None:
    assert num_advances(num_steps, num_kept) == fewest_by_search(num_steps, num_kept)


def test_known_schedule() -> None:
    """Six layers with room for two: by hand."""
    assert steps_to_keep(6, 2) == (0, 3)
    # Back to 5 and 4 from 3; then 0 to 1, which is kept, and on to 2.
    assert num_advances(6, 2) == 2 + 1 + 1 + 1
    assert num_advances(24, 4) == 30
