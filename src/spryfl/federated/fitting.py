"""Units to clients of unequal memory: each gets what it can hold, and settings with which its passes fit.

Pure: what a client can hold is told by a function (`Fit`); whoever predicts memory makes one (`client_memory`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from spryfl.gradients.backprop import Checkpointing
from spryfl.gradients.kinds import SlopesPer


@dataclass(frozen=True)
class PassSettings:
    """How a client's passes are run; None stands for the run's own setting.

    Attributes:
        num_tangents: K, directions a step.
        chunk_bytes: bound on a pass's temporaries.
        estimator: chosen for this client; what follows belongs to it.
        checkpointing, checkpoint_bytes: of backprop, and the layer inputs kept where that is "budgeted".
        horizon, slopes: of guided tangents.
        reason: why the estimator was chosen; no part of the settings.
    """

    num_tangents: int | None = None
    chunk_bytes: int | None = None
    estimator: str | None = None
    checkpointing: Checkpointing | None = None
    checkpoint_bytes: int | None = None
    horizon: int | None = None
    slopes: SlopesPer | None = None
    reason: str = field(default="", compare=False)

    def as_row(self) -> dict[str, Any]:
        """For a round's event; what belongs to a chosen estimator only where it is set."""
        always = {"num_tangents": self.num_tangents, "chunk_bytes": self.chunk_bytes}
        return always | {name: value for name, value in asdict(self).items() if value is not None and value != ""}


Fit = Callable[[int, Sequence[str]], PassSettings | None]
"""(client, units) -> settings with which that client can train them together; None if it cannot."""


@dataclass(frozen=True)
class Deal:
    """Who trains what in a round.

    Attributes:
        units: client -> its units, in the model's order; clients that can hold none are left out.
        settings: of each of those clients.
        unheld: units that no client of the cohort can hold.
    """

    units: dict[int, tuple[str, ...]]
    settings: dict[int, PassSettings]
    unheld: tuple[str, ...] = ()


def deal_within(
    assigned: Mapping[int, Sequence[str]], units: Sequence[str], shared: Sequence[str], fit: Fit | None
) -> Deal:
    """Change an assignment so that every client can hold its part, and every unit that someone can hold is trained.

    A unit that only one client can hold goes to it before anything else. Then a client keeps of its units what fits
    together; the rest goes to those who have room, the least laden first.
    One that kept nothing trains the first unit that fits it, beside another client, or the shared ones alone.

    Args:
        assigned: client -> units, the shared ones included, as if memory were no matter.
        units: all of them, in the model's order.
        shared: units that every client trains.
        fit: None where memory is no matter.
    """
    if fit is None:
        return Deal({client: tuple(own) for client, own in assigned.items()}, dict.fromkeys(assigned, PassSettings()))
    own: dict[int, list[str]] = {client: [] for client in assigned}

    def takes(client: int, unit: str) -> bool:
        """Give a client one unit more if it can hold it beside what it has."""
        if unit in own[client]:
            return True
        if fit(client, [*own[client], unit, *shared]) is not None:
            own[client].append(unit)
            return True
        return False

    for unit in (unit for unit in units if unit not in shared):
        able = [client for client in own if fit(client, [unit, *shared]) is not None]
        if len(able) == 1:
            takes(able[0], unit)
    dealt = {client: [unit for unit in part if unit not in shared] for client, part in assigned.items()}
    homeless = [(client, unit) for client, part in dealt.items() for unit in part if not takes(client, unit)]
    lost = []
    for owner, unit in homeless:
        held = any(unit in part for part in own.values())
        others = sorted((client for client in own if client != owner), key=lambda client: len(own[client]))
        if not held and not any(takes(client, unit) for client in others):
            lost.append(unit)
    for client, part in own.items():
        if not part:
            any(takes(client, unit) for unit in units if unit not in shared)
    chosen = {client: tuple(unit for unit in units if unit in part or unit in shared) for client, part in own.items()}
    settings = {client: found for client, part in chosen.items() if part and (found := fit(client, part)) is not None}
    return Deal(
        {client: chosen[client] for client in settings},
        settings,
        tuple(unit for unit in units if unit in lost or (unit in shared and not settings)),
    )
