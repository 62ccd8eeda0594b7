"""A whole run: its parts, and what must hold between them."""

from pydantic import Field, model_validator

from spryfl.config.data import WITH_CLASSES, DataConfig, PartitionConfig, TaskConfig
from spryfl.config.method import GuideConfig, MethodConfig
from spryfl.config.model import AdapterConfig, ModelConfig
from spryfl.config.part import Overrides, Part, flattened
from spryfl.config.privacy import NOT_OF_EXAMPLES, PrivacyConfig
from spryfl.config.training import ClientsConfig, EvaluationConfig, LocalConfig, RuntimeConfig, ServerConfig
from spryfl.errors import nearest
from spryfl.federated.method import METHODS
from spryfl.gradients.kinds import SlopesPer


class CompareConfig(Part):
    """One more run beside the main one, equal but for what `set` overrides."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="names its folder under compare/")
    label: str | None = None
    set: Overrides = Field(default_factory=dict, description="'part.key' = value")


class RunConfig(Part):
    """A whole run."""

    label: str | None = Field(None, description="what displays and tables call the run; the method by default")
    seed: int = Field(
        0, ge=0, lt=2**63, description="of every random draw but privacy's; the same seed gives the same run"
    )
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    task: TaskConfig = TaskConfig()
    partition: PartitionConfig = PartitionConfig()
    method: MethodConfig = MethodConfig()
    guide: GuideConfig = GuideConfig()
    local: LocalConfig = LocalConfig()
    server: ServerConfig = ServerConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    clients: ClientsConfig = ClientsConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    compare: tuple[CompareConfig, ...] = Field(
        (), description="runs beside this one, as [[compare]] tables of name, label and set = { 'part.key' = value }"
    )

    @property
    def own_slopes(self) -> SlopesPer:
        """What was asked for; else one a unit, or none where they are all of them: a tangent each is too many."""
        return self.guide.slopes or ("none" if METHODS[self.method.name].assignment == "all" else "unit")

    @model_validator(mode="after")
    def _cohort_fits(self) -> "RunConfig":
        if self.partition.kind != "column" and self.server.cohort_size > self.partition.num_clients:
            raise ValueError(
                f"server.cohort_size = {self.server.cohort_size} exceeds partition.num_clients = "
                f"{self.partition.num_clients}: lower the cohort or raise the number of clients"
            )
        if self.server.sampling == "size" and self.partition.kind == "own":
            raise ValueError(
                "server.sampling = 'size': how much each client holds is not known where partition.kind = 'own': leave "
                "it out"
            )
        if self.server.aggregation != "mean" and METHODS[self.method.name].pacing == "pool":
            raise ValueError(
                f"server.aggregation = '{self.server.aggregation}': method '{self.method.name}' pools gradients over "
                "rounds as a mean; leave it out, or bound clients with server.clip_norm"
            )
        names = [entry.name for entry in self.compare]
        if len(set(names)) < len(names):
            raise ValueError(f"compare: names must differ, got {names}")
        labels = [self.label or self.method.name, *(entry.label or entry.name for entry in self.compare)]
        if len(set(labels)) < len(labels):
            raise ValueError(f"compare: plots would show runs of one name as one, got {labels}: give each a label")
        return self

    @model_validator(mode="after")
    def _estimator_fits(self) -> "RunConfig":
        server = self.server.optimizer or METHODS[self.method.name].server
        if self.guide.momentum and server in ("sgd", "adagrad"):
            raise ValueError(
                f"guide.momentum: server.optimizer = '{server}' keeps no momentum; choose 'yogi' or 'adam'"
            )
        if self.model.dtype == "bfloat16" and self.method.own_estimator == "zeroth_order":
            raise ValueError(
                "model.dtype = 'bfloat16': finite differences drown in its rounding; set 'float32', or 'auto', which "
                "chooses that for them"
            )
        for key in ("explore", "momentum"):
            if getattr(self.guide, key) and self.method.own_estimator not in ("guided", "auto"):
                raise ValueError(
                    f"guide.{key} goes with guided tangents, and estimator '{self.method.own_estimator}' has none: "
                    "leave it out, or set method.name = 'spry_guided'"
                )
            if getattr(self.guide, key) and self.own_slopes == "none":
                raise ValueError(f"guide.{key} needs slopes along what it adds: set guide.slopes = 'step' or 'unit'")
        if self.guide.explore and self.method.distribution != "gaussian":
            raise ValueError(
                f"guide.explore draws normal numbers, as method.distribution = '{self.method.distribution}' would be "
                "biased beside a guess: leave one of them out"
            )
        if self.guide.trust > 0 and self.method.own_estimator != "guided":
            raise ValueError(
                f"guide.trust = {self.guide.trust:g} scales steps along guesses, and estimator "
                f"'{self.method.own_estimator}' may take others: leave it out, or set method.estimator = 'guided'"
            )
        trains_a = self.adapter.kind in ("lora", "dora") and self.adapter.frozen != "a"
        if self.method.own_estimator == "bottleneck" and not trains_a:
            raise ValueError(
                "method.estimator = 'bottleneck' perturbs the output of LoRA's A, which this adapter does not train: "
                "set adapter.kind = 'lora' with frozen = 'b' (or 'none'), or method.estimator = 'forward'"
            )
        return self

    @model_validator(mode="after")
    def _nothing_passes_privacy_by(self) -> "RunConfig":
        if self.privacy.level == "none":
            return self
        if self.evaluation.held_out > 0:
            raise ValueError("privacy: clients' evaluations travel without noise; leave evaluation.held_out out")
        if self.server.sampling != "uniform":
            raise ValueError("privacy: what is spent is known for uniform cohorts only; leave server.sampling out")
        if self.privacy.level == "client" and METHODS[self.method.name].pacing != "none":
            raise ValueError(
                f"privacy.level = 'client': method '{self.method.name}' looks at updates before they are noised; take "
                "another method, such as 'spry'"
            )
        return self

    @model_validator(mode="after")
    def _examples_can_be_private(self) -> "RunConfig":
        if self.privacy.level != "example":
            return self
        own = self.method.own_estimator
        if own in NOT_OF_EXAMPLES:
            raise ValueError(
                f"privacy.level = 'example': noised slopes do not make estimator '{own}' private, as "
                f"{NOT_OF_EXAMPLES[own]}; set method.estimator = 'forward' or 'zeroth_order', or level = 'client'"
            )
        if self.method.exact_head:
            raise ValueError(
                "privacy.level = 'example': method.exact_head sends a gradient without noise; leave it out"
            )
        if self.local.logit_adjustment > 0:
            raise ValueError(
                "privacy.level = 'example': local.logit_adjustment counts all of a client's labels, which no noise "
                "covers; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _clients_can_be_private(self) -> "RunConfig":
        if self.privacy.level != "client":
            return self
        wrong = "privacy.level = 'client': "
        if self.server.aggregation != "mean":
            raise ValueError(
                f"{wrong}the noise is measured for a mean, not for server.aggregation = '{self.server.aggregation}'; "
                "leave it out"
            )
        if self.server.clip_norm is not None:
            raise ValueError(f"{wrong}privacy.clip bounds clients' changes already: leave server.clip_norm out")
        if self.clients.memory or self.method.own_estimator == "auto":
            raise ValueError(
                f"{wrong}units are then dealt by place in a secret cohort, which clients.memory and method.estimator = "
                "'auto' would change; leave them out"
            )
        if self.partition.kind != "column" and self.privacy.delta >= 1 / self.partition.num_clients:
            raise ValueError(
                f"{wrong}privacy.delta = {self.privacy.delta:g} would allow publishing one of "
                f"{self.partition.num_clients} clients outright; set it well below {1 / self.partition.num_clients:g}"
            )
        return self

    @model_validator(mode="after")
    def _columns_suit_the_task(self) -> "RunConfig":
        kind, columns = self.task.kind, list(self.data.text_columns)
        if kind == "classification" and len(columns) > 3:
            raise ValueError(
                f"data.text_columns: classification reads three columns at most, not {columns}: leave some out, or set "
                "task.kind = 'prompted' with a template"
            )
        if kind == "qa" and len(columns) != 2:
            raise ValueError(
                f"data.text_columns: task.kind = 'qa' reads two columns, the question and its context, not {columns}: "
                "set data.text_columns = ['question', 'context'] and data.label_column = 'answers'"
            )
        if kind == "language_model" and self.task.template is None and len(columns) != 1:
            raise ValueError(
                f"data.text_columns: a text alone is one column, not {columns}: leave some out, or set task.template"
            )
        if kind not in WITH_CLASSES and self.local.logit_adjustment > 0:
            raise ValueError(
                f"local.logit_adjustment adjusts to shares of classes, which task.kind = '{kind}' has none of: leave "
                "it out"
            )
        if kind not in WITH_CLASSES and self.partition.kind == "dirichlet":
            raise ValueError(
                f"partition.kind = 'dirichlet' shares rows by class, which task.kind = '{kind}' has none of: set "
                "partition.kind = 'iid', 'quantity' or 'column'"
            )
        return self

    @model_validator(mode="after")
    def _maps_suit_the_task(self) -> "RunConfig":
        if self.guide.guess != "maps" or self.task.kind in WITH_CLASSES:
            return self
        if self.task.kind == "qa":
            raise ValueError(
                "guide.guess = 'maps': public text has no answers to fit on; set guide.guess = 'identity' for 'qa'"
            )
        if self.guide.across:
            raise ValueError(
                "guide.across = true takes a row's loss to sit on one token, and a language model's sits on many: set "
                "guide.across = false"
            )
        return self

    @model_validator(mode="after")
    def _template_takes_the_columns(self) -> "RunConfig":
        if self.task.template is None:
            return self
        columns = self.data.text_columns
        try:
            fields = [column for _, column in self.task.pieces if column is not None]
        except ValueError as error:
            raise ValueError(f"task.template: {error}; a brace that is no column is doubled, {{{{ or }}}}") from None
        for field in sorted(set(fields).difference(columns)):
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
        if self.task.kind == "language_model":
            last = self.task.written_column
            if last is None or fields.count(last) > 1:
                raise ValueError(
                    "task.template: a language model learns to write the last column, so the template must end with "
                    "it, and it must stand there alone: move it, or take away what follows"
                )
        return self

    def differences(self, other: "RunConfig") -> list[str]:
        """'part.key: this one's value, the other's' of all that changes a result: not labels, not processes."""
        ours, theirs = (flattened(config.model_dump(mode="json", exclude=_NO_RESULT)) for config in (self, other))
        return [
            f"{key}: {ours.get(key)!r}, now {theirs.get(key)!r}"
            for key in ours | theirs
            if ours.get(key) != theirs.get(key)
        ]


_NO_RESULT = {"label", "runtime"}
