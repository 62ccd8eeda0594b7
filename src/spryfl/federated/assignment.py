"""Which client trains which units in a round (Spry's algorithm 1, MapLayersToClients)."""

from collections.abc import Callable, Sequence

from spryfl.federated.method import Assignment


def assign_split(units: Sequence[str], cohort: Sequence[int], start: int = 0) -> dict[int, tuple[str, ...]]:
    """Deal units out cyclically, so that every client gets work and every unit is trained.

    With at least as many units as clients, unit i goes to client i mod M; with fewer, client m gets unit
    m mod U.

    Args:
        units: the U units' names, from the lowest layer up.
        cohort: the M clients.
        start: rotates the units, so that the same client position does not always get the same one.

    Returns:
        client -> its units, in the model's order.
    """
    rotated = [(i + start) % len(units) for i in range(len(units))]
    if len(units) >= len(cohort):
        dealt = {client: rotated[m :: len(cohort)] for m, client in enumerate(cohort)}
    else:
        dealt = {client: [rotated[m % len(units)]] for m, client in enumerate(cohort)}
    return {client: tuple(units[i] for i in sorted(indices)) for client, indices in dealt.items()}


def assign_all(units: Sequence[str], cohort: Sequence[int], start: int = 0) -> dict[int, tuple[str, ...]]:
    """Every unit to every client; `start` changes nothing."""
    return {client: tuple(units) for client in cohort}


ASSIGNMENTS: dict[Assignment, Callable[[Sequence[str], Sequence[int], int], dict[int, tuple[str, ...]]]] = {
    "split": assign_split,
    "all": assign_all,
}


def assign_units(
    kind: Assignment, units: Sequence[str], cohort: Sequence[int], start: int, shared: Sequence[str] = ()
) -> dict[int, tuple[str, ...]]:
    """Assign units to a cohort; every client also trains the `shared` ones (the head, by default)."""
    dealt = [unit for unit in units if unit not in shared]
    if not dealt:
        return {client: tuple(units) for client in cohort}
    assigned = ASSIGNMENTS[kind](dealt, cohort, start)
    return {client: (*own, *(unit for unit in units if unit in shared)) for client, own in assigned.items()}


Holds = Callable[[int, str], bool]
"""(client, unit) -> whether the client can train it."""


def assign_held(
    kind: Assignment, units: Sequence[str], cohort: Sequence[int], start: int, shared: Sequence[str], holds: Holds
) -> tuple[dict[int, tuple[str, ...]], tuple[str, ...]]:
    """Assign units to clients that cannot all hold all of them.

    Where every client holds every unit, this is `assign_units`.

    Returns:
        client -> its units, in the model's order, without clients that hold none; and the units that nobody in the
        cohort holds.
    """
    dealt = [unit for unit in units if unit not in shared]
    if kind == "all" or not dealt:
        own = {client: {unit for unit in dealt if holds(client, unit)} for client in cohort}
    else:
        own = _deal_held([dealt[(i + start) % len(dealt)] for i in range(len(dealt))], cohort, holds)
    for client in cohort:
        own[client] |= {unit for unit in shared if holds(client, unit)}
    assigned = {client: tuple(unit for unit in units if unit in mine) for client, mine in own.items() if mine}
    return assigned, tuple(unit for unit in units if not any(holds(client, unit) for client in cohort))


def _deal_held(units: Sequence[str], cohort: Sequence[int], holds: Holds) -> dict[int, set[str]]:
    """Each unit to the client with the fewest that can hold it, those that few can hold first; none goes idle."""
    own: dict[int, set[str]] = {client: set() for client in cohort}
    able = {unit: [client for client in cohort if holds(client, unit)] for unit in units}
    for unit in sorted(units, key=lambda unit: len(able[unit])):  # stable: equals stay in the cycle's order
        if able[unit]:
            own[min(able[unit], key=lambda client: len(own[client]))].add(unit)
    copies = dict.fromkeys(units, 1)
    for client, mine in own.items():
        held = [unit for unit in units if client in able[unit]]
        if not mine and held:
            chosen = min(held, key=lambda unit: copies[unit])
            mine.add(chosen)
            copies[chosen] += 1
    return own
