"""The cells of a suite: one run each, in the order that gives early answers, and the configuration of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from spryfl.config import DatasetEntry, MethodEntry, RunConfig, SuiteConfig, parse_config, with_overrides
from spryfl.config.part import flattened
from spryfl.errors import ConfigError, SpryError, nearest
from spryfl.federated.method import METHODS
from spryfl.run import with_absolute_paths
from spryfl.tracking.run_directory import RunDirectory

Settings = dict[str, Any]
"""'part.key' = value."""


@dataclass(frozen=True)
class Cell:
    """One dataset, one method, one seed: one run."""

    dataset: DatasetEntry
    method: MethodEntry
    seed: int

    @property
    def name(self) -> str:
        return f"{self.dataset.name}/{self.method.name}/{self.seed}"

    @property
    def label(self) -> str:
        """In displays."""
        return f"{self.dataset.name}, {self.method.shown}, seed {self.seed}"


@dataclass(frozen=True)
class Suite:
    """A suite where its runs lie.

    Attributes:
        out: the suite's folder.
        data: folder in which names of data are looked up first.
        command: that performs it all; the report tells it.
    """

    config: SuiteConfig
    out: Path
    data: Path | None = None
    command: str = "spry compare"

    def folder(self, cell: Cell) -> Path:
        """Of a cell's run."""
        return self.out / "runs" / cell.name

    def is_finished(self, cell: Cell) -> bool:
        """Whether nothing is left of a cell's run."""
        return RunDirectory(self.folder(cell)).summary_file.exists()

    def searched(self, cell: Cell) -> Cell:
        """The cell on whose dataset a cell's settings are searched: itself, or one of the dataset it is tuned on."""
        named = cell.dataset.tuned_on
        return cell if named is None else replace(cell, dataset=next(d for d in self.config.dataset if d.name == named))

    def search_folder(self, cell: Cell) -> Path:
        """Of the search of a dataset's method, the same for all seeds and for datasets tuned on that one."""
        return self.out / "search" / self.searched(cell).dataset.name / cell.method.name

    def cells(self) -> list[Cell]:
        """All of them, as they stand in the file."""
        config = self.config
        return [
            Cell(dataset, method, seed)
            for seed in config.seeds
            for dataset in config.dataset
            if dataset.seeds is None or seed in dataset.seeds
            for method in config.method
        ]

    def run_config(self, cell: Cell, more: Mapping[str, Any] | None = None) -> RunConfig:
        """A cell's run: what all share, then the dataset's own, the method's, what was found, and the seed.

        Where there is a search, test rows that have to be cut off train are the same for all seeds, so that no trial
        sees any of them.

        Raises:
            ConfigError: it is impossible.
        """
        own = {"seed": cell.seed, "label": cell.method.shown}
        if self.config.search is not None:
            own["data.test_seed"] = self.config.search.seed
        own |= cell.dataset.set | cell.method.settings
        named = self.data is not None and (self.data / cell.dataset.name).exists()
        if named and "data.name" not in flattened(self.config.base) | own:
            own["data.name"] = cell.dataset.name
        config = parse_config(with_overrides(self.config.base, own | dict(more or {})))
        return with_absolute_paths(_looked_up(config, self.data))


def in_order(suite: Suite, cells: Sequence[Cell]) -> list[Cell]:
    """The first seed of everything first, and of one seed the cheapest first."""
    seeds = {seed: place for place, seed in enumerate(suite.config.seeds)}
    return sorted(cells, key=lambda cell: (seeds[cell.seed], relative_cost(suite.run_config(cell))))


def chosen_cells(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """Those that one of the patterns names: a dataset, a method, or DATASET/METHOD/SEED, each with wildcards.

    Raises:
        SpryError: a pattern that names none.
    """

    def fits(cell: Cell, pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in (cell.dataset.name, cell.method.name, cell.name))

    for pattern in only:
        if not any(fits(cell, pattern) for cell in cells):
            known = dict.fromkeys(name for cell in cells for name in (cell.dataset.name, cell.method.name))
            raise SpryError(
                f"--only {pattern}: no such dataset, method or DATASET/METHOD/SEED.{nearest(pattern, known)} "
                f"There are: {', '.join(known)}"
            )
    return [cell for cell in cells if not only or any(fits(cell, pattern) for pattern in only)]


def relative_cost(config: RunConfig) -> float:
    """About how many tokens pass through the model in a run: for ordering cells, not for a forecast."""
    method, local = config.method, config.local
    num_examples = (config.data.max_train_examples or 10_000) / config.partition.num_clients * local.epochs
    rows = min(local.batch_size, num_examples) if METHODS[method.name].pace == "iteration" else num_examples
    passes = {
        "forward": 1 + method.own_num_tangents,
        "bottleneck": 1 + method.own_num_tangents,
        "zeroth_order": 2 * method.own_num_tangents,
        "guided": 2.5,
        "backprop": 3.0 if method.checkpointing == "none" else 4.0,
        "auto": 4.0,
    }[method.own_estimator]
    return passes * rows * config.data.max_tokens * config.server.cohort_size * config.server.num_rounds


def _looked_up(config: RunConfig, folder: Path | None) -> RunConfig:
    """With data and public text taken from a folder where it has them; other names stay as they are."""
    if folder is None:
        return config

    def found(name: str) -> str:
        path = folder / name
        return str(path.resolve()) if name and path.exists() else name

    text = config.guide.text
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"name": found(config.data.name)}),
            "guide": config.guide.model_copy(update={"text": None if text is None else found(text)}),
        }
    )


def collected(problems: Mapping[str, Sequence[str]], num_cells: int) -> ConfigError:
    """One error of many: each problem once, with the cells that have it unless all do."""
    parts = []
    for problem, names in problems.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        parts.append(problem if len(names) == num_cells else f"{shown}: {problem}")
    return ConfigError("; ".join(parts))
