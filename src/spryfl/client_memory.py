"""What clients of stated memory can hold in a run, by the same predictions as `spry plan`'s."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from spryfl.errors import ConfigError
from spryfl.federated.capacity import Capacity, ClientSettings
from spryfl.federated.method import Estimator
from spryfl.forward_mode.budget import DEFAULT_CHUNK_BYTES
from spryfl.gradients.backprop import Checkpointing
from spryfl.memory.plan import PROCESS_BYTES, PassCost, adapter_state_bytes
from spryfl.models.dry_run import DryRun
from spryfl.models.units import HEAD

CHUNK_STEPS = (1, 4, 16, 64)  # the default budget of temporaries over these


@dataclass(frozen=True)
class ClientWork:
    """What every client of a run does.

    Attributes:
        layers: by unit, from the lowest up: how many layers lie below it; None for the head.
        weights_bytes: frozen; of a streamed model, what of them is resident at a time.
        num_tangents: K that is wanted.
        kept_bytes: of layer inputs, for checkpointing within a budget.
    """

    dry: DryRun
    layers: dict[str, int | None]
    weights_bytes: int
    streamed: bool
    estimator: Estimator
    checkpointing: Checkpointing
    num_tangents: int
    kept_bytes: int | None

    @property
    def fixed_bytes(self) -> int:
        """Of the process, the weights, the adapter and its optimizer."""
        size = self.dry.adapter
        trained = adapter_state_bytes(size.unit_values + size.head_values, self.dry.work.dtype.itemsize)
        return PROCESS_BYTES + self.weights_bytes + trained

    def activations(self, settings: ClientSettings, below: int | None) -> int:
        """Predicted peak of a step whose lowest trained unit has so many layers below it; None: the head alone."""
        depth, itemsize = self.dry.work.num_layers, self.dry.work.dtype.itemsize
        inference = self.dry.inference(settings.chunk_bytes).peak_at(depth)
        if self.estimator == "zeroth_order":
            return inference
        if below is None:
            k, head = settings.num_tangents, self.dry.adapter.head_values
            return inference + head * ((1 + k) * itemsize + 4 * k)
        own = self._pass(settings).peak_at(depth - below) - self._not_kept(depth - below)
        return max(inference, own)

    def _pass(self, settings: ClientSettings) -> PassCost:
        if self.estimator == "forward":
            return self.dry.forward(settings.num_tangents, settings.chunk_bytes)
        return self.dry.backprop(self.checkpointing != "none", settings.chunk_bytes)

    def _not_kept(self, depth: int) -> int:
        """What checkpointing within a budget saves on checkpointing per layer."""
        if self.estimator != "backprop" or self.kept_bytes is None:
            return 0
        state = self.dry.work.state_bytes
        return max(0, depth - self.kept_bytes // state) * state


def client_capacity(work: ClientWork, budgets: Sequence[int]) -> Capacity:
    """What each budget can hold, under the fewest settings that leave no better choice to any of them.

    Raises:
        ConfigError: some budget holds no unit under any settings.
    """
    settings, peaks = [], []
    for candidate in _settings(work):
        settings.append(candidate)
        peaks.append(_peaks(work, candidate))
        if max(peaks[-1]) <= min(budgets):
            break  # whatever comes after would only be slower
    by_unit = dict(zip(work.layers, zip(*peaks, strict=True), strict=True))
    capacity = Capacity(tuple(budgets), tuple(settings), by_unit)
    if min(budgets) < capacity.least():
        raise ConfigError(
            f"clients.memory: a client with {min(budgets):,} bytes can train no unit. The least takes "
            f"{capacity.least():,} bytes, {work.fixed_bytes:,} of them for process, weights and adapter: raise it to "
            "that, or lower local.batch_size or data.max_tokens"
        )
    return capacity


def _settings(work: ClientWork) -> Iterator[ClientSettings]:
    """From the most wanted to the least: smaller chunks cost a little time, fewer tangents cost accuracy."""
    k = work.num_tangents
    while True:
        for step in CHUNK_STEPS:
            yield ClientSettings(k, DEFAULT_CHUNK_BYTES // step, work.streamed)
        if k == 1 or work.estimator != "forward":  # finite differences take their directions one by one
            return
        k //= 2


def _peaks(work: ClientWork, settings: ClientSettings) -> list[int]:
    """By unit, what a client takes whose lowest unit it is: no unit takes more than those below it."""
    own = [work.fixed_bytes + work.activations(settings, below) for below in work.layers.values()]
    return list(accumulate(reversed(own), max))[::-1]


def layers_below(units: Sequence[str], layer_paths: Sequence[str]) -> dict[str, int | None]:
    """By unit, how many layers lie below it: None for the head, 0 for what lies in no layer.

    Args:
        layer_paths: of the repeated layers, in the order a forward pass calls them; a shared one counts where it is
            called first.
    """
    first = {path: layer_paths.index(path) for path in layer_paths}

    def below(unit: str) -> int | None:
        if unit == HEAD:
            return None
        return next((place for path, place in first.items() if unit.startswith(f"{path}.")), 0)

    return {unit: below(unit) for unit in units}
