"""Hyperparameter search: the same number of trials for every method, none of which sees the test split.

A trial is the beginning of a run, its rates those of the whole run's schedule, on the training data alone: a part of
it, cut off by the search's seed and so the same for all methods, takes the place of the test split. The first half of
the trials, and at least five, are points of a Halton sequence, so that few cover the space, and methods with the same
ranges try the same ones; the rest are drawn by Optuna's tree-structured Parzen estimator (Bergstra et al. 2011). Each
draw has a seed of its own, so a search that was stopped goes on as if it had not been.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy.stats.qmc import Halton

from spryfl.compare.cells import Cell, Settings, Suite
from spryfl.config import RunConfig, SearchRange, parse_config
from spryfl.data.task import LOWER_IS_BETTER
from spryfl.errors import ConfigError, RunDirectoryError, SpryError
from spryfl.files import write_atomically
from spryfl.run import run_in
from spryfl.runtime.in_process import FAILURES
from spryfl.tracking.events import Observer
from spryfl.tracking.lock import held
from spryfl.tracking.run_directory import RunDirectory

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

FEWEST_TO_LEARN_FROM = 5  # trials; what an estimator makes of fewer is no better than points that are spread


@dataclass(frozen=True)
class Trial:
    """Settings that were tried; score: on the validation part, None where the run failed, for the reason given."""

    settings: Settings
    score: float | None
    failure: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A finished search.

    Attributes:
        settings: the best trial's; of equals, the first.
        score: its score.
        metric: what was scored.
    """

    settings: Settings
    score: float
    metric: str
    trials: tuple[Trial, ...]


def search(suite: Suite, cell: Cell, observers: Sequence[Observer]) -> Outcome:
    """Search a method's settings on a dataset, or go on with it; a finished search is only read.

    Raises:
        SpryError: every trial failed, or another process is at work on it.
    """
    found = read_outcome(suite, cell)
    if found is not None:
        return found
    settings, folder = suite.config.search, suite.search_folder(cell)
    assert settings is not None
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        write_atomically(folder / "search.json", _as_json(_identity(suite, cell)))
        study = _study(folder)
        while (number := len(_performed(study))) < settings.trials:
            _perform(suite, cell, study, number, observers)
        outcome = _outcome(study, cell, folder)
        write_atomically(folder / "chosen.json", _as_json(asdict(outcome)))
    for trial in folder.glob("trial-*"):
        shutil.rmtree(trial)
    return outcome


def search_config(suite: Suite, cell: Cell, tried: Settings) -> RunConfig:
    """A trial's run: trained and scored on parts of the training data alone."""
    settings = suite.config.search
    assert settings is not None
    cell = suite.searched(cell)
    own = suite.run_config(cell)
    rounds = cell.dataset.search_rounds or settings.rounds or own.server.num_rounds
    fixed: Settings = {
        "seed": settings.seed,
        "data.validation_fraction": settings.validation_fraction,
        "server.num_rounds": rounds,
        "server.schedule_rounds": max(rounds, own.server.own_schedule_rounds),
        "evaluation.every": rounds,
    }
    if own.evaluation.held_out > 0:  # those rows stay out of training, but the score alone is asked for
        fixed |= {"evaluation.generalized": "end", "evaluation.personalized": "never"}
    return suite.run_config(cell, tried | fixed)


def read_outcome(suite: Suite, cell: Cell) -> Outcome | None:
    """What a finished search found; None where there is none."""
    path = suite.search_folder(cell) / "chosen.json"
    if suite.config.search is None or not path.is_file():
        return None
    row = json.loads(path.read_text(encoding="utf-8"))
    return Outcome(row["settings"], row["score"], row["metric"], tuple(Trial(**trial) for trial in row["trials"]))


def require_same_search(suite: Suite, cell: Cell) -> None:
    """Refuse to go on with a search that was begun with other settings.

    Raises:
        RunDirectoryError: naming what differs.
    """
    path = suite.search_folder(cell) / "search.json"
    if not path.is_file():
        return
    before, now = _read_identity(path), _identity(suite, cell)
    differing = [key for key in before | now if before.get(key) != now.get(key)]
    if differing:
        raise RunDirectoryError(
            f"{path.parent} holds a search of other settings ({', '.join(differing)} differ): choose another --out, or "
            "remove that folder to search anew"
        )


def _read_identity(path: Path) -> dict[str, Any]:
    """As `_identity` has it; keys that there were none of yet have their defaults."""
    row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    own: dict[str, Any] = {key: row.pop(key) for key in ("trials", "by", "space")}
    try:
        return own | parse_config(row).model_dump(mode="json", exclude={"label", "runtime"})
    except ConfigError:  # of keys that there are none of any more
        return own | row


def _identity(suite: Suite, cell: Cell) -> dict[str, Any]:
    """All that a search depends on, as JSON has it."""
    settings = suite.config.search
    assert settings is not None
    space = {key: own.model_dump(mode="json") for key, own in suite.config.space_of(cell.method).items()}
    parts = search_config(suite, cell, {}).model_dump(mode="json", exclude={"label", "runtime"})
    return {"trials": settings.trials, "by": settings.by, "space": space} | parts


def _study(folder: Path) -> "Study":
    """The search's journal, a line a change; nothing in it is pickled.

    What a killed process left is mended: a lock that it cannot give back, a line that it did not finish.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = folder.resolve() / "journal.log"
    for lock in folder.glob(f"{journal.name}.lock*"):
        lock.unlink()
    if journal.is_file() and not (written := journal.read_bytes()).endswith(b"\n"):
        write_atomically(journal, written[: written.rfind(b"\n") + 1])
    storage = JournalStorage(JournalFileBackend(str(journal)))
    return optuna.create_study(storage=storage, study_name="search", direction="maximize", load_if_exists=True)


def _performed(study: "Study") -> list["FrozenTrial"]:
    """Trials that were run to an end, good or bad, in order: what the budget counts."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _perform(suite: Suite, cell: Cell, study: "Study", number: int, observers: Sequence[Observer]) -> None:
    """Draw the next trial, run it, and tell the study what came of it.

    One that was stopped is drawn again, the same as before, and its run goes on in its folder; so is one that failed
    before it trained.
    """
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    settings = suite.config.search
    assert settings is not None
    space, num_spread = suite.config.space_of(cell.method), max(FEWEST_TO_LEARN_FROM, (settings.trials + 1) // 2)
    for stopped in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(stopped.number, state=TrialState.FAIL)
    if number < num_spread and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.enqueue_trial(spread_point(space, settings.seed, number))
    study.sampler = TPESampler(seed=settings.seed + number, n_startup_trials=num_spread)
    trial = study.ask({key: _distribution(own) for key, own in space.items()})
    label = f"{suite.searched(cell).dataset.name}, {cell.method.shown}, trial {number + 1} of {settings.trials}"
    config = search_config(suite, cell, trial.params)
    folder = suite.search_folder(cell) / f"trial-{number}"
    try:
        summary = run_in(config, folder, observers, label)
    except FAILURES as error:
        # Where nothing was trained, or nothing could be written, it was not for the settings' sake.
        if isinstance(error, RunDirectoryError) or not RunDirectory(folder).read_events():
            raise
        trial.set_user_attr("failure", str(error))
        study.tell(trial, state=TrialState.PRUNED)
        return
    by_loss = settings.by == "loss"
    metric, score = ("loss", summary.test_loss) if by_loss else (summary.metric, summary.score)
    score = math.nan if score is None else score
    trial.set_user_attr("metric", metric)
    if math.isfinite(score):
        study.tell(trial, _sign(metric) * score)
    else:
        trial.set_user_attr("failure", f"{metric} is {score}")
        study.tell(trial, state=TrialState.PRUNED)


def spread_point(space: Mapping[str, SearchRange], seed: int, number: int) -> Settings:
    """A point of a scrambled Halton sequence (Owen 2017), by its number, in the ranges' own units.

    Keys of a single choice take none of its dimensions, of which the first are spread best.
    """
    fixed = {key: own.choices[0] for key, own in space.items() if len(own.choices) == 1}
    free = {key: own for key, own in space.items() if key not in fixed}
    if not free:
        return fixed
    shares = Halton(len(free), rng=seed).random(number + 1)[number]
    return fixed | {key: _value(own, float(share)) for (key, own), share in zip(free.items(), shares, strict=True)}


def _value(own: SearchRange, share: float) -> Any:
    """The value below which this share of a range lies."""
    if own.choices:
        return own.choices[int(share * len(own.choices))]
    low, high = own.ends
    whole = isinstance(low, int) and isinstance(high, int)
    top = high + 1 if whole else high
    value = low * (top / low) ** share if own.scale == "log" else low + (top - low) * share
    return min(int(value), high) if whole else value


def _distribution(own: SearchRange) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if own.choices:
        return CategoricalDistribution(own.choices)
    low, high = own.ends
    kind = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
    return kind(low, high, log=own.scale == "log")


def _outcome(study: "Study", cell: Cell, folder: Path) -> Outcome:
    """The best of the trials; of equals the first."""
    performed = _performed(study)
    scored = [trial for trial in performed if trial.value is not None]
    if not scored:
        reasons = dict.fromkeys(trial.user_attrs["failure"] for trial in performed)
        raise SpryError(
            f"{cell.dataset.name}/{cell.method.name}: every trial of the search failed: {'; '.join(reasons)}: choose "
            f"another space, or remove {folder} to search anew"
        )
    metric = scored[0].user_attrs["metric"]
    trials = tuple(
        Trial(
            trial.params, None if trial.value is None else _sign(metric) * trial.value, trial.user_attrs.get("failure")
        )
        for trial in performed
    )
    settings, score, _ = max(
        ((trial.settings, trial.score, -place) for place, trial in enumerate(trials) if trial.score is not None),
        key=lambda found: (_sign(metric) * found[1], found[2]),
    )
    return Outcome(settings, score, metric, trials)


def _sign(metric: str) -> int:
    return -1 if metric in LOWER_IS_BETTER else 1


def _as_json(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, indent=2) + "\n").encode()
