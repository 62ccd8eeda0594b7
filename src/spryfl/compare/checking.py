"""All that can be wrong with a suite, asked before its first run: settings, data, and what lies there already."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product

from spryfl.compare.cells import Cell, Suite, collected
from spryfl.compare.search import read_outcome, require_same_search, search_config
from spryfl.config import RunConfig
from spryfl.data.loading import load_rows
from spryfl.data.partition import share_out
from spryfl.data.public_text import load_public_text
from spryfl.errors import RunDirectoryError, SpryError
from spryfl.models.sources import find_model
from spryfl.run import require_same
from spryfl.tracking.run_directory import RunDirectory


def check_cells(suite: Suite, cells: Sequence[Cell]) -> None:
    """Refuse a suite of which some run could not begin, or could not go on; all problems at once.

    Runs of other cells stand in the same report: those that are there must be of this suite's settings too.

    Raises:
        SpryError: with every problem once, and the cells that have it.
    """
    if suite.data is not None and not suite.data.is_dir():
        raise SpryError(f"--data {suite.data}: no such folder")
    if suite.config.search is not None and find_spec("optuna") is None:
        raise SpryError("[search] needs Optuna: pip install 'spryfl[search]', or take [search] out")
    problems: dict[str, list[str]] = defaultdict(list)
    known: dict[str, str | None] = {}
    for cell in cells:
        for problem in dict.fromkeys(_problems(suite, cell, known)):
            problems[problem].append(cell.name)
    for cell in suite.cells():
        there = None if cell in cells else _problem(partial(_require_going_on, suite, cell))
        if there is not None:
            problems[there].append(cell.name)
            break  # one says enough: they differ all alike
    if problems:
        raise collected(problems, len(cells))


def _problems(suite: Suite, cell: Cell, known: dict[str, str | None]) -> Iterator[str]:
    """What is wrong with a cell's run, with a trial at any corner of its search, with its data, with what is there."""
    space = suite.config.space_of(cell.method)
    corners = product(*(own.ends for own in space.values())) if space else ()
    attempts = [lambda: suite.run_config(cell)]
    attempts += [partial(search_config, suite, cell, dict(zip(space, values, strict=True))) for values in corners]
    failures = [problem for attempt in attempts if (problem := _problem(attempt)) is not None]
    yield from failures
    if failures:
        return
    there = _problem(lambda: _require_going_on(suite, cell))
    if there is not None:
        yield there
    elif not suite.is_finished(cell):
        configs = [suite.run_config(cell)]
        if suite.config.search is not None and read_outcome(suite, cell) is None:
            configs.append(search_config(suite, cell, {}))  # trains on fewer rows
        for config in configs:
            # Looked at once, whatever the seed.
            parts = (config.model, config.data, config.task, config.partition, config.evaluation, config.guide)
            key = "".join(part.model_dump_json() for part in parts)
            if key not in known:
                known[key] = _problem(partial(_find_all, config))
            if (problem := known[key]) is not None:
                yield problem


def _find_all(config: RunConfig) -> None:
    """Find a run's model, read all its text, and share it out, which tells whether they suit their task."""
    find_model(config.model.name)
    rows = load_rows(config.data, config.seed, config.task)
    if config.partition.kind != "own":
        share_out(config, rows)
    if config.guide.text is not None:
        load_public_text(config.guide, config.data, rows.num_labels, config.seed)


def _problem(attempt: Callable[[], object]) -> str | None:
    """Why something cannot be done; None if it can."""
    try:
        attempt()
    except SpryError as error:
        return str(error)
    return None


def _require_going_on(suite: Suite, cell: Cell) -> None:
    """What is there already must be of the same settings."""
    if suite.config.search is not None:
        require_same_search(suite, cell)
    directory, outcome = RunDirectory(suite.folder(cell)), read_outcome(suite, cell)
    if not directory.config_file.exists():
        return
    if suite.config.search is not None and outcome is None:
        raise RunDirectoryError(
            f"{directory.path} holds a run, but its search is not there, and the suite has a [search]: choose "
            "another --out, or remove that folder to run it anew"
        )
    require_same(directory, suite.run_config(cell, None if outcome is None else outcome.settings))
