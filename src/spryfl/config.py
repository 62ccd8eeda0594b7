"""What a run is: small frozen models, one per part, each validates itself.

A run's file is TOML with one table per part; `load_config` reads it, applies overrides and reports
every problem at once, each with its remedy.
"""

import string
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from spryfl.errors import ConfigError, nearest
from spryfl.federated.method import METHODS, Estimator
from spryfl.gradients.kinds import Distribution, TangentsPer
from spryfl.sizes import parse_size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


def _size(value: Any) -> int:
    try:
        return parse_size(value)
    except ConfigError as error:
        raise ValueError("a number of bytes, or text such as '64MiB' or '1.5GB'") from error


Size = Annotated[int, BeforeValidator(_size)]


ADAPTER_KINDS = {
    "lora": "low-rank pairs A, B beside frozen linear maps (any rank, any target modules, rsLoRA; one may be frozen)",
    "lora_xs": "rank x rank numbers between frozen factors, the weight's own singular vectors",
    "vera": "two trained vectors scale one frozen random pair that all modules share",
    "tinylora": "num_values numbers, spread over LoRA-XS's rank x rank by frozen random matrices",
    "head": "nothing: the head alone is trained",
}
"""What a module trains, of in x out, at rank r: lora r (in + out), with A frozen r out, with B frozen r in; lora_xs
r r; vera out + r; tinylora num_values."""
_OF_ONE_KIND = {"alpha": "lora", "rslora": "lora", "frozen": "lora", "num_values": "tinylora"}
LARGEST_XS = 32
"""PEFT's layer that LoRA-XS is built on holds rank^4 numbers of each module."""


TaskKind = Literal["classification", "prompted"]
TASK_KINDS: dict[TaskKind, str] = {
    "classification": "a classification head, trained with the adapter, on any model",
    "prompted": "a decoder's next token after a prompt, compared among one label word a class; no head is trained",
}


class Part(BaseModel):
    """One part of a configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Part):
    """The base model; its weights stay frozen."""

    name: str = Field("builtin:minilm", description="builtin:NAME, a hub id, or a local folder")
    revision: str | None = Field(None, description="the hub revision; pin it for a reproducible run")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="what the model computes in")
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps; auto takes an accelerator if there is one")
    trust_remote_code: bool = Field(False, description="run code from the hub repository")
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none", description="pack the frozen linear maps while loading; a model stored packed stays so by itself"
    )
    streamed: bool = Field(False, description="leave the layers on disk and pass them through memory one by one")


class AdapterConfig(Part):
    """What is trained beside the head."""

    kind: Literal["lora", "lora_xs", "vera", "tinylora", "head"] = "lora"
    rank: Positive = Field(1, description="of the update: LoRA r; VeRA needs more, such as 256")
    alpha: PositiveFloat = Field(1.0, description="lora: the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    target_modules: tuple[str, ...] | None = Field(None, description="module names; query and value by default")
    rslora: bool = Field(False, description="lora: scale by alpha / sqrt(rank) instead")
    frozen: Literal["none", "a", "b"] = Field(
        "none", description="lora: a trains B alone (LoRA-FA); b trains A alone, beside an orthonormal B"
    )
    num_values: Positive | None = Field(None, description="tinylora: numbers trained of a module, at most rank^2")

    @model_validator(mode="after")
    def _fields_belong_to_their_kind(self) -> "AdapterConfig":
        for name, kind in _OF_ONE_KIND.items():
            if kind != self.kind and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to kind = '{kind}', not '{self.kind}': leave it out")
        if self.kind == "lora_xs" and self.rank > LARGEST_XS:
            raise ValueError(f"kind = 'lora_xs' takes a rank of {LARGEST_XS} at most, not {self.rank}: lower it")
        if self.kind == "tinylora" and not 1 <= (self.num_values or 0) <= self.rank**2:
            raise ValueError(
                f"kind = 'tinylora' needs num_values from 1 to rank^2 = {self.rank**2}, got {self.num_values}: "
                "set it, or raise rank"
            )
        return self


class DataConfig(Part):
    """The text and its labels."""

    name: str = Field("builtin:movie_reviews", description="builtin:NAME, a hub id, a local file or folder")
    subset: str | None = Field(None, description="the hub dataset's configuration, such as 'mnli' of glue")
    text_columns: tuple[str, ...] = Field(("text",), min_length=1, max_length=2, description="one, or two for pairs")
    label_column: str = "label"
    test_split: str | None = Field(None, description="split evaluated on; test, else validation, by default")
    test_fraction: Fraction = Field(0.2, description="cut off train where there is no test split")
    max_tokens: Positive = Field(64, description="longer texts are truncated")
    max_train_examples: Positive | None = None
    max_test_examples: Positive | None = None


class TaskConfig(Part):
    """How a model is made to tell the classes apart."""

    kind: TaskKind = "classification"
    template: str | None = Field(None, description="prompted: the prompt, such as 'Review: {text}\\nSentiment:'")
    label_words: tuple[str, ...] | None = Field(
        None, description="prompted: one a class, in the order of the class numbers, such as [' negative', ' positive']"
    )

    @model_validator(mode="after")
    def _prompt_belongs_to_its_kind(self) -> "TaskConfig":
        given = [name for name in ("template", "label_words") if getattr(self, name) is not None]
        if self.kind != "prompted" and given:
            raise ValueError(f"{' and '.join(given)} belong to kind = 'prompted': set it, or leave them out")
        if self.kind == "prompted" and len(given) < 2:
            raise ValueError(
                "kind = 'prompted' needs a template and label_words, such as template = 'Review: {text}\\nSentiment:' "
                "and label_words = [' negative', ' positive']"
            )
        return self

    @property
    def pieces(self) -> tuple[tuple[str, str | None], ...]:
        """The template in order: literal text, and the column that follows it, None after the last piece.

        Raises:
            ValueError: it is no template.
        """
        found = []
        for literal, column, spec, conversion in string.Formatter().parse(self.template or ""):
            if spec or conversion:
                raise ValueError(f"'{{{column}}}' is given a format: write the column alone")
            found.append((literal, column))
        return tuple(found)


class PartitionConfig(Part):
    """How training examples are shared among clients."""

    kind: Literal["dirichlet", "iid", "column"] = "dirichlet"
    num_clients: Positive = Field(100, description="kind column: the column decides")
    alpha: PositiveFloat = Field(1.0, description="Dirichlet concentration; smaller is more unequal")
    min_examples: Positive = Field(2, description="every client holds at least this many")
    column: str | None = Field(None, description="kind column: one client for each value")

    @model_validator(mode="after")
    def _column_belongs_to_its_kind(self) -> "PartitionConfig":
        if (self.kind == "column") != (self.column is not None):
            raise ValueError("kind = 'column' and column = NAME go together: give both or neither")
        return self


NOT_OF_SLOPES: dict[str, str] = {
    "backprop": "directions are not drawn from a seed",
    "guided": "directions are not drawn from a seed",
    "bottleneck": "gradient takes the client's hidden states too",
    "auto": "directions may be guessed ones, or none at all",
}
"""Estimators that no server can follow from slopes, and why."""


class MethodConfig(Part):
    """The federated method and its estimator's settings."""

    name: str = "spry"
    estimator: Estimator | Literal["auto"] | None = Field(
        None,
        description="how clients estimate gradients, the method's own by default; auto: what goes furthest in a second "
        "of what fits each client",
    )
    num_tangents: Positive = Field(1, description="K: directions a step; unused by backprop")
    distribution: Distribution = Field(
        "gaussian", description="of directions; orthogonal and coordinate ones give the exact gradient at K = d"
    )
    tangents_per: TangentsPer = Field("step", description="K directions for all parameters, or for each unit or tensor")
    shrinkage: bool = Field(False, description="scale the estimate to the least squared error; no matter to Adam")
    exact_head: bool = Field(
        False, description="give the head its exact gradient, at no further pass; backprop and guided always do"
    )
    chunk: Size | None = Field(None, description="bound on a pass's temporaries, 32MiB by default; changes no result")
    step_size: PositiveFloat = Field(1e-3, description="h of the zeroth-order difference")
    checkpointing: Literal["none", "per_layer", "budgeted"] = Field("none", description="of backprop")
    budget: Size | None = Field(None, description="budgeted: bytes of layer inputs kept, such as '64MiB' or '1.5GB'")
    head: Literal["every", "cycle"] = Field("every", description="the head goes to every client, or takes its turn")
    rotate: bool = Field(True, description="start the cycle one unit further each round")
    upload: Literal["values", "slopes"] | None = Field(None, description="what travels up; the method's own by default")

    @model_validator(mode="after")
    def _known_and_possible(self) -> "MethodConfig":
        if self.name not in METHODS:
            raise ValueError(f"unknown method '{self.name}'.{nearest(self.name, METHODS)} See: spry list methods")
        if (self.upload or METHODS[self.name].upload) == "slopes" and self.own_estimator in NOT_OF_SLOPES:
            raise ValueError(
                f"upload = 'slopes': nothing can be rebuilt from them with estimator '{self.own_estimator}', whose "
                f"{NOT_OF_SLOPES[self.own_estimator]}; set upload = 'values' or another method"
            )
        if self.own_estimator == "bottleneck" and (self.distribution in ("orthogonal", "coordinate") or self.shrinkage):
            raise ValueError(
                "estimator = 'bottleneck' draws independent directions for every example, unscaled: leave shrinkage "
                "out, and set distribution = 'gaussian' or 'rademacher'"
            )
        if (self.upload or METHODS[self.name].upload) == "slopes" and self.exact_head:
            raise ValueError("exact_head: the head's gradient cannot be rebuilt from slopes; set upload = 'values'")
        if self.estimator == "auto" and self.checkpointing != "none":
            raise ValueError(f"checkpointing = '{self.checkpointing}': estimator = 'auto' chooses it; leave it out")
        if self.checkpointing == "budgeted" and self.budget is None:
            raise ValueError("checkpointing = 'budgeted' needs a budget, such as budget = '64MiB'")
        if self.budget is not None and self.checkpointing != "budgeted":
            raise ValueError(f"budget belongs to checkpointing = 'budgeted', not '{self.checkpointing}': leave it out")
        return self

    @property
    def own_estimator(self) -> Estimator | Literal["auto"]:
        """The estimator asked for, or the method's own."""
        return self.estimator or METHODS[self.name].estimator


class GuideConfig(Part):
    """Guided tangents: where their directions come from, and how the server keeps backward maps."""

    guess: Literal["identity", "maps"] = Field("identity", description="what the layers between count as")
    horizon: int = Field(0, ge=0, description="layers, from the top, that are back-propagated through exactly")
    slopes: Literal["none", "step", "unit", "tensor"] = Field(
        "unit", description="one slope a step, a unit or a tensor; none takes the guess as it is, for a pass less"
    )
    explore: bool = Field(False, description="add a random tangent orthogonal to the guess: unbiased, noisier")
    momentum: bool = Field(False, description="take the slope along the server's momentum too")
    maps: str | None = Field(None, description="backward maps written by spry fit-maps")
    text: str | None = Field(None, description="public text: the server fits maps on it, and anew when they drift")
    text_columns: tuple[str, ...] | None = Field(None, description="in the public text; data.text_columns by default")
    num_texts: Positive = 512
    rank: Positive = Field(32, description="directions of the last hidden state's gradient that maps carry, at most")
    across: bool = Field(True, description="model the gradient on other tokens than the one the loss sits on")
    ridge: PositiveFloat = 1e-3
    check_every: Positive = Field(5, description="rounds after which the server measures the maps' cosine again")
    refit_below: float = Field(0.9, ge=0, le=1, description="refit when it falls below this part of the first one")

    @model_validator(mode="after")
    def _maps_have_a_source(self) -> "GuideConfig":
        if self.guess == "maps" and self.maps is None and self.text is None:
            raise ValueError("guess = 'maps' needs maps (a file written by spry fit-maps) or text (to fit them on)")
        if self.guess != "maps" and (self.maps is not None or self.text is not None):
            raise ValueError(f"maps and text belong to guess = 'maps', not '{self.guess}': set that, or leave them out")
        return self


class LocalConfig(Part):
    """A client's local training."""

    epochs: Positive = Field(
        1, description="passes over a client's examples a round; per-iteration methods take 1 step"
    )
    batch_size: Positive = 8
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    weight_decay: float = Field(0.0, ge=0)


class ServerConfig(Part):
    """The rounds, and what the server does with their updates."""

    num_rounds: Positive = 30
    cohort_size: Positive = Field(10, description="clients a round")
    optimizer: Literal["sgd", "adagrad", "adam", "yogi"] | None = Field(None, description="the method's by default")
    learning_rate: PositiveFloat | None = Field(None, description="0.01; sgd: 1 on values (the mean), 0.1 on gradients")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    tau: PositiveFloat = Field(1e-3, description="adaptivity: added to the denominator")


class EvaluationConfig(Part):
    """How often the global model is evaluated on the test split."""

    every: Positive = Field(5, description="rounds; the last round is always evaluated")
    batch_size: Positive = 64


class ClientsConfig(Part):
    """What the clients' machines are."""

    memory: tuple[Size, ...] = Field(
        (), description="resident memory, dealt to clients in turn: ['700MB', '2GB']; by default it is no matter"
    )


class RuntimeConfig(Part):
    """Where clients run on this machine."""

    num_workers: Positive = Field(1, description="processes; each holds a copy of the model, so 1 for large ones")
    num_threads: Positive | None = Field(None, description="of each process; PyTorch's choice by default")


class CompareConfig(Part):
    """One more run beside the main one, equal but for what `set` overrides."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="names its folder under compare/")
    label: str | None = None
    set: dict[str, Any] = Field(default_factory=dict, description="'part.key' = value")


class RunConfig(Part):
    """A whole run."""

    label: str | None = Field(None, description="what displays and tables call the run; the method by default")
    seed: int = Field(0, ge=0, lt=2**63)
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    task: TaskConfig = TaskConfig()
    partition: PartitionConfig = PartitionConfig()
    method: MethodConfig = MethodConfig()
    guide: GuideConfig = GuideConfig()
    local: LocalConfig = LocalConfig()
    server: ServerConfig = ServerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    clients: ClientsConfig = ClientsConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    compare: tuple[CompareConfig, ...] = ()

    @model_validator(mode="after")
    def _cohort_fits(self) -> "RunConfig":
        if self.partition.kind != "column" and self.server.cohort_size > self.partition.num_clients:
            raise ValueError(
                f"server.cohort_size = {self.server.cohort_size} exceeds partition.num_clients = "
                f"{self.partition.num_clients}: lower the cohort or raise the number of clients"
            )
        server = self.server.optimizer or METHODS[self.method.name].server
        if self.guide.momentum and server == "sgd":
            raise ValueError("guide.momentum: server.optimizer = 'sgd' keeps no momentum; choose 'yogi' or 'adam'")
        trains_a = self.adapter.kind == "lora" and self.adapter.frozen != "a"
        if self.method.own_estimator == "bottleneck" and not trains_a:
            raise ValueError(
                "method.estimator = 'bottleneck' perturbs the output of LoRA's A, which this adapter does not train: "
                "set adapter.kind = 'lora' with frozen = 'b' (or 'none'), or method.estimator = 'forward'"
            )
        names = [entry.name for entry in self.compare]
        if len(set(names)) < len(names):
            raise ValueError(f"compare: names must differ, got {names}")
        return self

    @model_validator(mode="after")
    def _template_takes_the_columns(self) -> "RunConfig":
        if self.task.kind != "prompted":
            return self
        columns = self.data.text_columns
        try:
            fields = {column for _, column in self.task.pieces if column is not None}
        except ValueError as error:
            raise ValueError(f"task.template: {error}; a brace that is no column is doubled, {{{{ or }}}}") from None
        for field in sorted(fields.difference(columns)):
            raise ValueError(
                f"task.template: '{{{field}}}' is not among data.text_columns = {list(columns)}."
                f"{nearest(field, columns)} Add it there, or double the braces if it is no column"
            )
        for column in columns:
            if column not in fields:
                raise ValueError(
                    f"task.template: has no {{{column}}}, which is among data.text_columns: put it into the template, "
                    "or take it out there"
                )
        return self

    def compared(self) -> "dict[str, RunConfig]":
        """The configuration of each `compare` entry, by its name."""
        base = self.model_dump(exclude_none=True, exclude={"compare", "label"})
        return {entry.name: parse_config(with_overrides(base, entry.set)) for entry in self.compare}


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's TOML file and apply `part.key=value` overrides.

    Raises:
        ConfigError: the file is missing or no TOML, or holds unknown keys or impossible values.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Start one with: spry init {path.name}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    config = parse_config(with_overrides(table, dict(map(_parse_override, overrides))))
    config.compared()  # a mistake in a later run must show before the first one starts
    return config


def parse_config(table: Mapping[str, Any]) -> RunConfig:
    """Validate a configuration given as nested tables; all problems are reported at once."""
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(dict(problem)) for problem in error.errors())) from None


def with_overrides(table: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested tables in which each dotted key is set."""
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    for dotted, value in overrides.items():
        target = result
        *parts, key = dotted.split(".")
        for part in parts:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{dotted}: '{part}' is a value, not a table of keys")
        target[key] = value
    return result


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: write it as part.key=value, such as server.num_rounds=10")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()  # a bare word is a string: no quotes needed on the command line
    return key.strip(), value


def _explain(problem: Mapping[str, Any]) -> str:
    """One line for one pydantic error, with the nearest known key where one is unknown."""
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, key = (str(part) for part in problem["loc"])
        known = _fields(parents)
        home = [f"{part}.{key}" for part in RunConfig.model_fields if key in _fields([part])]
        hint = nearest(key, known) or (f" It belongs to {home[0]}." if home else "")
        return f"unknown key '{path}'." + (hint or f" Known here: {', '.join(known)}.")
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem.get("input")
    shown = "" if isinstance(given, dict | BaseModel) else f" (got {given!r})"
    return f"{path}: {message}{shown}" if path else f"{message}{shown}"


def _fields(parents: Sequence[str]) -> list[str]:
    """The keys known at a path of tables."""
    part: type[BaseModel] = RunConfig
    for parent in parents:
        if parent.isdigit():
            part = CompareConfig
            continue
        annotation = part.model_fields[parent].annotation if parent in part.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            part = annotation
    return list(part.model_fields)
