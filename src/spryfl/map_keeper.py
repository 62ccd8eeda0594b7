"""The server's backward maps: read or fitted before the first round, and fitted anew when they drift.

The rule: every `guide.check_every` rounds, but not after the last, the mean cosine of guessed and true gradients is
measured on public text held out from the fit. Where it has fallen below `guide.refit_below` of what it was after the
last fit, the maps are fitted again with the present values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor, nn

from spryfl.config import RunConfig
from spryfl.data.examples import Batch
from spryfl.data.public_text import load_public_text
from spryfl.data.task import Task
from spryfl.errors import DataError
from spryfl.federated.client import loaded
from spryfl.federated.state import FederatedState
from spryfl.gradients.backward_maps import MapSettings, fit_backward_maps, guess_quality
from spryfl.gradients.estimator import Loss
from spryfl.gradients.guesses import BackwardMap, MapGuess, cosines_of, maps_from, tensors_of, with_cosines
from spryfl.models.fingerprint import base_fingerprint
from spryfl.models.layers import layer_calls
from spryfl.models.loading import AdaptedModel
from spryfl.models.map_file import Purpose, read_maps, task_fingerprint
from spryfl.tasks import Encode
from spryfl.workbench import Workbench

BATCH = 16
HELD_OUT = 4  # batches


@dataclass(frozen=True)
class MapKeeper:
    """Keeps the maps of a run's state.

    Attributes:
        config: the run's.
        adapted: the server's model.
        task: makes losses of batches; encode: tokenizes rows for it.
        num_labels: among which random labels are drawn.
    """

    config: RunConfig
    adapted: AdaptedModel
    task: Task
    encode: Encode
    num_labels: int

    @classmethod
    def of(cls, bench: Workbench) -> "MapKeeper":
        return cls(bench.config, bench.adapted, bench.task, bench.encode, len(bench.label_names))

    def start(self, state: FederatedState) -> FederatedState:
        """The state with maps, if it has none yet and the run needs them."""
        guide = self.config.guide
        if state.maps or guide.guess != "maps" or self.config.method.own_estimator not in ("guided", "auto"):
            return state
        if guide.maps is None:
            return self._fitted(state)
        model = self.adapted.model
        maps = read_maps(
            Path(guide.maps).expanduser(),
            self.purpose,
            len(layer_calls(model)),
            model.config.get_text_config().hidden_size,
        )
        return self._with_cosines(replace(state, maps=maps)) if guide.text else replace(state, maps=maps)

    def keep(self, state: FederatedState) -> tuple[FederatedState, float | None, bool]:
        """The state after a round, its maps' mean cosine if it was due, and whether they were fitted anew.

        After the last round nothing is due: no client will get the maps.
        """
        guide, last = self.config.guide, self.config.server.num_rounds
        if not state.maps or guide.text is None or state.round % guide.check_every or state.round >= last:
            return state, None, False
        cosine = self.cosine(state)
        if cosine >= guide.refit_below * _mean(cosines_of(state.maps)):
            return state, cosine, False
        state = self._fitted(state)
        return state, _mean(cosines_of(state.maps)), True

    def fit(
        self, values: dict[str, Tensor], progress: Callable[[int], None] = lambda done: None
    ) -> dict[int, BackwardMap]:
        """Maps fitted on the public text with these values."""
        model, losses = self.adapted.model, self._losses[: -self._num_held_out]
        with loaded(model, values):
            return fit_backward_maps(model, losses, layer_calls(model), self.settings, progress)

    @property
    def settings(self) -> MapSettings:
        guide = self.config.guide
        return MapSettings(guide.horizon, guide.rank, guide.across, guide.ridge)

    @property
    def purpose(self) -> Purpose:
        """What maps of this run are good for."""
        return Purpose(base_fingerprint(self.config.model), task_fingerprint(self.config.task), self.settings)

    @property
    def num_batches(self) -> int:
        """Of the public text, that maps are fitted on."""
        return len(self._losses) - self._num_held_out

    def cosine(self, state: FederatedState) -> float:
        """The mean over layers and held-out batches of the maps' cosine with the true gradients."""
        return _mean(self.quality(state.values, maps_from(state.maps)))

    def cosines(self, state: FederatedState) -> dict[int, float]:
        """Of the state's maps, by layer: measured now if there is text, else what came with the file."""
        if not state.maps or self.config.guide.text is None:
            return cosines_of(state.maps)
        return self.quality(state.values, maps_from(state.maps))

    def quality(self, values: dict[str, Tensor], maps: dict[int, BackwardMap]) -> dict[int, float]:
        """The mean cosine over held-out batches, by layer."""
        model, losses = self.adapted.model, self._losses[-self._num_held_out :]
        with loaded(model, values):
            return guess_quality(model, losses, layer_calls(model), self.settings.horizon, MapGuess(maps))

    def _fitted(self, state: FederatedState) -> FederatedState:
        return self._with_cosines(replace(state, maps=tensors_of(self.fit(state.values))))

    def _with_cosines(self, state: FederatedState) -> FederatedState:
        return replace(state, maps=with_cosines(state.maps, self.quality(state.values, maps_from(state.maps))))

    @cached_property
    def _losses(self) -> Sequence[Loss]:
        """One a batch of public text."""
        guide = self.config.guide
        rows = self.encode(load_public_text(guide, self.config.data, self.num_labels, self.config.seed))
        if len(rows) < 2:
            raise DataError(f"guide.text = '{guide.text}': two texts at least, as one is held out from the fit")
        size = min(BATCH, len(rows) // 2)
        batches = [range(start, start + size) for start in range(0, len(rows) - size + 1, size)]
        return [partial(_loss, self.task, self.task.batch(rows, list(batch))) for batch in batches]

    @property
    def _num_held_out(self) -> int:
        return min(HELD_OUT, max(1, len(self._losses) // 8))


def _mean(cosines: Mapping[int, float]) -> float:
    return sum(cosines.values()) / len(cosines)


def _loss(task: Task, batch: Batch, model: nn.Module) -> Tensor:
    return task.losses(model, batch).mean()
