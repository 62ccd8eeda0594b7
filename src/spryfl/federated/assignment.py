"""Which client trains which units in a round (Spry's algorithm 1, MapLayersToClients)."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from spryfl.federated.method import Assignment

Dealt = TypeVar("Dealt")


def assign_split(
    units: Sequence[Dealt], cohort: Sequence[int], start: int = 0, first: Sequence[Dealt] = ()
) -> dict[int, tuple[Dealt, ...]]:
    """Deal units out cyclically, so that every client gets work and every unit is trained.

    With at least as many units as clients, unit i goes to client i mod M; with fewer, client m gets unit
    m mod U.

    Args:
        units: the U units, or blocks of them, from the lowest layer up.
        cohort: the M clients.
        start: rotates the units, so that the same client position does not always get the same one.
        first: units dealt before all others, so that any client left over gets one of them too.

    Returns:
        client -> its units, in the model's order.
    """
    rotated = sorted(((i + start) % len(units) for i in range(len(units))), key=lambda i: units[i] not in first)
    if len(units) >= len(cohort):
        dealt = {client: rotated[m :: len(cohort)] for m, client in enumerate(cohort)}
    else:
        dealt = {client: [rotated[m % len(units)]] for m, client in enumerate(cohort)}
    return {client: tuple(units[i] for i in sorted(indices)) for client, indices in dealt.items()}


def assign_all(
    units: Sequence[Dealt], cohort: Sequence[int], start: int = 0, first: Sequence[Dealt] = ()
) -> dict[int, tuple[Dealt, ...]]:
    """Every unit to every client; `start` and `first` change nothing."""
    return {client: tuple(units) for client in cohort}


ASSIGNMENTS: dict[Assignment, Callable[..., dict[int, tuple[int, ...]]]] = {"split": assign_split, "all": assign_all}


def assign_units(
    kind: Assignment,
    units: Sequence[str],
    cohort: Sequence[int],
    start: int,
    shared: Sequence[str] = (),
    blocks: Sequence[Sequence[str]] = (),
    first: Sequence[str] = (),
) -> dict[int, tuple[str, ...]]:
    """Assign units to a cohort; every client also trains the `shared` ones (the head, by default).

    Args:
        blocks: units that are dealt together, from the lowest layer up; by default each alone.
        first: units whose blocks are dealt before all others.
    """
    own = [[unit for unit in block if unit not in shared] for block in blocks or [[unit] for unit in units]]
    dealt = [block for block in own if block]
    if not dealt:
        return {client: tuple(units) for client in cohort}
    urgent = [i for i, block in enumerate(dealt) if any(unit in first for unit in block)]
    assigned = ASSIGNMENTS[kind](range(len(dealt)), cohort, start, urgent)
    kept = {client: {*shared, *(unit for i in chosen for unit in dealt[i])} for client, chosen in assigned.items()}
    return {client: tuple(unit for unit in units if unit in own) for client, own in kept.items()}
