"""A suite: methods x datasets x seeds on shared settings, and the search of their hyperparameters."""

from typing import Any, Literal

from pydantic import Field, model_validator

from spryfl.config.part import Fraction, Overrides, Part, Positive, flattened
from spryfl.errors import nearest
from spryfl.federated.method import METHODS

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_OF_THE_SUITE = {
    "seed": "a suite has seeds = [0, 1, 2]",
    "label": "each [[method]] has a label of its own",
    "compare": "what is compared are the suite's [[method]] entries",
}
"""Keys of a run's file that [base] does not take, and what a suite has in their place."""
_OF_THE_SEARCH = frozenset(
    {
        *_OF_THE_SUITE,
        "data.test_seed",
        "data.validation_fraction",
        "server.num_rounds",
        "server.schedule_rounds",
        "evaluation.every",
    }
)
"""Keys that the suite or its search sets in every run or trial, so that none can be searched."""


class SearchRange(Part):
    """The values of one key that a search tries: a range, whole numbers where both ends are, or a few choices."""

    low: int | float | None = None
    high: int | float | None = None
    scale: Literal["log", "linear"] = "log"
    choices: tuple[bool | int | float | str, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> "SearchRange":
        if self.choices and (self.low is not None or self.high is not None):
            raise ValueError("give low and high, or choices, not both")
        if self.choices:
            return self
        if self.low is None or self.high is None:
            raise ValueError("give low and high, or choices, such as { low = 1e-3, high = 1e-1 }")
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} is not below high = {self.high}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low = {self.low}: a log scale begins above 0; raise it, or set scale = 'linear'")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that must be possible for all others to be: both ends, or every choice."""
        return self.choices or (self.low, self.high)


LEARNING_RATES = {
    "local.learning_rate": SearchRange(low=1e-3, high=1.0),
    "server.learning_rate": SearchRange(low=1e-3, high=1.0),
}


class SearchConfig(Part):
    """The same number of trials for each method, on a part of the training data."""

    trials: Positive = 8
    rounds: Positive | None = Field(None, description="of a trial; a run's own number by default")
    seed: int = Field(100, ge=0, lt=2**32, description="of the trials' runs and of the points that are tried")
    by: Literal["score", "loss"] = Field(
        "score", description="what the best trial is best in; the loss tells more while scores are near chance"
    )
    validation_fraction: Fraction = Field(0.2, description="cut off train; the test split is never looked at")
    space: dict[str, SearchRange] = Field(LEARNING_RATES, min_length=1, description="'part.key' = range")


class DatasetEntry(Part):
    """One dataset, as a suite's runs see it; without data.name anywhere, a name that --data has chooses that."""

    name: str = Field(pattern=NAME, description="names it in tables and folders")
    target: float | None = Field(None, description="score whose cost in time and bytes is told")
    tuned_on: str | None = Field(None, description="the [[dataset]] whose search serves this one too; its own if none")
    search_rounds: int | None = Field(None, ge=1, description="of each trial, where it takes longer to leave chance")
    seeds: tuple[int, ...] | None = Field(None, min_length=1, description="some of the suite's; all of them if none")
    set: Overrides = Field(default_factory=dict, description="'part.key' = value")


class MethodEntry(Part):
    """One method, as a suite's runs use it; without method.name in `set`, a name that is a method's chooses that."""

    name: str = Field(pattern=NAME, description="names it in folders")
    label: str | None = Field(None, description="in tables and plots; the name by default")
    set: Overrides = Field(default_factory=dict, description="'part.key' = value; goes before a dataset's")
    space: dict[str, SearchRange] = Field(
        default_factory=dict, description="its own ranges of keys of search.space, with the same number of trials"
    )

    @property
    def shown(self) -> str:
        """What tables and plots call it."""
        return self.label or self.name

    @property
    def settings(self) -> dict[str, Any]:
        """`set`, with the method that the name alone stands for."""
        own = {"method.name": self.name} if self.name in METHODS else {}
        return own | self.set


class SuiteConfig(Part):
    """Methods x datasets x seeds; `base` holds what all runs share, as a run's file does."""

    title: str | None = Field(None, description="of the report")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    reference: str | None = Field(None, description="the [[method]] whose time and bytes the others are told against")
    contenders: tuple[str, ...] = Field(
        (), description="the [[method]]s whose costs are told at the best score of every other"
    )
    base: dict[str, Any] = Field(default_factory=dict)
    dataset: tuple[DatasetEntry, ...] = Field(min_length=1)
    method: tuple[MethodEntry, ...] = Field(min_length=1)
    search: SearchConfig | None = None

    @model_validator(mode="after")
    def _names_and_seeds_differ(self) -> "SuiteConfig":
        for kind, names in (
            ("dataset", [entry.name for entry in self.dataset]),
            ("method", [entry.name for entry in self.method]),
            ("method labels", [entry.shown for entry in self.method]),
            ("seeds", [str(seed) for seed in self.seeds]),
        ):
            twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
            if twice:
                raise ValueError(f"{kind}: must differ, but {', '.join(twice)} stands there twice")
        sets = {f"{kind} '{entry.name}'": entry.set for kind in ("dataset", "method") for entry in getattr(self, kind)}
        for where, table in {"base": self.base, **sets}.items():
            for key, remedy in _OF_THE_SUITE.items():
                if key in table:
                    raise ValueError(f"{where}: {key} stands there, but {remedy}: leave it out")
        return self

    @model_validator(mode="after")
    def _entries_fit(self) -> "SuiteConfig":
        names = [entry.name for entry in self.method]
        for key, chosen in (("reference", (self.reference,)), ("contenders", self.contenders)):
            for name in chosen:
                if name is not None and name not in names:
                    raise ValueError(
                        f"{key}: no such [[method]] '{name}'.{nearest(name, names)} There are: {', '.join(names)}"
                    )
        datasets = {entry.name: entry for entry in self.dataset}
        for dataset in self.dataset:
            foreign = sorted(set(dataset.seeds or ()) - set(self.seeds))
            if foreign:
                raise ValueError(
                    f"dataset '{dataset.name}': seeds has {', '.join(map(str, foreign))}, which the suite's seeds have "
                    "not: add them there, or leave them out"
                )
            if dataset.search_rounds is not None and (self.search is None or dataset.tuned_on is not None):
                raise ValueError(
                    f"dataset '{dataset.name}' has search_rounds, but no search of its own: leave that out, or "
                    f"{'add [search]' if self.search is None else 'leave tuned_on out'}"
                )
            if dataset.tuned_on is None:
                continue
            if self.search is None:
                raise ValueError(f"dataset '{dataset.name}' has tuned_on, but there is no [search]: leave it out")
            if dataset.tuned_on not in datasets or datasets[dataset.tuned_on].tuned_on is not None:
                searched = [name for name, entry in datasets.items() if entry.tuned_on is None]
                raise ValueError(
                    f"dataset '{dataset.name}': tuned_on = '{dataset.tuned_on}' is no [[dataset]] with a search of its "
                    f"own.{nearest(dataset.tuned_on, searched)} There are: {', '.join(searched)}"
                )
        for entry in self.method:
            if entry.space and self.search is None:
                raise ValueError(
                    f"method '{entry.name}' has a space, but there is no [search]: add it, or leave it out"
                )
            unsought = sorted(set(entry.space) - set(self.search.space if self.search else ()))
            if unsought:
                raise ValueError(
                    f"method '{entry.name}': space has {', '.join(unsought)}, which search.space has not; all methods "
                    "search the same keys, so add it there or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _names_of_methods_stand_for_one(self) -> "SuiteConfig":
        """One that stands for none would be the default's runs under another name, in every table."""
        chosen = [flattened(self.base), *(dataset.set for dataset in self.dataset)]
        for method in self.method:
            if "method.name" not in method.settings and not any("method.name" in table for table in chosen):
                raise ValueError(
                    f"method '{method.name}' is no method's name.{nearest(method.name, METHODS)} Take one of `spry "
                    "list methods`, or give its set 'method.name' = NAME"
                )
        return self

    @model_validator(mode="after")
    def _what_is_searched_is_not_set(self) -> "SuiteConfig":
        sought = set() if self.search is None else set(self.search.space)
        fixed = sorted(sought & _OF_THE_SEARCH)
        if fixed:
            raise ValueError(f"search.space has {', '.join(fixed)}, which the suite sets itself: leave it out")
        for kind, entries in (("dataset", self.dataset), ("method", self.method)):
            for entry in entries:
                both = sorted(sought & set(entry.set))
                if both:
                    raise ValueError(
                        f"{kind} '{entry.name}': set has {', '.join(both)}, which the search draws anew: leave it out, "
                        f'or give the method space = {{ "{both[0]}" = {{ choices = [VALUE] }} }}'
                    )
        return self

    def space_of(self, method: MethodEntry) -> dict[str, SearchRange]:
        """The ranges that a method's search draws from."""
        return {} if self.search is None else self.search.space | method.space
