"""What each client has the memory for: predictions (`models.dry_run`) against the budgets that clients state."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from spryfl.config import RunConfig
from spryfl.errors import ConfigError
from spryfl.federated.fitting import PassSettings
from spryfl.forward_mode.budget import DEFAULT_CHUNK_BYTES
from spryfl.gradients.bottleneck import bottlenecks
from spryfl.gradients.kinds import TangentsPer
from spryfl.gradients.tangents import tangent_groups
from spryfl.memory.plan import PROCESS_BYTES, adapter_state_bytes
from spryfl.models.adapters import frozen_tensors
from spryfl.models.dry_run import DryRun, Work
from spryfl.models.layers import transformer_layers
from spryfl.models.loading import AdaptedModel
from spryfl.models.quantization import stored_config
from spryfl.models.sources import find_model
from spryfl.models.units import Unit, parameters_of
from spryfl.models.weights import Precision, count_weights, packed_precision

Passes = Literal["forward", "zeroth_order", "backprop", "per_layer", "budgeted"]
DRAWING_BYTES = 32  # a float32 number, three float64 copies, and one to return
SMALLER_CHUNKS = (DEFAULT_CHUNK_BYTES, 8 * 2**20, 2 * 2**20, 2**19)


@dataclass(frozen=True)
class ClientMemory:
    """Tells which units a client can train together, and with which settings: `fit` is the round loop's `Fit`.

    Attributes:
        budgets: resident bytes, dealt to clients in turn: client i has budget i modulo their number.
        dry: of the largest batch.
        passes: what the estimator runs.
        num_tangents: K of the run; a client without the memory takes half of it, a quarter, .. down to 1.
        weights_bytes: frozen weights resident at a time, an adapter's frozen factors among them.
        values: unit -> how many values it trains.
        layer: unit -> its layer; None for the head, above them all. What else lies outside them counts as the lowest.
        checkpoint_budget_bytes: of passes "budgeted".
        groups: unit -> how many times K tangents it takes; empty where all units share K.
        drawing_bytes: of a number while directions are drawn jointly, beside the tangent it becomes.
        kinds: how many times K tangents a step takes where all units share K; bottlenecks have their own.
        low_inputs: unit -> bytes of what its bottleneck is given, kept; empty for other estimators.
        low_numbers: unit -> numbers at its bottleneck, each with K tangents.
        chunks: what temporaries of a pass may take, from the most; a client without the memory takes less.
    """

    budgets: Sequence[int]
    dry: DryRun
    passes: Passes
    num_tangents: int
    weights_bytes: int
    values: Mapping[str, int]
    layer: Mapping[str, int | None]
    checkpoint_budget_bytes: int = 0
    groups: Mapping[str, int] = field(default_factory=dict)
    drawing_bytes: int = 0
    kinds: int = 1
    low_inputs: Mapping[str, int] = field(default_factory=dict)
    low_numbers: Mapping[str, int] = field(default_factory=dict)
    chunks: Sequence[int] = SMALLER_CHUNKS
    _known: dict[tuple[int, int, int], int] = field(init=False, compare=False, default_factory=dict)

    def budget(self, client: int) -> int:
        """Resident bytes of a client."""
        return self.budgets[client % len(self.budgets)]

    def fit(self, client: int, units: Sequence[str]) -> PassSettings | None:
        """The settings that cost a client the least of its progress: most tangents first, then largest chunks."""
        return self.within(self.budget(client), units)

    def within(self, budget: int, units: Sequence[str]) -> PassSettings | None:
        """As `fit`, for a budget."""
        for k in self._tangents():
            for chunk_bytes in self.chunks:
                if self.peak_bytes(units, k, chunk_bytes) <= budget:
                    return PassSettings(k if self._has_slopes else None, chunk_bytes)
        return None

    def peak_bytes(self, units: Sequence[str], k: int, chunk_bytes: int) -> int:
        """The predicted resident peak of training these units together."""
        own = sum(self.values[unit] for unit in units)
        # Every tangent is as large as what it perturbs, drawn in float32 and held in the model's type.
        rows = k * sum(self.groups[unit] for unit in units) if self.groups else k * self.kinds
        tangent_bytes = 4 + self.dry.work.dtype.itemsize
        tangents = rows * own * tangent_bytes if self.passes == "forward" else 0
        tangents += sum(self.low_inputs.get(unit, 0) for unit in units)
        tangents += sum(k * self.low_numbers.get(unit, 0) * tangent_bytes for unit in units)
        tangents += k * own * self.drawing_bytes if self._has_slopes else 0
        return self.fixed_bytes(units) + tangents + self._activations(self.depth(units), rows, chunk_bytes)

    def fixed_bytes(self, units: Sequence[str]) -> int:
        """What training these units takes whatever the passes: process, weights, adapter."""
        own = sum(self.values[unit] for unit in units)
        everyone = sum(self.values.values())
        adapter = adapter_state_bytes(own, self.dry.work.dtype.itemsize) + 4 * (everyone - own)
        return PROCESS_BYTES + self.weights_bytes + adapter

    def depth(self, units: Sequence[str]) -> int:
        """How many layers, from the top, gradients of these units reach down through."""
        lowest = min((layer for unit in units if (layer := self.layer[unit]) is not None), default=None)
        return 0 if lowest is None else self.dry.work.num_layers - lowest

    def require_some(self, units: Sequence[str], shared: Sequence[str]) -> tuple[str, ...]:
        """Units that no budget holds.

        Raises:
            ConfigError: a client can hold no unit at all; names the least that would do.
        """

        def least(wanted: Sequence[str]) -> int:
            return self.peak_bytes(wanted, 1, self.chunks[-1])

        return require_some(self, self.within, least, units, shared)

    @property
    def _has_slopes(self) -> bool:
        return self.passes in ("forward", "zeroth_order")

    def _tangents(self) -> list[int]:
        """K, K / 2, .., 1 where they cost memory; else K alone."""
        if self.passes != "forward":
            return [self.num_tangents]
        found = [self.num_tangents]
        while found[-1] > 1:
            found.append(found[-1] // 2)
        return found

    def _activations(self, depth: int, k: int, chunk_bytes: int) -> int:
        """Peak of a pass that has gradients to find in the uppermost `depth` layers."""
        key = (depth, k, chunk_bytes)
        if key not in self._known:
            self._known[key] = self._predicted(depth, k, chunk_bytes)
        return self._known[key]

    def _predicted(self, depth: int, k: int, chunk_bytes: int) -> int:
        whole = self.dry.work.num_layers
        inference = self.dry.inference(chunk_bytes).peak_at(whole)
        if self.passes == "zeroth_order" or depth == 0:
            return inference
        upper = depth < whole
        if self.passes == "forward":
            return max(inference, self.dry.forward(k, chunk_bytes, upper=upper).peak_at(whole))
        cost = self.dry.backprop(self.passes != "backprop", chunk_bytes, upper=upper)
        peak = cost.peak_at(depth + upper)  # of a model whose first layer alone is not trained
        if self.passes != "budgeted":
            return max(inference, peak)
        state = self.dry.work.state_bytes
        kept = min(depth, max(1, self.checkpoint_budget_bytes // state))
        return max(inference, peak - (depth - kept) * state)


def chunks_from(largest: int) -> tuple[int, ...]:
    """What a pass's temporaries may take: what the run asks for, then less."""
    return (largest, *(chunk for chunk in SMALLER_CHUNKS if chunk < largest))


def require_some(
    memory: ClientMemory,
    within: Callable[[int, Sequence[str]], object | None],
    least: Callable[[Sequence[str]], int],
    units: Sequence[str],
    shared: Sequence[str],
) -> tuple[str, ...]:
    """Units that no budget holds.

    Args:
        within: (budget, units) -> None if it does not hold them together.
        least: the fewest bytes some units can be trained in.

    Raises:
        ConfigError: a client can hold no unit at all; names the least that would do.
    """
    dealt = [unit for unit in units if unit not in shared] or list(units)
    held = {
        budget: {unit for unit in dealt if within(budget, [unit, *shared]) is not None}
        for budget in dict.fromkeys(memory.budgets)
    }
    poorest = next((budget for budget, found in held.items() if not found), None)
    if poorest is not None:
        raise ConfigError(
            f"clients.memory: {poorest:,} bytes hold no unit of this model; the least is "
            f"{min(least([unit, *shared]) for unit in dealt):,} bytes, of which {PROCESS_BYTES:,} are the process and "
            f"{memory.weights_bytes:,} weights. Raise it, lower local.batch_size or data.max_tokens, or set "
            "model.quantization or model.streamed"
        )
    return tuple(unit for unit in dealt if held and not any(unit in found for found in held.values()))


def client_memory(config: RunConfig, adapted: AdaptedModel, batch: int, tokens: int) -> ClientMemory:
    """The predictions for a run.

    Args:
        config: states the budgets, the method and its settings.
        batch, tokens: of the largest batch of any client, padding included.
    """
    model = adapted.model
    stored = packed_precision(stored_config(model.config, config.model.name))
    kind = stored or config.model.quantization
    packed = kind != "none"
    precision = cast(Precision, kind if packed else str(adapted.dtype).removeprefix("torch."))
    head, mappable = _head_modules(adapted), find_model(config.model.name).gguf_file is None
    weights = count_weights(model.config, precision, adapted.dtype, batch * tokens, head, config.task.kind, mappable)
    factors = sum(tensor.nbytes for tensor in frozen_tensors(model))
    work = Work(model.config, config.adapter, batch, tokens, adapted.dtype, packed, head, config.task.kind)
    by_checkpointing: dict[str, Passes] = {"none": "backprop", "per_layer": "per_layer", "budgeted": "budgeted"}
    with_slopes: dict[str, Passes] = {"forward": "forward", "bottleneck": "forward", "zeroth_order": "zeroth_order"}
    at_once = batch * tokens
    lows = bottlenecks(model, parameters_of(adapted.units)) if config.method.own_estimator == "bottleneck" else {}
    low_of = {unit.name: [lows[name] for name in unit.parameters if name in lows] for unit in adapted.units}
    parameters = [n for u in adapted.units if not (u.is_head and config.method.exact_head) for n in u.parameters]
    return ClientMemory(
        budgets=config.clients.memory,
        dry=DryRun(work),
        passes=with_slopes.get(config.method.own_estimator) or by_checkpointing[config.method.checkpointing],
        num_tangents=config.method.own_num_tangents,
        weights_bytes=(weights.streamed if config.model.streamed else weights.resident) + factors,
        values={unit.name: _num_values(adapted, unit) for unit in adapted.units},
        layer=_layers_of(adapted),
        checkpoint_budget_bytes=config.method.budget or 0,
        groups=_groups_of(adapted, config.method.tangents_per, lows),
        kinds=2 if lows and not lows.keys() >= set(parameters) else 1,
        low_inputs={u: at_once * adapted.dtype.itemsize * sum(m.in_features for m in low_of[u]) for u in low_of},
        low_numbers={u: at_once * sum(m.out_features for m in low_of[u]) for u in low_of},
        chunks=chunks_from(config.method.chunk or DEFAULT_CHUNK_BYTES),
        drawing_bytes=DRAWING_BYTES if config.method.distribution in ("orthogonal", "coordinate") else 0,
    )


def _groups_of(adapted: AdaptedModel, per: TangentsPer, lows: Collection[str]) -> dict[str, int]:
    if per == "step":
        return {}
    found = {}
    for unit in adapted.units:
        kinds = [[n for n in unit.parameters if n in lows], [n for n in unit.parameters if n not in lows]]
        found[unit.name] = sum(len(tangent_groups(per, [names])) for names in kinds if names)
    return found


def _head_modules(adapted: AdaptedModel) -> tuple[str, ...]:
    """Paths, in the base model, of the modules trained in full."""
    names = [name for unit in adapted.units if unit.is_head for name in unit.parameters]
    paths = (name.partition(".modules_to_save.")[0].removeprefix("base_model.model.") for name in names)
    return tuple(dict.fromkeys(paths))


def _num_values(adapted: AdaptedModel, unit: Unit) -> int:
    return sum(adapted.model.get_parameter(name).numel() for name in unit.parameters)


def _layers_of(adapted: AdaptedModel) -> dict[str, int | None]:
    """Unit -> the number of the layer it lies in; None for the head. Of a shared layer, the lowest call."""
    numbers = {layer: number for number, layer in enumerate(transformer_layers(adapted.model))}
    paths = {f"{path}.": numbers[module] for path, module in adapted.model.named_modules() if module in numbers}
    found: dict[str, int | None] = {}
    for unit in adapted.units:
        outside = None if unit.is_head else 0  # an embedding's gradient has passed all layers
        found[unit.name] = next((n for path, n in paths.items() if unit.parameters[0].startswith(path)), outside)
    return found
