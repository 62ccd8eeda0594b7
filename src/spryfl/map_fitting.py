"""Backward maps fitted outside a run, for a prompt: the work of `spry fit-maps`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spryfl.config import RunConfig
from spryfl.data.loading import Rows
from spryfl.data.public_text import load_public_text
from spryfl.errors import ConfigError
from spryfl.federated.client import read_values
from spryfl.map_keeper import MapKeeper
from spryfl.models.loading import load_model
from spryfl.models.map_file import write_maps
from spryfl.models.units import parameters_of
from spryfl.tasks import TASKS


@dataclass(frozen=True)
class FittedMaps:
    """What came of a fit.

    Attributes:
        cosines: of guessed and true gradients on text held out from the fit, by layer.
        rank: directions of the last hidden state's gradient that are carried.
        layer_bytes: what a client is sent for a layer.
    """

    cosines: dict[int, float]
    rank: int
    layer_bytes: int


def fit_for_prompt(
    config: RunConfig, out: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> FittedMaps:
    """Fit maps at the adapter's initial values, where the model is the base model, and write them.

    Args:
        config: model, task, columns and guide; its data's name is not looked at.
        progress: told (batches done, batches in all).

    Raises:
        ConfigError: there are fewer than two label words.
    """
    words = config.task.label_words or ()
    if len(words) < 2:
        raise ConfigError("--word: one label word is certain, and has no gradient; give one for every class")
    text = load_public_text(config.guide, config.data, len(words), config.seed)
    adapted = load_model(config.model, config.adapter, len(words), config.seed, task=config.task.kind)
    rows = Rows(text, text, tuple(word.strip() for word in words))
    task, encode = TASKS[config.task.kind](config, rows, adapted)
    keeper = MapKeeper(config, adapted, task, encode, len(words))
    values = read_values(adapted.model, parameters_of(adapted.units))
    maps = keeper.fit(values, lambda done: progress(done, keeper.num_batches))
    made_of = f"{Path(config.guide.text or '').name}, prompt {config.task.template!r}"
    cosines = keeper.quality(values, maps)
    write_maps(out.expanduser(), maps, cosines, keeper.purpose, made_of)
    first = next(iter(maps.values()))
    tensors = [first.basis, first.own, *([] if first.across is None else [first.across])]
    return FittedMaps(cosines, first.basis.shape[1], sum(t.nbytes for t in tensors))
