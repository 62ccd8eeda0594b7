"""What `spry bench frontier` compares: tasks and estimators, each an explicit table of run settings.

Every run of a task shares clients and rounds, seed by seed; an estimator's row changes what is its own. Learning
rates are the best of an equal search on a part of the training data (`--tune`, frontier-tuning.json), one for each
kind of estimator: exact, guided, random directions, finite differences. A model's first task is searched for all.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Settings = dict[str, Any]
"""'part.key' = value."""

SEEDS = (0, 1, 2)
FACTORS = (0.3, 1.0, 3.0)
"""The server's learning rates that are tried for every estimator, in units of the task's own."""
NOISY_FACTORS = (0.3, 1.0, 3.0, 10.0)
"""For estimates that are mostly noise one more, as the highest of three was the best of them."""
TUNING_ROUNDS = 15


@dataclass(frozen=True)
class FrontierTask:
    """A task with everything that all estimators share.

    Attributes:
        data: folder below the data directory.
        settings: of its runs.
        public: settings of the public text that maps are fitted on; a path is below the data directory.
        has_head: whether a head is trained, so that shares count from the head alone, not from the zero-shot prompt.
        rate: the server's learning rate of all estimators where none was tuned.
        tuned_on: the task whose search serves this one too; its own by default.
        hidden_bytes: of a hidden state of the largest batch, from which budgets are counted.
    """

    data: str
    settings: Settings
    public: Settings
    has_head: bool
    hidden_bytes: int
    rate: float = 1e-2
    tuned_on: str | None = None


SERVER: Settings = {
    "local.optimizer": "sgd",
    "local.learning_rate": 0.1,
    "server.optimizer": "adam",
    "server.tau": 1e-6,
}
"""Plain steps on clients, Adam on the server: its moments live through all rounds, as a central run's do."""
MINILM: Settings = SERVER | {
    "model.name": "builtin:minilm",
    "method.chunk": "4MiB",  # of every estimator alike; a guess then takes 1.15 x stock inference's peak
    "model.dtype": "float32",
    "data.max_tokens": 32,
    "data.max_train_examples": 4800,
    "data.max_test_examples": 1000,
    "partition.num_clients": 200,
    "partition.kind": "iid",
    "local.batch_size": 8,
    "server.num_rounds": 30,
    "server.cohort_size": 12,
    "evaluation.every": 5,
    "evaluation.batch_size": 100,
}
SMOLLM2: Settings = SERVER | {
    "model.name": "builtin:smollm2",
    "method.chunk": "4MiB",  # a guess below three exact layers then takes 1.41 x stock inference's peak
    "model.dtype": "float32",
    "task.kind": "prompted",
    "adapter.alpha": 4.0,
    "data.max_tokens": 48,
    "data.max_train_examples": 3200,
    "data.max_test_examples": 200,
    "partition.num_clients": 400,
    "partition.kind": "iid",
    "local.batch_size": 8,
    "server.num_rounds": 30,
    "server.cohort_size": 4,
    "evaluation.every": 5,
    "evaluation.batch_size": 50,
}
PAIRS: Settings = {
    "guide.text": "dolly_15k",
    "guide.text_columns": ["instruction", "response"],
    "guide.num_texts": 1024,
}
NEWS: Settings = {"guide.text": "ag_news", "guide.text_columns": ["text"], "guide.num_texts": 512}
DOLLY: Settings = {"guide.text": "dolly_15k", "guide.text_columns": ["response"], "guide.num_texts": 512}

TASKS: dict[str, FrontierTask] = {
    "snli": FrontierTask(
        "snli", MINILM | {"data.text_columns": ["premise", "hypothesis"]}, PAIRS, True, 8 * 32 * 384 * 4
    ),
    "mnli": FrontierTask(
        "mnli",
        MINILM | {"data.text_columns": ["premise", "hypothesis"]},
        PAIRS,
        True,
        8 * 32 * 384 * 4,
        tuned_on="snli",
    ),
    "ag_news": FrontierTask(
        "ag_news", MINILM | {"data.text_columns": ["text"]}, DOLLY, True, 8 * 32 * 384 * 4, tuned_on="snli"
    ),
    "sst2": FrontierTask(
        "sst2", MINILM | {"data.text_columns": ["sentence"]}, NEWS, True, 8 * 32 * 384 * 4, tuned_on="snli"
    ),
    "prompted_sst2": FrontierTask(
        "sst2",
        SMOLLM2
        | {
            "data.text_columns": ["sentence"],
            "task.template": "{sentence} It was",
            "task.label_words": [" terrible", " great"],
        },
        NEWS,
        False,
        8 * 48 * 576 * 4,
        rate=2e-3,
    ),
    "prompted_ag_news": FrontierTask(
        "ag_news",
        SMOLLM2
        | {
            "data.text_columns": ["text"],
            "task.template": "{text}\nTopic:",
            "task.label_words": [" World", " Sports", " Business", " Technology"],
        },
        DOLLY,
        False,
        8 * 48 * 576 * 4,
        rate=2e-3,
        tuned_on="prompted_sst2",
    ),
}


@dataclass(frozen=True)
class Variant:
    """An estimator at one setting of its dial.

    Attributes:
        dial: the setting, for tables and curves; empty where the estimator has none.
        maps: whether it needs public text.
        budget_states: of budgeted backprop: hidden states kept.
        rates_of: the variant whose tuned learning rate it uses; its own by default.
        rate: a learning rate that was chosen otherwise than by a search.
        factors: of the rates that are tried for it.
        only: where it is tried, if not on every task: with a trained head, or prompted.
    """

    estimator: str
    dial: str = ""
    settings: Settings = field(default_factory=dict)
    maps: bool = False
    budget_states: int | None = None
    rates_of: str | None = None
    rate: float | None = None
    factors: tuple[float, ...] = FACTORS
    only: Literal["head", "prompted"] | None = None

    @property
    def name(self) -> str:
        return f"{self.estimator} {self.dial}".strip()

    def suits(self, task: FrontierTask) -> bool:
        return self.only is None or (self.only == "head") == task.has_head


GUIDED: Settings = {"method.name": "spry_guided"}
MAPS: Settings = GUIDED | {"guide.guess": "maps", "guide.check_every": 5, "guide.refit_below": 0.8}
GUESS: Settings = MAPS | {"guide.slopes": "none"}
BY_LAYER: Settings = {"method.deal": "layer"}
"""A client gets all adapted modules of a layer, at no more than one layer's backward pass: twice the rows a unit."""
ALL_UNITS: Settings = {"method.name": "fedyogi_guided"}
"""A client guesses for all of them, as it would back-propagate through all of them."""
LONG_FEDMEZO: Settings = {"method.name": "fedmezo", "server.num_rounds": 150, "evaluation.every": 15}
CHECKPOINTED: Settings = {"method.checkpointing": "per_layer"}


def _guess(dial: str, settings: Settings, only: Literal["head", "prompted"] | None = None) -> Variant:
    """The guess alone, at another setting of its dial."""
    return Variant("guess maps", dial, GUESS | settings, maps=True, rates_of="guess maps h=0", only=only)


def _budgeted(estimator: str, method: str) -> Variant:
    """Backprop that keeps two hidden states and computes the others again."""
    settings = {"method.name": method, "method.checkpointing": "budgeted"}
    return Variant(estimator, "2 states", settings, budget_states=2, rates_of="backprop")


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("head alone", "", {"method.name": "fedyogi", "adapter.kind": "head"}, rates_of="backprop", only="head"),
        Variant("backprop", "", {"method.name": "fedyogi"} | CHECKPOINTED),
        Variant("backprop split", "", {"method.name": "fedyogi_split"} | CHECKPOINTED, rates_of="backprop"),
        _budgeted("backprop split, budgeted", "fedyogi_split"),
        _budgeted("backprop, budgeted", "fedyogi"),
        Variant("guided maps", "h=0", MAPS, maps=True, rates_of="guess maps h=0"),
        Variant("guess maps", "h=0", GUESS, maps=True),
        Variant("guided identity", "h=0", GUIDED, rates_of="guess maps h=0"),
        _guess("h=0, by layer", BY_LAYER),
        _guess("h=2, by layer", BY_LAYER | {"guide.horizon": 2}),
        _guess("h=3, by layer", BY_LAYER | {"guide.horizon": 3}),
        _guess("h=3, by layer, trust 2", BY_LAYER | {"guide.horizon": 3, "guide.trust": 2.0}),
        _guess("h=3, by layer, rank 4", BY_LAYER | {"guide.horizon": 3, "guide.rank": 4}),
        _guess("h=3, all units", ALL_UNITS | {"guide.horizon": 3}),
        _guess("h=3, all units, trust 2", ALL_UNITS | {"guide.horizon": 3, "guide.trust": 2.0}),
        _guess("h=0, all units", ALL_UNITS),
        _guess("h=1, all units", ALL_UNITS | {"guide.horizon": 1}),
        _guess("h=3, all units, rank 4", ALL_UNITS | {"guide.horizon": 3, "guide.rank": 4}),
        _guess(
            "h=3, all units, rank 4, trust 2", ALL_UNITS | {"guide.horizon": 3, "guide.rank": 4, "guide.trust": 2.0}
        ),
        _guess("h=8, all units, rank 8", ALL_UNITS | {"guide.horizon": 8, "guide.rank": 8}, only="prompted"),
        _guess("h=0, by layer, trust 2", BY_LAYER | {"guide.trust": 2.0}),
        Variant(
            "backprop split",
            "by layer",
            {"method.name": "fedyogi_split"} | CHECKPOINTED | BY_LAYER,
            rates_of="backprop",
        ),
        Variant("forward", "K=1", {"method.name": "spry"}, factors=NOISY_FACTORS),
        Variant("zeroth order", "", {"method.name": "fedmezo"}, factors=NOISY_FACTORS),
        Variant(
            "zeroth order",
            "150 rounds",  # five times as many: after 30 it stands where it began, and nothing can be set against it
            LONG_FEDMEZO,
            rates_of="zeroth order",
            only="head",
        ),
        Variant(
            "zeroth order",
            "150 rounds, falling rate",  # at the rate that is best for 15 rounds it stands still after 45 (lab note 33)
            LONG_FEDMEZO | {"server.schedule": "linear"},
            rates_of="zeroth order",
            only="prompted",
        ),
        Variant("zeroth order", "150 rounds, rate 0.002", LONG_FEDMEZO, rate=2e-3, only="prompted"),
        _guess("h=1", {"guide.horizon": 1}),
        _guess("h=2", {"guide.horizon": 2}),
        Variant(
            "guided maps",
            "h=3, by layer",
            MAPS | BY_LAYER | {"guide.horizon": 3},
            maps=True,
            rates_of="guess maps h=0",
        ),
        Variant("guided maps", "h=2", MAPS | {"guide.horizon": 2}, maps=True, rates_of="guess maps h=0"),
        _guess("h=0, own token", {"guide.across": False}),
        _guess("h=0, rank 1", {"guide.rank": 1}),
        Variant("guided identity", "h=2", GUIDED | {"guide.horizon": 2}, rates_of="guess maps h=0"),
        Variant(
            "forward, exact head",
            "K=1",
            {"method.name": "spry", "method.exact_head": True},
            rates_of="forward K=1",
            only="head",
        ),
        Variant("forward", "K=8", {"method.name": "spry", "method.num_tangents": 8}, rates_of="forward K=1"),
        Variant(
            "bottleneck, frozen B",
            "K=1",
            {"method.name": "spry_bottleneck", "adapter.frozen": "b", "method.exact_head": True},
            rates_of="forward K=1",
            only="head",
        ),
        Variant("guided maps, momentum", "h=0", MAPS | {"guide.momentum": True}, maps=True, rates_of="guess maps h=0"),
        Variant(
            "forward, LoRA-XS",
            "K=16=d",
            {
                "method.name": "spry",
                "adapter.kind": "lora_xs",
                "adapter.rank": 4,
                "method.num_tangents": 16,
                "method.distribution": "coordinate",
                "method.tangents_per": "unit",
                "method.exact_head": True,
            },
            rates_of="forward K=1",
            only="head",
        ),
    )
}


def settings_of(task: FrontierTask, variant: Variant, data_folder: str, rate: float, seed: int) -> Settings:
    """The settings of one run: the task's, then the variant's own."""
    public = {}
    if variant.maps:
        public = task.public | {"guide.text": f"{data_folder}/{task.public['guide.text']}"}
    budget = {}
    if variant.budget_states is not None:
        budget = {"method.budget": variant.budget_states * task.hidden_bytes}
    adapter = {
        k: v
        for k, v in task.settings.items()
        if k == "adapter.alpha" and variant.settings.get("adapter.kind", "lora") != "lora"
    }
    shared = {key: value for key, value in task.settings.items() if key not in adapter}
    fixed = {
        "seed": seed,
        "data.name": f"{data_folder}/{task.data}",
        "server.learning_rate": rate,
    }
    return shared | public | budget | variant.settings | fixed
