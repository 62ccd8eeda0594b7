"""Costs at an equal score: what it took others to be as good as a method was at its best."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan

from spryfl.compare.results import Reached, Result, reached
from spryfl.compare.tables import Table, number
from spryfl.data.task import LOWER_IS_BETTER
from spryfl.report.intervals import interval

COSTS: tuple[tuple[str, Callable[[Reached], float]], ...] = (
    ("CPU", lambda there: there.client_cpu_seconds),
    ("bytes", lambda there: float(there.num_bytes)),
)
"""Heading, and what is compared."""
NEVER = "never"

BySeed = Mapping[int, Result]
"""A method's runs on one dataset."""


@dataclass(frozen=True)
class AtBest:
    """A method at its best evaluation on one dataset, seed by seed; the one before training counts too.

    Seeds without an evaluation that is a number are left out.
    """

    scores: Mapping[int, float]
    reached: Mapping[int, Reached]

    @classmethod
    def of(cls, runs: BySeed) -> "AtBest":
        """From its runs."""
        scores = {seed: best for seed, result in runs.items() if (best := _best(result)) is not None}
        return cls(scores, {seed: _reached(runs[seed], score) for seed, score in scores.items()})


def by_label(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
    """One dataset's runs: label -> seed -> run."""
    found: dict[str, dict[int, Result]] = {}
    for result in results:
        found.setdefault(result.row.label, {})[result.row.seed] = result
    return found


def parts(contender: BySeed, best: AtBest) -> tuple[float | None, ...] | None:
    """A contender's costs to be as good as a method was at its best, in parts of the method's own.

    Costs count up to the first evaluated round that is as good, so that rare evaluations are to the disadvantage of
    whoever learns fast. Ratios are of sums over the seeds that both have.

    Returns:
        One for each of `COSTS`, None where the method had no costs; None if the contender was never as good in one of
        the seeds.
    """
    shared = [seed for seed in best.scores if seed in contender]
    found = [reached(contender[seed].events, best.scores[seed], contender[seed].row.metric) for seed in shared]
    known = [own for own in found if own is not None]
    if len(known) < len(found):
        return None
    theirs = [sum(cost(best.reached[seed]) for seed in shared) for _, cost in COSTS]
    ours = [sum(map(cost, known)) for _, cost in COSTS]
    return tuple(own / other if other > 0 else None for own, other in zip(ours, theirs, strict=True))


def equal_score_table(results: Sequence[Result], contenders: Sequence[str]) -> Table | None:
    """One dataset: each method's best evaluation, and contenders' costs to be as good, in parts of its own.

    Args:
        contenders: labels of methods.

    Returns:
        None where no contender has a finished run.
    """
    runs = by_label(results)
    present = [label for label in contenders if label in runs]
    lines = []
    for label, own in runs.items():
        best = AtBest.of(own)
        if not best.scores:
            continue
        seconds = [at.client_cpu_seconds for at in best.reached.values()]
        cells = [interval(list(best.scores.values())).shown(), number(interval(seconds).mean)]
        for contender in present:
            cells += [""] * len(COSTS) if contender == label else _cells(parts(runs[contender], best))
        lines.append([label, *cells])
    told = [f"{contender}: x {heading}" for contender in present for heading, _ in COSTS]
    return Table(["method", "its best", "client CPU (s)", *told], lines) if present else None


def _best(result: Result) -> float | None:
    scores = [event.score for event in result.events if event.score is not None and not isnan(event.score)]
    if not scores:
        return None
    return min(scores) if result.row.metric in LOWER_IS_BETTER else max(scores)


def _reached(result: Result, score: float) -> Reached:
    found = reached(result.events, score, result.row.metric)
    assert found is not None  # its own best
    return found


def _cells(found: tuple[float | None, ...] | None) -> list[str]:
    if found is None:
        return [NEVER] * len(COSTS)
    return ["" if part is None else f"{part:.2f}" for part in found]
