"""What training a model would take, predicted before a run: each estimator, precision and streaming choice.

Nothing is downloaded or loaded but the model's configuration. Activations and operations come from dry runs of
the passes themselves (`models.dry_run`), weights from the configuration's shapes, traffic from the adapter's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, isqrt
from typing import Any

import torch

from spryfl.config import AdapterConfig, TaskKind
from spryfl.errors import ConfigError
from spryfl.federated.messages import SEED_BYTES
from spryfl.gradients.revolve import num_advances
from spryfl.memory.plan import PROCESS_BYTES, PassCost, Prediction, adapter_state_bytes, least, recommend
from spryfl.models.dry_run import DryRun, Work
from spryfl.models.weights import PACKED, Precision, WeightBytes, count_weights

VALUE_BYTES = 4  # values and slopes travel in float32
GUESSABLE = ("classification", "prompted")
"""Tasks whose loss sits on one token, for which backward maps are fitted."""


@dataclass(frozen=True)
class PlanRequest:
    """What is to be planned.

    Attributes:
        config: transformers' own, of the model.
        num_tangents: K, directions a step of forward mode and finite differences.
        cohort_size: clients among which units are split; one client trains all of them.
        budget_bytes: what a client may take, resident; None plans without one.
        dtype: what packed weights compute in, and the dense precision that is preferred.
        task: what the model is for.
        stored: how its weights are packed on disk; None if they are not, so that every precision can be made of them.
        mappable: whether its file can be mapped into memory, as a GGUF file cannot.
    """

    config: Any
    adapter: AdapterConfig
    batch: int
    tokens: int
    num_tangents: int = 1
    cohort_size: int = 1
    budget_bytes: int | None = None
    dtype: torch.dtype = torch.float32
    task: TaskKind = "classification"
    stored: Precision | None = None
    mappable: bool = True

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """From the most wanted to the least; of a model that is stored packed, that alone."""
        if self.stored is not None:
            return (self.stored,)
        dense: tuple[Precision, ...] = ("float32", "bfloat16")
        return (*(dense if self.dtype == torch.float32 else dense[::-1]), *PACKED)


@dataclass(frozen=True)
class Plan:
    """Every way to train, and the one recommended; None if nothing fits."""

    request: PlanRequest
    rows: tuple[Prediction, ...]
    recommended: Prediction | None
    num_layers: int

    def require_fit(self) -> Prediction:
        """The recommended way.

        Raises:
            ConfigError: nothing fits; names the least and how to reach it.
        """
        if self.recommended is not None:
            return self.recommended
        assert self.request.budget_bytes is not None
        row, budget = least(self.rows), self.request.budget_bytes
        fixed = row.peak_bytes - row.activation_bytes
        if fixed < budget:
            other = (
                f"or lower --batch or --tokens, as {row.activation_bytes:,} bytes of it are activations and the rest "
                f"leaves {budget - fixed:,} for them; a smaller method.chunk, which is not planned here, spares some"
            )
        else:
            other = f"as weights, adapter and process alone take {fixed:,} bytes, whatever the batch"
        raise ConfigError(
            f"no way to train fits {budget:,} bytes. The least is {row.name} with {row.peak_bytes:,} bytes: raise the "
            f"budget to that, {other}"
        )

    @property
    def reason(self) -> str:
        """Why the recommended way is recommended, in one sentence."""
        row, budget = self.require_fit(), self.request.budget_bytes
        among = "of all" if budget is None else "that fits"
        exact = f"it has the fastest exact gradient {among}"
        why = {
            "guided": f"no exact gradient fits, and it is the fastest guess of one {among}",
            "forward": f"neither an exact nor a guessed gradient fits, and it is the fastest forward gradient {among}",
            "zeroth_order": "no exact, guessed or forward gradient fits",
        }.get(row.estimator, exact)
        if row.streamed:
            why += ", though its weights are read from disk at every step"
        return f"{row.name}: {why}.{self._conversion(row)}"

    def _conversion(self, row: Prediction) -> str:
        """What is to be written first, as streamed weights pass through as they lie on disk."""
        if not row.streamed:
            return ""
        if row.precision in PACKED and self.request.stored is None:
            return f" Write them so first: spry quantize MODEL OUT_DIR --precision {row.precision}."
        return "" if self.request.mappable else " Write them as safetensors first: model.save_pretrained(OUT_DIR)."


def make_plan(request: PlanRequest) -> Plan:
    """Predict every way to train a model.

    Raises:
        ModelError: no adapter, or no checkpointing, is known for this model.
        ConfigError: more tokens than the model reads.
    """
    limit = getattr(request.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and request.tokens > limit:
        raise ConfigError(f"--tokens {request.tokens}: this model reads at most {limit} tokens")
    dry_runs = DryRuns(request)
    rows = [row for precision in request.precisions for row in Predictor(request, dry_runs, precision).rows()]
    chosen = recommend(rows, request.budget_bytes, request.precisions)
    return Plan(request, tuple(rows), chosen, dry_runs.of("float32").work.num_layers)


class DryRuns:
    """The dry runs of a plan; precisions that compute alike share one."""

    def __init__(self, request: PlanRequest) -> None:
        self._request = request
        self._made: dict[tuple[torch.dtype, bool], DryRun] = {}

    def of(self, precision: Precision, dtype: torch.dtype | None = None) -> DryRun:
        """The passes in a precision.

        Args:
            dtype: what packed weights compute in, if not what the plan says.
        """
        packed = precision in PACKED
        key = (dtype or self._request.dtype if packed else getattr(torch, precision), packed)
        if key not in self._made:
            request = self._request
            self._made[key] = DryRun(
                Work(request.config, request.adapter, request.batch, request.tokens, *key, task=request.task)
            )
        return self._made[key]


class Predictor:
    """The ways to train in one precision."""

    def __init__(self, request: PlanRequest, dry_runs: DryRuns, precision: Precision) -> None:
        self.request, self.precision, self._dry_runs = request, precision, dry_runs
        self.dry = dry_runs.of(precision)
        self.depth = self.dry.work.num_layers
        self._inference = self.dry.inference()
        self._basis = self._inference.flops_at(self.depth)

    @cached_property
    def weights(self) -> WeightBytes:
        return self._weights(self.dry.work.dtype)

    def rows(self) -> Iterator[Prediction]:
        """In memory first, then streamed."""
        for streamed in (False, True):
            if streamed and self.weights.shared:
                continue  # every call of a shared layer would read it again, to save nothing
            yield self._row("inference", streamed, self._inference.peak_at(self.depth), 1.0, visits=1)
            yield self._forward(streamed)
            if self.request.task in GUESSABLE and self.depth > 1:
                yield self._guided(streamed)
            if self.precision != "bfloat16":  # in whose rounding finite differences drown
                yield self._zeroth_order(streamed)
            plain = self.dry.backprop(False)
            yield self._row("backprop", streamed, plain.peak_at(self.depth), self._mean_time(plain), visits=2)
            checkpointed = self.dry.backprop(True)
            time = self._mean_time(checkpointed)
            yield self._row("backprop_checkpointed", streamed, checkpointed.peak_at(self.depth), time, visits=2)
            if self.depth > 1:
                yield self._budgeted(streamed, checkpointed)

    def _forward(self, streamed: bool) -> Prediction:
        k = self.request.num_tangents
        cost = self.dry.forward(k)
        peak = cost.peak_at(self.depth)
        if self.request.cohort_size > 1 and not self.weights.shared:  # some clients begin above the first layer
            peak = max(peak, self.dry.forward(k, upper=True).peak_at(self.depth))
        return self._row("forward", streamed, peak, self._mean_time(cost), visits=1)

    def _guided(self, streamed: bool) -> Prediction:
        """The guess as it is, from the last hidden state; units are dealt by layer."""
        guess, inference = self.dry.guided(), self._inference.flops_at(self.depth)
        own = ceil(self.depth / min(self.request.cohort_size, self.depth))
        again = min(self.depth, (own - 1) * self.request.cohort_size + 1)  # layers, from its lowest up to its highest
        time = 1 + (own * (guess.flops_at(self.depth) - inference) / self._basis + again - own) / self.depth
        peak = guess.peak_at(self.depth)
        if self.request.cohort_size > 1 and not self.weights.shared:
            peak = max(peak, self.dry.guided(upper=True).peak_at(self.depth))
        note = "guesses from the last hidden state; maps come down too"
        return self._row("guided", streamed, peak, time, visits=1 + again / self.depth, note=note)

    def _zeroth_order(self, streamed: bool) -> Prediction:
        dry = self._dry_runs.of(self.precision, torch.float32)
        passes = 2 * self.request.num_tangents
        return self._row(
            "zeroth_order", streamed, dry.inference().peak_at(self.depth), float(passes), passes, dtype=torch.float32
        )

    def _budgeted(self, streamed: bool, checkpointed: PassCost) -> Prediction:
        """As many kept layer inputs as fit, but fewer than per layer; their square root where there is no budget."""
        state = self.dry.work.state_bytes
        base = checkpointed.peak_at(self.depth) - self.depth * state

        def row(num_kept: int) -> Prediction:
            again = num_advances(self.depth, num_kept)
            time = self._mean_time(checkpointed, num_kept)
            visits = 2 + again / self.depth
            note = f"keeps {num_kept} of {self.depth} layer inputs: method.budget = {num_kept * state}"
            return self._row("backprop_budgeted", streamed, base + num_kept * state, time, visits, note)

        if self.request.budget_bytes is None:
            return row(max(1, isqrt(self.depth)))
        spare = self.request.budget_bytes - row(1).peak_bytes
        return row(min(max(1, 1 + spare // state), self.depth - 1))

    def _mean_time(self, cost: PassCost, num_kept: int | None = None) -> float:
        """Operations over inference's, the mean over the clients among which units are split.

        Layers below a client's lowest unit cost what inference costs. Units are dealt out cyclically, so client m
        begins with unit m.
        """
        num_units = max(1, self.dry.adapter.num_units)
        clients = range(min(self.request.cohort_size, num_units))
        lowest = [0 if self.weights.shared else m * self.depth // num_units for m in clients]
        total = 0
        for below in lowest:
            total += cost.flops_at(self.depth - below) + below * self._inference.layer_flops
            if num_kept is not None:
                total += num_advances(self.depth - below, num_kept) * self._inference.layer_flops
        return total / len(lowest) / self._basis

    def _row(
        self,
        estimator: str,
        streamed: bool,
        activations: int,
        time: float,
        visits: float,
        note: str = "",
        dtype: torch.dtype | None = None,
    ) -> Prediction:
        dtype = dtype or self.dry.work.dtype
        weights = self.weights if dtype == self.dry.work.dtype else self._weights(dtype)
        size = self.dry.adapter
        trained = 0 if estimator == "inference" else size.unit_values + size.head_values
        assigned = size.unit_values // max(1, min(self.request.cohort_size, size.num_units)) + size.head_values
        has_slopes = estimator in ("forward", "zeroth_order")
        return Prediction(
            estimator=estimator,
            precision=self.precision,
            streamed=streamed,
            weights_bytes=weights.streamed if streamed else weights.resident,
            activation_bytes=activations,
            adapter_bytes=adapter_state_bytes(trained, dtype.itemsize),
            process_bytes=PROCESS_BYTES,
            relative_time=time,
            read_bytes=round(visits * weights.read_a_visit) if streamed else 0,
            bytes_up=VALUE_BYTES * assigned if trained else 0,
            bytes_up_slopes=VALUE_BYTES * self.request.num_tangents if has_slopes else None,
            bytes_down=VALUE_BYTES * trained + SEED_BYTES if trained else 0,
            note=note,
        )

    def _weights(self, dtype: torch.dtype) -> WeightBytes:
        num_tokens = self.request.batch * self.request.tokens
        request = self.request
        return count_weights(
            request.config, self.precision, dtype, num_tokens, task=request.task, mappable=request.mappable
        )
