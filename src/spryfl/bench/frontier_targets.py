"""What the frontier had to reach within forward mode's memory: each target held against the measured runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import mean

from spryfl.bench.frontier_report import (
    ALLOWED,
    Curve,
    Row,
    best_evaluations,
    by_name,
    on_shared_rounds,
    seconds_ratio,
)
from spryfl.bench.frontier_works import SEEDS


@dataclass(frozen=True)
class Target:
    """A share of backprop's gain at equal rounds: what it must be, and what is aimed at."""

    task: str
    must: float
    aim: float


TARGETS = (
    Target("snli", 0.6, 0.95),
    Target("prompted_sst2", 0.85, 1.0),
    Target("prompted_ag_news", 0.75, 0.95),
)
MOST_SECONDS, AIM_SECONDS = 2, 1  # of the clients' CPU, in checkpointed backprop's at equal accuracy
MOST_OF_FEDMEZO, AIM_OF_FEDMEZO = 1 / 5, 1 / 20  # the same in FedMeZO's
FEDMEZO = "zeroth order"


def targets_table(rows: Sequence[Row], stock_peaks: Mapping[str, int]) -> str:
    """Of every task with a target, the estimators within the allowed memory that ran on all seeds, best first.

    Args:
        stock_peaks: task -> bytes that stock inference takes.
    """
    lines = [
        f"| at most {ALLOWED} x stock inference's peak | share of backprop's gain: must, aim | is (each seed) "
        "| x inference's peak | client seconds at its best, in backprop's to be as good: "
        f"at most {MOST_SECONDS}, aim {AIM_SECONDS} | to be as good as FedMeZO at its best, in FedMeZO's: "
        f"at most {MOST_OF_FEDMEZO:.2f}, aim {AIM_OF_FEDMEZO:.2f} |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for target in TARGETS:
        own = by_name([row for row in rows if row["task"] == target.task])
        if "backprop" not in own:  # there is no gain to have a share of
            continue
        fedmezo = max((runs for name, runs in own.items() if name.startswith(FEDMEZO)), key=_best_accuracy, default=[])
        limit = ALLOWED * stock_peaks[target.task]
        found = {
            name: sorted(runs, key=lambda run: int(run["seed"]))
            for name, runs in own.items()
            if len(runs) == len(SEEDS)
            and not name.startswith(("backprop", "head", FEDMEZO))
            and max(run["activation_peak_bytes"] for run in runs) <= limit
            and all(run["share_recovered"] is not None for run in runs)  # backprop gained nothing
        }
        for name in sorted(found, key=lambda name: -_share(found[name])):
            runs = found[name]
            each = ", ".join(f"{run['share_recovered']:.2f}" for run in runs)
            peak = max(run["activation_peak_bytes"] for run in runs) / stock_peaks[target.task]
            missed = "" if _share(runs) >= target.must else "**missed**: "
            lines.append(
                f"| {target.task}: {name} | {target.must}, {target.aim} | {missed}{_share(runs):.2f} ({each}) "
                f"| {peak:.2f} | {_in_backprops(runs, own['backprop'])} | {_in_fedmezos(runs, fedmezo)} |"
            )
    return "\n".join(lines) + "\n"


def _best_accuracy(runs: Sequence[Row]) -> float:
    return mean(best_evaluations(_curves(runs))[0].values())


def _share(runs: Sequence[Row]) -> float:
    return mean(run["share_recovered"] for run in runs)


def _in_backprops(runs: Sequence[Row], backprop: Sequence[Row]) -> str:
    """Client CPU seconds to an estimator's best evaluation, in those that backprop takes to be as good.

    Both at rounds where both were evaluated: rarer evaluations would be to either's disadvantage.
    """
    ours, theirs = _curves(runs), _curves(backprop)
    best, spent = best_evaluations(on_shared_rounds(ours, theirs))
    if not all(spent.values()):
        return "never better than at its start"
    ratio = seconds_ratio(on_shared_rounds(theirs, ours), best, spent)
    if ratio is None:
        return ""
    return _marked(1 / ratio, MOST_SECONDS) if ratio < inf else "better than backprop ever was"


def _in_fedmezos(runs: Sequence[Row], fedmezo: Sequence[Row]) -> str:
    """Client CPU seconds until an estimator is as good as FedMeZO at its best, in those that FedMeZO takes."""
    best, spent = best_evaluations(_curves(fedmezo))
    if not all(spent.values()):
        return "FedMeZO never better than at its start"
    ratio = seconds_ratio(_curves(runs), best, spent)
    if ratio is None:
        return ""
    return _marked(ratio, MOST_OF_FEDMEZO) if ratio < inf else "**missed**: never as good"


def _curves(runs: Sequence[Row]) -> dict[int, Curve]:
    return {run["seed"]: run["curve"] for run in runs}


def _marked(seconds: float, most: float) -> str:
    return f"{'' if seconds <= most else '**missed**: '}{seconds:.2f}"
