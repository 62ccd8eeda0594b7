"""All that can be wrong with a suite, asked before its first run: settings, data, and what lies there already."""

from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product

from spryfl.compare.cells import Cell, Suite, collected
from spryfl.compare.search import read_outcome, require_same_search, search_config
from spryfl.config import RunConfig
from spryfl.data.loading import load_rows
from spryfl.errors import SpryError
from spryfl.run import require_same
from spryfl.tracking.run_directory import RunDirectory


def check_cells(suite: Suite, cells: Sequence[Cell]) -> None:
    """Refuse a suite of which some run could not begin, or could not go on; all problems at once.

    Raises:
        SpryError: with every problem once, and the cells that have it.
    """
    if suite.data is not None and not suite.data.is_dir():
        raise SpryError(f"--data {suite.data}: no such folder")
    if suite.config.search is not None and find_spec("optuna") is None:
        raise SpryError("[search] needs Optuna: pip install 'spryfl[search]', or take [search] out")
    problems: dict[str, list[str]] = defaultdict(list)
    data: dict[str, str | None] = {}
    for cell in cells:
        try:
            configs = _configs(suite, cell)
            _require_going_on(suite, cell)
        except SpryError as error:
            problems[str(error)].append(cell.name)
            continue
        problem = None if suite.is_finished(cell) else _data_problem(configs[0], data)
        if problem is not None:
            problems[problem].append(cell.name)
    if problems:
        raise collected(problems, len(cells))


def _configs(suite: Suite, cell: Cell) -> list[RunConfig]:
    """The cell's run, and a trial at every corner of its search."""
    space = suite.config.space_of(cell.method)
    corners = [dict(zip(space, values, strict=True)) for values in product(*(own.ends for own in space.values()))]
    return [suite.run_config(cell), *(search_config(suite, cell, corner) for corner in corners if corner)]


def _require_going_on(suite: Suite, cell: Cell) -> None:
    """What is there already must be of the same settings."""
    if suite.config.search is not None:
        require_same_search(suite, cell)
        if read_outcome(suite, cell) is None:
            return
    directory = RunDirectory(suite.folder(cell))
    if directory.config_file.exists():
        outcome = read_outcome(suite, cell)
        require_same(directory, suite.run_config(cell, None if outcome is None else outcome.settings))


def _data_problem(config: RunConfig, known: dict[str, str | None]) -> str | None:
    """What is wrong with a run's data, if anything; each dataset is looked at once, whatever the seed."""
    key = config.data.model_dump_json()
    if key not in known:
        try:
            load_rows(config.data, config.seed)
            known[key] = None
        except SpryError as error:
            known[key] = str(error)
    return known[key]
