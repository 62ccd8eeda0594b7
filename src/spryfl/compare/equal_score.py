"""Costs at an equal score: what it took others to be as good as a method was at its best."""

from collections.abc import Callable, Mapping, Sequence

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


def equal_score_table(results: Sequence[Result], contenders: Sequence[str]) -> Table | None:
    """One dataset: each method's best evaluation, and contenders' costs to be as good, in parts of its own.

    Costs count up to the first evaluated round that is as good, so that rare evaluations are to the disadvantage of
    whoever learns fast. Ratios are of sums over the seeds that both have; a contender that in any of them was never as
    good has none.

    Args:
        contenders: labels of methods.

    Returns:
        None where no contender has a finished run.
    """
    by_label: dict[str, dict[int, Result]] = {}
    for result in results:
        by_label.setdefault(result.row.label, {})[result.row.seed] = result
    present = [label for label in contenders if label in by_label]
    lines = []
    for label, own in by_label.items():
        best = {seed: _best(result) for seed, result in own.items()}
        there = {seed: _reached(own[seed], best[seed]) for seed in own}
        seconds = [at.client_cpu_seconds for at in there.values()]
        cells = [interval(list(best.values())).shown(), number(interval(seconds).mean)]
        for contender in present:
            cells += [""] * len(COSTS) if contender == label else _ratios(by_label[contender], best, there)
        lines.append([label, *cells])
    told = [f"{contender}: x {heading}" for contender in present for heading, _ in COSTS]
    return Table(["method", "its best", "client CPU (s)", *told], lines) if present else None


def _best(result: Result) -> float:
    """The best score of any evaluation, the one before training included."""
    scores = [event.score for event in result.events if event.score is not None]
    return min(scores) if result.row.metric in LOWER_IS_BETTER else max(scores)


def _reached(result: Result, score: float) -> Reached:
    found = reached(result.events, score, result.row.metric)
    assert found is not None  # its own best
    return found


def _ratios(results: Mapping[int, Result], best: Mapping[int, float], there: Mapping[int, Reached]) -> list[str]:
    """A contender's costs over those of a method, a cell each."""
    shared = [seed for seed in best if seed in results]
    found = [reached(results[seed].events, best[seed], results[seed].row.metric) for seed in shared]
    known = [own for own in found if own is not None]
    if len(known) < len(found):
        return [NEVER] * len(COSTS)
    cells = []
    for _, cost in COSTS:
        theirs = sum(cost(there[seed]) for seed in shared)
        cells.append(f"{sum(map(cost, known)) / theirs:.2f}" if theirs > 0 else "")
    return cells
