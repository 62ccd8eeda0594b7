"""Which estimator a client uses: of those its memory holds, the one with the most expected progress per second.

Pure: candidates come with what they are predicted to take and to bring; whoever predicts makes them
(`client_choice`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spryfl.federated.fitting import PassSettings

KINDS = ("backprop", "per_layer", "guided", "forward")
"""What has a speed of its own; backprop within a budget runs as per layer does."""


@dataclass(frozen=True)
class Calibration:
    """What was measured before the first round, and the choice rests on: a resumed run takes it over.

    Attributes:
        speeds: kind -> seconds of a step by the seconds its operations would take at the speed of inference's; in
            any unit, as only their ratios matter. Kinds that were not measured count as the mean of the others.
        cosines: place of a layer's call -> measured cosine of its guess; empty for the default table.
    """

    speeds: Mapping[str, float] = field(default_factory=dict)
    cosines: Mapping[int, float] = field(default_factory=dict)

    def speed(self, kind: str) -> float:
        known = self.speeds.values()
        return self.speeds.get(kind, sum(known) / len(known) if known else 1.0)


@dataclass(frozen=True)
class Candidate:
    """One estimator with its settings.

    Attributes:
        name: for people: "guided h=2 without slopes".
        peak_bytes: predicted resident peak of a step.
        seconds: predicted, of a step; in any unit that is the same for all candidates.
        progress: expected of a step, as a share of an exact gradient's (`gradients.progress`).
    """

    name: str
    settings: PassSettings
    peak_bytes: int
    seconds: float
    progress: float

    @property
    def kind(self) -> str:
        """What its speed is measured as: one of `KINDS`."""
        if self.settings.estimator != "backprop":
            return str(self.settings.estimator)
        return "backprop" if self.settings.checkpointing == "none" else "per_layer"

    @property
    def rate(self) -> float:
        """Expected progress per second."""
        return self.progress / self.seconds


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, and why in one line."""

    candidate: Candidate
    reason: str


def choose(candidates: Sequence[Candidate], budget: int | None) -> Choice | None:
    """The candidate with the most expected progress per second among those that fit; None if none does.

    Predictions are not so precise that a hundredth should decide: candidates within that of the best are equal, and
    the one that takes least memory is chosen, then the first. If no progress is expected of any, the fastest counts
    as best.

    Args:
        budget: resident bytes; None where memory is no matter.
    """
    fitting = [c for c in candidates if budget is None or c.peak_bytes <= budget]
    if not fitting:
        return None
    best = max(c.rate for c in fitting)
    if best > 0:
        equals = [c for c in fitting if c.rate >= 0.99 * best]
    else:
        least = min(c.seconds for c in fitting)
        equals = [c for c in fitting if c.seconds <= 1.01 * least]
    chosen = min(equals, key=lambda c: c.peak_bytes)
    return Choice(chosen, _reason(chosen, fitting, len(candidates) - len(fitting), budget))


def _reason(chosen: Candidate, fitting: Sequence[Candidate], num_larger: int, budget: int | None) -> str:
    """Rates are given relative to the chosen one's."""
    room = ""
    if budget is not None:
        room = f"fits {_megabytes(budget)} with {_megabytes(budget - chosen.peak_bytes)} to spare; "
    others = [c for c in fitting if c is not chosen]
    if not others:
        alone = "the only candidate" if num_larger == 0 else f"the only one of {num_larger + 1} that fits"
        return f"{chosen.name}: {room}{alone}"
    following = max(others, key=lambda c: c.rate)
    if chosen.rate == 0:
        return f"{chosen.name}: {room}no progress expected of any that fits, and it is the fastest"
    return f"{chosen.name}: {room}progress per second 1.0, next {following.name} {following.rate / chosen.rate:.2g}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 10**7 else f"{count / 1e6:.2g} MB"
