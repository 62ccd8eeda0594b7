"""How near each estimator's gradient is to the true one, by layer and stage of training.

For a batch of the task's own data and every layer, the gradient of that layer's units is estimated as a client
that trains them would, and set beside autograd's: the cosine, and the normalized error |g_hat - g|^2 / |g|^2.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spryfl.bench.frontier import Progress, check, read_tuning, run_folder, variant_config
from spryfl.bench.frontier_works import TASKS, VARIANTS, settings_of
from spryfl.config import parse_config, with_overrides
from spryfl.federated.client import loaded
from spryfl.federated.state import FederatedState
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.estimator import GradientEstimator
from spryfl.gradients.guesses import maps_for
from spryfl.gradients.guided import GuidedGradient
from spryfl.map_keeper import MapKeeper
from spryfl.run import run_in
from spryfl.tracking.run_directory import RunDirectory
from spryfl.workbench import Workbench

Row = dict[str, Any]
COMPARED = (
    "forward K=1",
    "guided identity h=0",
    "guess maps h=0",
    "guided maps h=0",
    "guess maps h=0, own token",
    "guess maps h=2",
)
TRAINED = "backprop split"
"""Whose run says what the values are at the end of training."""
NUM_BATCHES = 8


def measure_quality(task: str, data: Path, out: Path, say: Progress) -> list[Row]:
    """Rows of one task, before training and after it; the run that trains is performed where it is not there.

    Raises:
        SpryError: an unknown task, or data that is not there.
    """
    check(tasks=[task], variants=[TRAINED], data=data)
    folder = run_folder(out, task, TRAINED, 0)
    say(f"{task}, {TRAINED}, seed 0")
    run_in(variant_config(task, VARIANTS[TRAINED], data, read_tuning(out), 0), folder)
    trained = RunDirectory(folder).read_checkpoint()
    assert trained is not None  # of a finished run
    rows = []
    for name in COMPARED:
        variant = VARIANTS[name]
        settings = settings_of(TASKS[task], variant, str(data.resolve()), TASKS[task].rate, 0)
        bench = Workbench.from_config(parse_config(with_overrides({}, settings)))
        for stage, values in (("start", bench.initial_state().values), ("end", trained.values)):
            state = MapKeeper.of(bench).start(FederatedState(0, values))
            for layer, (cosine, error) in _by_layer(bench, state).items():
                rows.append(
                    {
                        "task": task,
                        "model": bench.config.model.name,
                        "stage": stage,
                        "estimator": variant.estimator,
                        "dial": variant.dial,
                        "layer": layer,
                        "cosine": cosine,
                        "normalized_error": error,
                        "batches": NUM_BATCHES,
                    }
                )
    return rows


def _by_layer(bench: Workbench, state: FederatedState) -> dict[int, tuple[float, float]]:
    """Layer -> mean cosine and normalized error over batches."""
    places = bench.places
    found = {}
    with loaded(bench.adapted.model, state.values):
        for layer in sorted({place for own in places.values() for place in own}):
            units = [unit for unit in bench.adapted.units if layer in places[unit.name]]
            names = [name for unit in units for name in unit.parameters]
            pairs = [_pair(bench, state, layer, names, number) for number in range(NUM_BATCHES)]
            pairs = [(g, e) for g, e in pairs if g.norm() > 0]
            cosines = [float(torch.nn.functional.cosine_similarity(g, e, dim=0)) for g, e in pairs]
            errors = [float((e - g).square().sum() / g.square().sum()) for g, e in pairs]
            found[layer] = (mean(cosines), mean(errors))
    return found


def _pair(
    bench: Workbench, state: FederatedState, layer: int, names: Sequence[str], number: int
) -> tuple[Tensor, Tensor]:
    """The true and the estimated gradient of one batch."""
    size = bench.config.local.batch_size
    rows = np.arange(number * size, (number + 1) * size)
    batch = bench.task.batch(bench.train, rows.tolist())
    estimator: GradientEstimator = bench.estimator
    if isinstance(estimator, GuidedGradient):
        estimator = estimator.guided_by(maps_for(state.maps, {layer}), {})
    draw = DirectionStream(0, round=1, client=number).at_step(0)

    def gradients(of: GradientEstimator) -> Mapping[str, Tensor]:
        return of.estimate(
            bench.adapted.model, lambda m: bench.task.losses(m, batch).mean(), names, draw, size
        ).gradients

    return _flat(gradients(Backprop()), names), _flat(gradients(estimator), names)


def _flat(gradients: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([gradients[name].flatten().double() for name in names])


def quality_markdown(rows: Sequence[Row]) -> str:
    """Cosine and normalized error, a column for each layer (at most ten of them)."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        layers = sorted({row["layer"] for row in own})
        shown = layers if len(layers) <= 10 else [layers[round(i * (len(layers) - 1) / 9)] for i in range(10)]
        lines = [
            f"### {task}: cosine with the true gradient (normalized error), by layer",
            "",
            f"| stage | estimator | dial | {' | '.join(map(str, shown))} |",
            f"| --- | --- | --- |{' ---: |' * len(shown)}",
        ]
        for stage, estimator, dial in dict.fromkeys((r["stage"], r["estimator"], r["dial"]) for r in own):
            cells = {
                r["layer"]: f"{r['cosine']:.2f} ({r['normalized_error']:.3g})"
                for r in own
                if (r["stage"], r["estimator"], r["dial"]) == (stage, estimator, dial)
            }
            lines.append(f"| {stage} | {estimator} | {dial} | {' | '.join(cells[layer] for layer in shown)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
