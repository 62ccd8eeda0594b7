"""What clients of unequal memory can hold: the units and the estimator's settings that fit each one's budget."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ClientSettings:
    """How one client runs its estimator in a round.

    Attributes:
        num_tangents: K; backprop has none.
        chunk_bytes: budget of a pass's temporaries; changes no result.
        streamed: whether its weights stay on disk.
    """

    num_tangents: int
    chunk_bytes: int
    streamed: bool = False


@dataclass(frozen=True)
class Capacity:
    """Memory budgets, and what they would have to hold.

    Attributes:
        budgets: bytes; dealt to partition ids in turn.
        settings: from the most wanted to the least.
        peak_bytes: by unit, from the lowest layer up: the predicted peak under each of the settings, if it is the
            lowest that a client trains. No unit takes more than those below it.
    """

    budgets: tuple[int, ...]
    settings: tuple[ClientSettings, ...]
    peak_bytes: Mapping[str, tuple[int, ...]]

    def budget(self, client: int) -> int:
        """Bytes of a partition id's client."""
        return self.budgets[client % len(self.budgets)]

    def fit(self, client: int, units: Collection[str]) -> ClientSettings | None:
        """The most wanted settings under which a client can train these units; None if it cannot."""
        for place, settings in enumerate(self.settings):
            if max(self.peak_bytes[unit][place] for unit in units) <= self.budget(client):
                return settings
        return None

    def holds(self, client: int, unit: str) -> bool:
        return self.fit(client, (unit,)) is not None

    def unheld(self, clients: Sequence[int]) -> tuple[str, ...]:
        """Units that none of these clients can hold."""
        return tuple(unit for unit in self.peak_bytes if not any(self.holds(client, unit) for client in clients))

    def least(self) -> int:
        """Bytes that suffice for some unit."""
        return min(min(peaks) for peaks in self.peak_bytes.values())
