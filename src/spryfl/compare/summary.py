"""All datasets of a suite in a line for each method, beside the methods that are compared to every other."""

from collections.abc import Sequence
from statistics import fmean, median

from spryfl.compare.equal_score import NEVER, AtBest, BySeed, by_label, parts
from spryfl.compare.results import Result
from spryfl.compare.tables import Table
from spryfl.data.task import LOWER_IS_BETTER


def summary_table(results: Sequence[Result], contenders: Sequence[str]) -> Table | None:
    """All datasets: how far contenders end above each method, and in what part of its CPU seconds they are as good.

    Both are medians over the datasets that both have runs on, with their ranges: points of the central test at the end
    (means over the seeds that both have; scores of which less is better are left out), and client CPU seconds as in
    `equal_score_table`, with the number of datasets on which the contender was never as good.

    Returns:
        None where no contender has a finished run.
    """
    datasets = list(dict.fromkeys(result.row.dataset for result in results))
    runs = {name: by_label([result for result in results if result.row.dataset == name]) for name in datasets}
    labels = list(dict.fromkeys(result.row.label for result in results))
    present = [label for label in contenders if label in labels]
    lines = []
    for label in labels:
        cells = []
        for contender in present:
            pairs = [(own[contender], own[label]) for own in runs.values() if contender in own and label in own]
            cells += ["", ""] if contender == label else [_points(pairs), _times(pairs)]
        lines.append([label, *cells])
    told = [f"{contender}: {what}" for contender in present for what in ("points higher", "x CPU")]
    return Table(["method", *told], lines) if present else None


def _points(pairs: Sequence[tuple[BySeed, BySeed]]) -> str:
    found = []
    for ours, theirs in pairs:
        higher = [
            100 * (score - other)
            for seed in ours
            if seed in theirs and ours[seed].row.metric not in LOWER_IS_BETTER
            if (score := ours[seed].row.central_test) is not None
            if (other := theirs[seed].row.central_test) is not None
        ]
        found += [fmean(higher)] if higher else []
    return _median(found, "+.1f")


def _times(pairs: Sequence[tuple[BySeed, BySeed]]) -> str:
    compared = [parts(ours, AtBest.of(theirs)) for ours, theirs in pairs]
    found = [own[0] for own in compared if own is not None and own[0] is not None]
    never = compared.count(None)
    told = f"{NEVER} in {never} of {len(compared)}" if never else ""
    return ", ".join(filter(None, (_median(found, ".2f"), told)))


def _median(found: Sequence[float], form: str) -> str:
    """With the range: 0.31 (0.05 to 0.83)."""
    if len(found) < 2:
        return "".join(f"{value:{form}}" for value in found)
    return f"{median(found):{form}} ({min(found):{form}} to {max(found):{form}})"
