"""A suite's runs, one after another, each resumable on its own."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from traceback import format_exc

from spryfl.compare.cells import Cell, Suite, in_order
from spryfl.compare.checking import check_cells
from spryfl.compare.report import write_report, write_results
from spryfl.compare.results import ResultRow
from spryfl.compare.search import search
from spryfl.errors import RunDirectoryError, SpryError, is_full_disk
from spryfl.run import run_in
from spryfl.tracking.events import Observer
from spryfl.tracking.lock import held
from spryfl.tracking.run_directory import RunDirectory

REPORT_SECONDS = 60.0  # to wait for another process that writes the report, which takes a few


def compare(
    suite: Suite,
    cells: Sequence[Cell],
    observers: Sequence[Observer] = (),
    tell: Callable[[str], None] = lambda problem: None,
) -> list[ResultRow]:
    """Do what is left of some cells of a suite, then report on all its runs that are finished.

    Results are written after each run, so a suite that was killed has them too. A run that fails does not keep the
    others from theirs; a search is done when its first run is due.

    Args:
        tell: told of each run that failed, when it did.

    Raises:
        SpryError: before any work, with everything that is wrong with the cells; after all of it, with the runs that
            failed.
    """
    check_cells(suite, cells)
    suite.out.mkdir(parents=True, exist_ok=True)
    failures = []
    try:
        for cell in in_order(suite, [cell for cell in cells if not suite.is_finished(cell)]):
            directory = RunDirectory(suite.folder(cell))
            directory.failure_file.unlink(missing_ok=True)
            try:
                _perform(suite, cell, observers)
            except Exception as error:
                if is_full_disk(error):  # which the others would meet too
                    raise
                foreseen = isinstance(error, SpryError)
                reason = str(error) if foreseen else f"{type(error).__name__}: {error}"
                failures.append(f"{cell.name} failed: {reason}")
                tell(failures[-1])
                if not isinstance(error, RunDirectoryError):  # then it is another's, or of other settings
                    directory.write_failure(reason, "" if foreseen else format_exc())
            with suppress(RunDirectoryError):  # another process writes it, and has this run too, or the next one will
                _in_turn(write_results, suite)
    finally:
        rows = _in_turn(write_report, suite)
    if failures:
        raise SpryError("; ".join(failures))
    return rows


def _in_turn(write: Callable[[Suite], list[ResultRow]], suite: Suite) -> list[ResultRow]:
    """Processes that do pieces of a suite at once write its one report one after another."""
    with held(suite.out, seconds=REPORT_SECONDS):
        return write(suite)


def _perform(suite: Suite, cell: Cell, observers: Sequence[Observer]) -> None:
    found = search(suite, cell, observers).settings if suite.config.search is not None else {}
    run_in(suite.run_config(cell, found), suite.folder(cell), observers, cell.label)
