"""`method.estimator = "auto"`: what each estimator would take of a client and bring, and so which one it uses.

Memory and operations come from dry runs of the very passes, seconds from operations and measured speeds, progress
from `gradients.progress`; `federated.choosing` chooses.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from spryfl.client_memory import ClientMemory, require_some
from spryfl.config import RunConfig
from spryfl.federated.choosing import Calibration, Candidate, Choice, choose
from spryfl.federated.fitting import PassSettings
from spryfl.gradients.guesses import NUM_POSITIONS
from spryfl.gradients.kinds import SlopesPer
from spryfl.gradients.progress import EXACT, forward_cosine, guided_cosine, identity_cosine
from spryfl.gradients.revolve import num_advances
from spryfl.gradients.tangents import tangent_groups
from spryfl.memory.plan import PassCost
from spryfl.models.loading import AdaptedModel


@dataclass(frozen=True)
class ClientChoice:
    """Chooses among estimators for the units of a client: `fit` is the round loop's `Fit`.

    Attributes:
        config: the run's; its guide's and tangents' settings are those of the candidates.
        memory: predictions of activations, and the clients' budgets; none where memory is no matter.
        places: unit -> the places of the layers' calls it lies in; none for the head.
        shapes: unit -> its parameters, by name, and how many numbers each has.
        head: units above the layers.
    """

    config: RunConfig
    memory: ClientMemory
    places: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, Mapping[str, int]]
    head: frozenset[str]
    calibration: Calibration = field(default_factory=Calibration)
    _known: dict[tuple[int | None, tuple[str, ...]], PassSettings | None] = field(
        init=False, compare=False, default_factory=dict
    )

    def calibrated(self, calibration: Calibration) -> "ClientChoice":
        """The same with what was measured; dry runs are not repeated."""
        return replace(self, calibration=calibration)

    def fit(self, client: int, units: Sequence[str]) -> PassSettings | None:
        """The settings of the estimator with the most expected progress per second; None if none fits."""
        return self.within(self.memory.budget(client) if self.memory.budgets else None, units)

    def within(self, budget: int | None, units: Sequence[str]) -> PassSettings | None:
        """As `fit`, for a budget."""
        key = (budget, tuple(sorted(units)))
        if key not in self._known:
            choice = self.choice(budget, units)
            self._known[key] = None if choice is None else replace(choice.candidate.settings, reason=choice.reason)
        return self._known[key]

    def choice(self, budget: int | None, units: Sequence[str]) -> Choice | None:
        """The chosen estimator, and why."""
        return choose(list(self.candidates(budget, units)), budget)

    def require_some(self, units: Sequence[str], shared: Sequence[str]) -> tuple[str, ...]:
        """As `ClientMemory.require_some`."""

        def least(wanted: Sequence[str]) -> int:
            return min(c.peak_bytes for c in self.candidates(0, wanted))

        return require_some(self.memory, self.within, least, units, shared)

    def candidates(self, budget: int | None, units: Sequence[str]) -> Iterator[Candidate]:
        """Every estimator with the largest chunks that fit; the smallest where none do."""
        depth = self.memory.depth(units)
        yield self._backprop(budget, units, "backprop")
        if depth > 0:
            yield self._backprop(budget, units, "per_layer")
            if budget is not None and depth > 1:
                yield self._budgeted(budget, units)
            yield from self._guided(budget, units)
        num_tangents = self.config.method.own_num_tangents
        while num_tangents:
            yield self._forward(budget, units, num_tangents)
            num_tangents //= 2

    def _backprop(self, budget: int | None, units: Sequence[str], kind: str) -> Candidate:
        plain = kind == "backprop"
        memory = self._memories[kind]
        chunk, peak = self._largest_chunk(budget, lambda chunk: memory.peak_bytes(units, 1, chunk))
        flops = self._with_lower_layers(memory.dry.backprop(not plain).flops_at(depth := memory.depth(units)), depth)
        settings = PassSettings(None, chunk, "backprop", "none" if plain else "per_layer")
        name = "backprop" if plain else "backprop checkpointed per layer"
        return Candidate(name, settings, peak, self._seconds(kind, flops, depth), EXACT)

    def _budgeted(self, budget: int, units: Sequence[str]) -> Candidate:
        """As many kept layer inputs as fit, but fewer than per layer; with the smallest chunks, to make room."""
        memory = self._memories["per_layer"]
        depth, state, chunk = memory.depth(units), memory.dry.work.state_bytes, memory.chunks[-1]

        def peak(kept: int) -> int:
            own = replace(memory, passes="budgeted", checkpoint_budget_bytes=kept * state)
            return own.peak_bytes(units, 1, chunk)

        spare = (budget - peak(1)) // state
        kept = min(depth - 1, max(1, 1 + spare))
        if kept > 1 and peak(kept) > budget:
            kept -= 1
        again = num_advances(depth, kept) * self._inference.layer_flops
        flops = self._with_lower_layers(memory.dry.backprop(True).flops_at(depth), depth) + again
        settings = PassSettings(None, chunk, "backprop", "budgeted", kept * state)
        name = f"backprop that keeps {kept} of {depth} layer inputs"
        return Candidate(name, settings, peak(kept), self._seconds("per_layer", flops, depth), EXACT)

    def _guided(self, budget: int | None, units: Sequence[str]) -> Iterator[Candidate]:
        """A horizon from which no layer is left to guess for is backprop per layer, and left out."""
        lowest = self._whole - self.memory.depth(units)
        if any(not self.places[unit] for unit in units if unit not in self.head):
            return  # below the layers, where no guess reaches
        guide = self.config.guide
        horizons = range(self._whole) if guide.guess == "identity" else (guide.horizon,)
        for horizon in horizons:
            if self._whole - horizon - 1 <= lowest:
                break
            yield self._guided_with(budget, units, horizon, "none")
            if self.config.own_slopes != "none":
                yield self._guided_with(budget, units, horizon, self.config.own_slopes)

    def own_guess(self, budget: int | None, units: Sequence[str]) -> Candidate:
        """Guided tangents as the run itself sets them, with the largest chunks that fit."""
        return self._guided_with(budget, units, self.config.guide.horizon, self.config.own_slopes)

    def _guided_with(self, budget: int | None, units: Sequence[str], horizon: int, slopes: SlopesPer) -> Candidate:
        dry, depth, state = self.memory.dry, self.memory.depth(units), self.memory.dry.work.state_bytes
        passed = self._whole - horizon
        own = {place for unit in units for place in self.places[unit]}
        run_back = len(own | set(range(passed, self._whole)))
        guessed = [place for place in own if place < passed]
        between = max(guessed) - min(guessed) + 1 if guessed else 0
        run_again = between - len(guessed)  # layers between that have no units
        rows = self._slope_rows(units, passed, slopes)
        values = sum(self.memory.values[unit] for unit in units)
        upper = depth < self._whole

        def peak(chunk: int) -> int:
            there_and_back = dry.guided(horizon > 0, chunk, upper=upper).peak_at(depth + upper)
            # Inputs of the other layers that are passed exactly, and of the one from which slopes are taken.
            there_and_back += (max(0, horizon - 1) + bool(rows)) * state
            found = max(dry.inference(chunk).peak_at(self._whole), there_and_back)
            if rows:  # the directions, in float32 and float64; the lowest layer's input stays
                directions = rows * values * (4 + 8 + 8 + dry.work.dtype.itemsize)
                passes = dry.forward(rows, chunk, upper=upper).peak_at(self._whole) + state
                found = max(found, passes + directions)
            return self.memory.fixed_bytes(units) + self._map_bytes(own) + found

        chunk, peak_bytes = self._largest_chunk(budget, peak)
        guessing, exact = dry.guided(False), dry.guided(True)
        flops = guessing.flops_at(run_back) + (self._whole - run_back + run_again) * self._inference.layer_flops
        flops += horizon * max(0, exact.flops - guessing.flops)  # of gradients at those layers' inputs
        if rows:
            flops += dry.forward(rows).flops_at(depth)
        cosines = [self._cosine(unit, passed) for unit in units if unit not in self.head]
        settings = PassSettings(None, chunk, "guided", horizon=horizon, slopes=slopes)
        name = f"guided h={horizon}" + (" without slopes" if slopes == "none" else "")
        return Candidate(
            name, settings, peak_bytes, self._seconds("guided", flops, depth), guided_cosine(cosines, slopes)
        )

    def _forward(self, budget: int | None, units: Sequence[str], num_tangents: int) -> Candidate:
        memory = self._memories["forward"]
        chunk, peak = self._largest_chunk(budget, lambda chunk: memory.peak_bytes(units, num_tangents, chunk))
        rows = num_tangents * (sum(memory.groups[unit] for unit in units) if memory.groups else 1)
        depth = memory.depth(units)
        flops = self._with_lower_layers(memory.dry.forward(rows).flops_at(depth), depth)
        settings = PassSettings(num_tangents, chunk, "forward")
        seconds = self._seconds("forward", flops, depth)
        return Candidate(f"forward K={num_tangents}", settings, peak, seconds, self._forward_progress(units, rows))

    def _forward_progress(self, units: Sequence[str], rows: int) -> float:
        """The mean over groups of tangents; a head that is exact in all other estimators too counts in none."""
        method = self.config.method
        estimated = [unit for unit in units if not (method.exact_head and unit in self.head)]
        sizes = {name: size for unit in estimated for name, size in self.shapes[unit].items()}
        every = tangent_groups(method.tangents_per, [list(self.shapes[unit]) for unit in units])
        num_tangents = rows // len(every)
        dimensions = [d for group in every if (d := sum(sizes.get(name, 0) for name in group))]
        cosines = [forward_cosine(method.distribution, num_tangents, d) for d in dimensions]
        return sum(cosines) / len(cosines) if cosines else EXACT

    def _cosine(self, unit: str, passed: int) -> float:
        """Of a unit's gradient with its guess, the mean over the calls of its layer."""
        found = []
        for place in self.places[unit]:
            distance = max(0, passed - 1 - place)
            found.append(self.calibration.cosines.get(place, identity_cosine(distance)) if distance else EXACT)
        return sum(found) / len(found)

    def _slope_rows(self, units: Sequence[str], passed: int, slopes: SlopesPer) -> int:
        """Tangents of the pass that takes slopes: for each group the guess, the momentum, a random one."""
        guessed = [u for u in units if any(place < passed - 1 for place in self.places[u])]
        if slopes == "none" or not guessed:
            return 0
        groups = tangent_groups(slopes, [list(self.shapes[unit]) for unit in guessed])
        return len(groups) * (1 + self.config.guide.momentum + self.config.guide.explore)

    def _map_bytes(self, places: Iterable[int]) -> int:
        """Of the backward maps a client holds, at most."""
        guide = self.config.guide
        if guide.guess != "maps":
            return 0
        hidden = int(self.memory.dry.work.config.get_text_config().hidden_size)
        num_maps = 1 + (1 + NUM_POSITIONS * guide.across) * len(set(places))
        return 4 * guide.rank * hidden * num_maps

    def _largest_chunk(self, budget: int | None, peak: Callable[[int], int]) -> tuple[int, int]:
        for chunk in self.memory.chunks:
            found = peak(chunk)
            if budget is None or found <= budget:
                return chunk, found
        return self.memory.chunks[-1], found

    def _with_lower_layers(self, flops: int, depth: int) -> int:
        """With the layers below the uppermost `depth`, which compute as in inference."""
        return flops + (self._whole - depth) * self._inference.layer_flops

    def _seconds(self, kind: str, flops: int, depth: int) -> float:
        """Of a step; of what lies above the layers alone, inference's."""
        if depth == 0:
            return self.calibration.speed(kind)
        return flops / self._inference.flops_at(self._whole) * self.calibration.speed(kind)

    @property
    def _whole(self) -> int:
        return self.memory.dry.work.num_layers

    @cached_property
    def _inference(self) -> PassCost:
        return self.memory.dry.inference()

    @cached_property
    def _memories(self) -> dict[str, ClientMemory]:
        """One for each kind of pass that `ClientMemory` knows; they share the dry runs."""
        return {
            "backprop": replace(self.memory, passes="backprop"),
            "per_layer": replace(self.memory, passes="per_layer"),
            "forward": replace(self.memory, passes="forward"),
        }


@dataclass(frozen=True)
class GuidedMemory:
    """Tells which units a client can train along guesses, where the run itself is guided: its `fit` is a `Fit`.

    Attributes:
        choice: predicts them.
    """

    choice: ClientChoice

    def fit(self, client: int, units: Sequence[str]) -> PassSettings | None:
        """The largest chunks with which these units fit a client; None if they do not."""
        return self.within(self.choice.memory.budget(client), units)

    def within(self, budget: int, units: Sequence[str]) -> PassSettings | None:
        """As `fit`, for a budget."""
        found = self.choice.own_guess(budget, units)
        return PassSettings(None, found.settings.chunk_bytes) if found.peak_bytes <= budget else None

    def least_bytes(self, units: Sequence[str]) -> int:
        """The fewest that these units can be trained in."""
        return self.choice.own_guess(0, units).peak_bytes

    def require_some(self, units: Sequence[str], shared: Sequence[str]) -> tuple[str, ...]:
        """As `ClientMemory.require_some`."""
        return require_some(self.choice.memory, self.within, self.least_bytes, units, shared)


def client_choice(
    config: RunConfig, adapted: AdaptedModel, memory: ClientMemory, places: Mapping[str, tuple[int, ...]]
) -> ClientChoice:
    """The choice for a run, not calibrated yet.

    Args:
        memory: predictions of any estimator.
        places: unit -> the places of the layers' calls it lies in.
    """
    shapes = {u.name: {n: adapted.model.get_parameter(n).numel() for n in u.parameters} for u in adapted.units}
    return ClientChoice(config, memory, places, shapes, frozenset(u.name for u in adapted.units if u.is_head))
