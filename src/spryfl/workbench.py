"""A configuration made real: model, data, partition, and what the round loop needs of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from torch import Tensor, nn

from spryfl.client_choice import ClientChoice, GuidedMemory, client_choice
from spryfl.client_memory import ClientMemory, client_memory
from spryfl.config import RunConfig
from spryfl.data.examples import Batch, Examples
from spryfl.data.loading import Rows, load_own_rows, load_rows
from spryfl.data.logit_adjustment import AdjustedClassification, label_offset
from spryfl.data.partition import Partition, hold_out, label_counts, share_out
from spryfl.data.task import Answers, Classifier, Evaluation, Sample, Task, TokenTask
from spryfl.errors import ConfigError
from spryfl.estimators import CHOSEN_AMONG, new_estimator
from spryfl.federated.accounting import Accountant
from spryfl.federated.client import Client, LocalTraining, loaded, read_values
from spryfl.federated.method import METHODS
from spryfl.federated.privacy import ClientPrivacy
from spryfl.federated.schedule import Schedule
from spryfl.federated.server_optimizer import ServerUpdate, default_learning_rate
from spryfl.federated.state import FederatedState, Federation
from spryfl.forward_mode.support import require_support
from spryfl.gradients.estimator import GradientEstimator
from spryfl.models.adapters import dropout_modules
from spryfl.models.loading import AdaptedModel, load_model
from spryfl.models.units import layer_blocks, parameters_of, unit_places
from spryfl.safeguards import (
    accountant_of,
    require_checkpoint_budget,
    require_clients_apart,
    require_enough_dimensions,
    require_guessable,
    require_majorities,
)
from spryfl.tasks import TASKS, Encode


@dataclass(frozen=True)
class PartitionData:
    """One client's view of the tokenized training data."""

    task: Task
    examples: Examples
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        return self.task.batch(self.examples, self.rows[list(rows)].tolist())

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.losses(model, batch)

    def token_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return (self.task.token_losses if isinstance(self.task, TokenTask) else self.task.losses)(model, batch)


@dataclass(frozen=True)
class Workbench:
    """A configuration made real: model, data, partition.

    Attributes:
        encode: tokenizes rows for the task; train and test are encoded already.
        partition: the rows of train that each client trains on.
        label_names: one a class; none where the task has no classes.
        held_out: the rows of train that each client is evaluated on.
    """

    config: RunConfig
    adapted: AdaptedModel
    task: Task
    encode: Encode
    train: Examples
    test: Examples
    partition: Partition
    label_names: tuple[str, ...]
    held_out: Partition

    @classmethod
    def from_config(cls, config: RunConfig) -> "Workbench":
        """Load everything a run needs; every problem with data or model shows here, before any work."""
        rows = load_rows(config.data, config.seed, config.task)
        bench = cls._of_rows(config, rows, *share_out(config, rows))
        require_checkpoint_budget(config, bench.adapted, [*map(bench.batch_tokens, range(len(bench.partition)))])
        require_enough_dimensions(config, bench.federation, bench.adapted.model)
        require_majorities(config, bench.federation)
        require_guessable(config, bench.adapted)
        require_clients_apart(config, bench.federation)
        bench.unheld_units  # noqa: B018  # a budget that holds nothing shows now, before any work
        return bench

    @classmethod
    def of_client(cls, config: RunConfig, client: int, data: str | None, label_names: Sequence[str]) -> "Workbench":
        """Load what one client needs, and no other's rows: those it trains on and those it holds out; no test split.

        Args:
            data: a file or folder with the client's own data; None: its part of the run's data.
            label_names: the server's, one a class.
        """
        others = [np.arange(0)] * client
        if data is not None:
            own_data = config.data.model_copy(update={"name": data, "subset": None})
            rows = load_own_rows(own_data, label_names, config.task)
            sides = hold_out([*others, np.arange(len(rows.train))], config.evaluation.held_out, config.seed)
        else:
            whole = load_rows(config.data, config.seed, config.task)
            shared = share_out(config, whole)
            if client >= len(shared[0]):
                raise ConfigError(
                    f"partition-id {client}: the data make {len(shared[0])} clients, 0 to {len(shared[0]) - 1}"
                )
            training, held_out = (side[client] for side in shared)
            own = np.sort(np.concatenate([training, held_out]))
            rows = replace(whole, train=whole.train.select(own), test=whole.test.select([]))
            sides = ([*others, np.searchsorted(own, training)], [*others, np.searchsorted(own, held_out)])
        return cls._of_rows(config, rows, *sides)

    @classmethod
    def _of_rows(cls, config: RunConfig, rows: Rows, partition: Partition, held_out: Partition) -> "Workbench":
        # Finite differences drown in bfloat16's rounding; "auto" gives that rival float32.
        low_precision = config.method.own_estimator != "zeroth_order"
        options: dict[str, Any] = {"low_precision": low_precision, "task": config.task.kind}
        adapted = load_model(config.model, config.adapter, rows.num_labels or 2, config.seed, **options)
        if config.method.own_estimator in ("forward", "bottleneck", "guided", "auto"):
            require_support(adapted.model, config.model.name)
        task, encode = TASKS[config.task.kind](config, rows, adapted)
        train = encode(rows.train)
        test = encode(rows.test) if len(rows.test) else Examples([], np.empty(0, np.int64))
        # Clients share the dataset's rows, so that all that was made from one is of one client.
        parts, held = ([train.made_from(own) for own in side] for side in (partition, held_out))
        return cls(config, adapted, task, encode, train, test, parts, rows.label_names, held)

    @cached_property
    def accountant(self) -> Accountant | None:
        """What tells how much privacy is spent; None where there is none."""
        return accountant_of(self.config, self.federation)

    @cached_property
    def client_memory(self) -> ClientMemory | None:
        """What each client has the memory for; None where the configuration states none."""
        return self._predictions if self.config.clients.memory else None

    @cached_property
    def client_choice(self) -> ClientChoice | None:
        """What chooses each client's estimator, not calibrated; None where the configuration names one."""
        if self.config.method.own_estimator != "auto":
            return None
        return client_choice(self.config, self.adapted, self._predictions, self.places)

    @cached_property
    def fitting(self) -> ClientChoice | GuidedMemory | ClientMemory | None:
        """What tells which units a client can train, and with which settings; None where memory is no matter."""
        if self.client_memory is not None and self.config.method.own_estimator == "guided":
            return GuidedMemory(client_choice(self.config, self.adapted, self.client_memory, self.places))
        return self.client_choice or self.client_memory

    @cached_property
    def _predictions(self) -> ClientMemory:
        batch = max(min(self.config.local.batch_size, len(self.partition[c])) for c in range(len(self.partition)))
        tokens = max(len(encoding["input_ids"]) for encoding in self.train.encodings)
        return client_memory(self.config, self.adapted, batch, tokens)

    @cached_property
    def unheld_units(self) -> tuple[str, ...]:
        """Units that no client has the memory for; they stay as they are."""
        units = list(self.federation.units)
        return () if self.fitting is None else self.fitting.require_some(units, self.federation.shared)

    @cached_property
    def federation(self) -> Federation:
        """The part of the configuration that the round loop needs."""
        config, method = self.config, METHODS[self.config.method.name]
        head_is_shared = config.method.head == "every"
        server = config.server.optimizer or method.server
        return Federation(
            seed=config.seed,
            num_clients=len(self.partition),
            cohort_size=min(config.server.cohort_size, len(self.partition)),
            units={unit.name: unit.parameters for unit in self.adapted.units},
            shared=tuple(u.name for u in self.adapted.units if u.is_head and head_is_shared),
            assignment=method.assignment,
            blocks=layer_blocks(self.places) if config.method.deal == "layer" else (),
            rotate=config.method.rotate,
            upload=config.method.upload or method.upload,
            training=self.training,
            fit=None if self.fitting is None else self.fitting.fit,
            places={} if config.guide.guess != "maps" else self.places,
            trust=config.guide.trust,
            momentum=config.method.own_estimator in ("guided", "auto") and config.guide.momentum,
            sizes=() if config.partition.kind == "own" else tuple(map(len, self.partition)),
            by_size=config.server.sampling == "size",
            pacing=method.pacing,
            variance_threshold=config.method.own_variance_threshold or math.inf,
            deadline_seconds=config.server.deadline_seconds,
            quorum=config.server.quorum,
            max_update_norm=config.server.max_update_norm,
            server=ServerUpdate(
                kind=server,
                learning_rate=config.server.learning_rate or default_learning_rate(server, method.pace),
                beta1=config.server.beta1,
                beta2=config.server.beta2,
                tau=config.server.tau,
                schedule=Schedule(
                    config.server.schedule, config.server.own_schedule_rounds, config.server.warmup_rounds
                ),
            ),
            aggregation=config.server.aggregation,
            trim=config.server.trim,
            clip_norm=config.server.clip_norm,
            privacy=ClientPrivacy(*config.privacy.strength) if config.privacy.level == "client" else None,
        )

    @cached_property
    def training(self) -> LocalTraining:
        config = self.config
        return LocalTraining(
            pace=METHODS[config.method.name].pace,
            epochs=config.local.epochs,
            batch_size=config.local.batch_size,
            optimizer=config.local.optimizer,
            learning_rate=config.local.learning_rate,
            weight_decay=config.local.weight_decay,
            num_tangents=config.method.own_num_tangents,
            distribution=config.method.distribution,
            tangents_per=config.method.tangents_per,
            shrinkage=config.method.shrinkage,
            chunk_bytes=config.method.chunk,
            num_candidates=config.method.own_num_candidates,
            same_directions=METHODS[config.method.name].same_directions,
            tells_variance=METHODS[config.method.name].pacing == "leave_out",
            tells_loss=config.privacy.level != "example",
        )

    @cached_property
    def places(self) -> dict[str, tuple[int, ...]]:
        """Unit -> the places, in the order of calls from 0, of the layers it lies in; none for the head."""
        return unit_places(self.adapted.model, self.adapted.units)

    @cached_property
    def estimator(self) -> GradientEstimator:
        """The clients' estimator; where each is given its own, what stands in its place."""
        own = self.config.method.own_estimator
        return new_estimator("backprop" if own == "auto" else own, self.config, self.adapted.units)

    @cached_property
    def estimators(self) -> dict[str, GradientEstimator]:
        """By name, those that are chosen among."""
        if self.config.method.own_estimator != "auto":
            return {}
        return {name: new_estimator(name, self.config, self.adapted.units) for name in CHOSEN_AMONG}

    def client(self, client: int) -> Client[Batch]:
        """The client of a partition id; its adapter's dropout is on, the base model's is not."""
        rows = self.partition[client]
        data = PartitionData(self.task, self.train, rows)
        own = self.client_with(data)
        if self.config.local.logit_adjustment > 0:
            offset = label_offset(self.train.labels[rows], len(self.label_names), self.config.local.logit_adjustment)
            task = AdjustedClassification(cast(Classifier, self.task), offset)  # the configuration holds it to classes
            own = replace(own, data=replace(data, task=task), personal=data)
        held_out, size = self.held_out[client].tolist(), self.config.evaluation.batch_size
        if not held_out:
            return own
        return replace(own, score=partial(self.task.evaluate, examples=self.train, rows=held_out, batch_size=size))

    def client_with(self, data: PartitionData) -> Client[Batch]:
        """A client that holds some of the training data."""
        model, dropout = self.adapted.model, dropout_modules(self.adapted.model)
        return Client(model, data, self.estimator, self.training, dropout, self.estimators)

    def batch_tokens(self, client: int) -> int:
        """The most tokens, padding included, that a batch of this client can have."""
        lengths = [len(self.train.encodings[row]["input_ids"]) for row in self.partition[client]]
        return max(lengths) * min(self.config.local.batch_size, len(lengths))

    @property
    def label_counts(self) -> np.ndarray:
        """(clients, labels) rows of each label that each client trains on or holds out; one column without classes."""
        labels = self.train.labels if self.label_names else np.zeros(len(self.train), dtype=np.int64)
        whole = [np.concatenate(parts) for parts in zip(self.partition, self.held_out, strict=True)]
        return label_counts(whole, labels, max(len(self.label_names), 1))

    def truncated(self, *splits: Literal["train", "test"]) -> str | None:
        """How many texts of some splits are not read whole, and the remedy; None where all are."""
        parts = ((split, self.train if split == "train" else self.test) for split in splits)
        cut = [f"{own.num_truncated:,} of {len(own):,} {split} texts" for split, own in parts if own.num_truncated]
        if not cut:
            return None
        most, limit = self.config.data.max_tokens, self.adapted.tokenizer.model_max_length
        remedy = "all that the model reads" if most == limit else "raise it to have them read whole"
        return f"{' and '.join(cut)} are longer than data.max_tokens = {most} and were truncated: {remedy}"

    @property
    def missing_classes(self) -> str | None:
        """How many clients have never seen some class, and the remedy; None where none, or where it was taken."""
        counts = self.label_counts
        lacking = [client for client, own in enumerate(counts) if own.any() and not own.all()]
        if not self.label_names or not lacking or self.config.local.logit_adjustment > 0:
            return None
        first = lacking[0]
        name = self.label_names[int(np.argmin(counts[first]))]
        return (
            f"{len(lacking):,} of {len(counts):,} clients hold no row of some class (client {first} none of '{name}') "
            "and pull towards those they have: local.logit_adjustment = 1 makes up for much of that"
        )

    def initial_state(self) -> FederatedState:
        names = parameters_of(self.adapted.units)
        return FederatedState(0, read_values(self.adapted.model, names))

    def evaluate(self, values: dict[str, Tensor]) -> Evaluation:
        """Loss and metrics of these values on the test split."""
        with loaded(self.adapted.model, values):
            size = self.config.evaluation.batch_size
            return self.task.evaluate(self.adapted.model, self.test, range(len(self.test)), size)

    def samples(self, values: dict[str, Tensor]) -> list[Sample]:
        """What these values make of the test split's first rows; nothing where the task has no answers to read."""
        if not isinstance(self.task, Answers) or self.config.evaluation.num_samples == 0:
            return []
        rows = self.test.made_from(np.arange(min(self.config.evaluation.num_samples, len(self.test))))
        with loaded(self.adapted.model, values):
            return self.task.samples(self.adapted.model, self.test, rows.tolist())

    def save_adapter(self, values: dict[str, Tensor], folder: Path) -> None:
        """Write adapter, head and tokenizer so that `PeftModel.from_pretrained` loads them, in float32."""
        own = {name: self.adapted.model.get_parameter(name).data for name in values}
        try:
            for name, value in values.items():
                self.adapted.model.get_parameter(name).data = value  # the masters, whatever the model computes in
            self.adapted.model.save_pretrained(str(folder), save_embedding_layers=False)
        finally:
            for name, data in own.items():
                self.adapted.model.get_parameter(name).data = data
        self.adapted.tokenizer.save_pretrained(str(folder))
