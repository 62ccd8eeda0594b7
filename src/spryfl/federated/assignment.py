"""Which client trains which units in a round (Spry's algorithm 1, MapLayersToClients)."""

from collections.abc import Callable, Sequence

from spryfl.federated.method import Assignment


def assign_split(
    units: Sequence[str], cohort: Sequence[int], start: int = 0, first: Sequence[str] = ()
) -> dict[int, tuple[str, ...]]:
    """Deal units out cyclically, so that every client gets work and every unit is trained.

    With at least as many units as clients, unit i goes to client i mod M; with fewer, client m gets unit
    m mod U.

    Args:
        units: the U units' names, from the lowest layer up.
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
    units: Sequence[str], cohort: Sequence[int], start: int = 0, first: Sequence[str] = ()
) -> dict[int, tuple[str, ...]]:
    """Every unit to every client; `start` and `first` change nothing."""
    return {client: tuple(units) for client in cohort}


Assign = Callable[[Sequence[str], Sequence[int], int, Sequence[str]], dict[int, tuple[str, ...]]]
ASSIGNMENTS: dict[Assignment, Assign] = {
    "split": assign_split,
    "all": assign_all,
}


def assign_units(
    kind: Assignment,
    units: Sequence[str],
    cohort: Sequence[int],
    start: int,
    shared: Sequence[str] = (),
    first: Sequence[str] = (),
) -> dict[int, tuple[str, ...]]:
    """Assign units to a cohort, the `first` ones first; every client also trains the `shared` ones (the head, say)."""
    dealt = [unit for unit in units if unit not in shared]
    if not dealt:
        return {client: tuple(units) for client in cohort}
    assigned = ASSIGNMENTS[kind](dealt, cohort, start, first)
    return {client: (*own, *(unit for unit in units if unit in shared)) for client, own in assigned.items()}
