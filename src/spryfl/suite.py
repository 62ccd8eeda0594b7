"""A run and the runs it is compared with, one after another, each resumable on its own."""

from collections.abc import Callable, Sequence
from pathlib import Path

from spryfl.config import RunConfig, compared_configs
from spryfl.errors import SpryError
from spryfl.report.plots import plot_comparison
from spryfl.run import run, with_absolute_paths
from spryfl.tracking.events import Observer, Summary
from spryfl.tracking.run_directory import RunDirectory, create_run_directory

ObserversOf = Callable[[RunDirectory], Sequence[Observer]]


def run_suite(config: RunConfig, path: Path, observers: ObserversOf = lambda directory: ()) -> list[Summary]:
    """Start a run in a new directory; the main run's summary comes first.

    Args:
        path: of the run directory; must not hold a run. A run that fails before its first evaluation leaves none.
        observers: makes the observers of each run's directory.
    """
    config = with_absolute_paths(config)
    directory = create_run_directory(path)
    directory.write_config(config)
    try:
        return resume_suite(directory, observers)
    except SpryError:
        if not directory.read_events():
            directory.clear()  # what is wrong can be mended and run under the same name
        raise


def resume_suite(directory: RunDirectory, observers: ObserversOf = lambda directory: ()) -> list[Summary]:
    """Do what is left of a run and of those it is compared with; what is done is not repeated."""
    config = directory.read_config()
    compared = compared_configs(config)
    summaries = [run(config, directory, observers(directory), suite_labels(config)[0])]
    for name, label in zip(compared, suite_labels(config)[1:], strict=True):
        own = directory.compared(name)
        own.path.mkdir(parents=True, exist_ok=True)
        own.write_config(compared[name])
        summaries.append(run(compared[name], own, observers(own), label))
    if compared:
        folders = [directory, *(directory.compared(name) for name in compared)]
        events = {s.label: d.read_events() for s, d in zip(summaries, folders, strict=True)}
        plot_comparison(events, summaries, directory.path)
    return summaries


def suite_labels(config: RunConfig) -> list[str]:
    """What the main run and each compared one are called in displays and tables."""
    return [config.label or config.method.name, *(entry.label or entry.name for entry in config.compare)]
