"""Logit adjustment: the adjusted loss by hand, by every kind of gradient, and where it must not be felt."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from spryfl.config import RunConfig
from spryfl.data.logit_adjustment import AdjustedClassification, label_offset
from spryfl.errors import ConfigError
from spryfl.federated.client import BatchLoss
from spryfl.federated.fitting import Deal, PassSettings
from spryfl.federated.messages import EvaluationTask
from spryfl.federated.rounds import client_task
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.forward import loss_and_slopes
from spryfl.workbench import PartitionData, Workbench

Make = Callable[..., RunConfig]


def test_the_offset_by_hand() -> None:
    shares = np.array([4, 1, 2]) / 7  # one more than there are of each
    assert label_offset(np.array([0, 0, 2, 0]), 3, 1.0).numpy() == pytest.approx(np.log(shares))
    assert label_offset(np.array([0, 0, 2, 0]), 3, 0.5).numpy() == pytest.approx(0.5 * np.log(shares))


def trained_by(bench: Workbench, rows: Sequence[int], strength: float) -> PartitionData:
    """The data of a client that holds these rows."""
    task = AdjustedClassification(bench.task, label_offset(bench.train.labels[rows], 2, strength))
    return PartitionData(task, bench.train, np.array(rows))


def test_losses_and_slopes(tiny_config: Make) -> None:
    """Against NumPy and autograd, in float64; evaluation is the plain task's."""
    bench = Workbench.from_config(tiny_config())
    bench.adapted.model.double()
    model, rows = bench.adapted.model, [row for row in range(40) if bench.train.labels[row] == 0 or row < 5]
    adjusted = trained_by(bench, rows, 1.0)
    batch = adjusted.batch(range(8))
    with torch.no_grad():
        logits = bench.task.logits(model, batch).numpy()
    shares = np.bincount(bench.train.labels[rows], minlength=2) + 1.0
    scores = np.exp(logits) * shares
    by_hand = -np.log(scores[np.arange(8), batch["labels"].numpy()] / scores.sum(axis=1))
    assert adjusted.losses(model, batch).detach().numpy() == pytest.approx(by_hand)
    assert adjusted.task.evaluate(model, bench.train, rows, 4) == bench.task.evaluate(model, bench.train, rows, 4)

    loss, names = BatchLoss(adjusted, batch, 0), [name for unit in bench.adapted.units for name in unit.parameters]
    draw = DirectionStream(0, 1, 0).at_step(0)
    exact = Backprop().estimate(model, loss, names, draw, 8)
    shapes = {name: model.get_parameter(name).shape for name in names}
    drawn = {name: tangents.double() for name, tangents in draw.stacked(shapes, 3).items()}
    value, slopes = loss_and_slopes(model, loss, drawn)
    expected = sum((drawn[name].flatten(1) @ exact.gradients[name].flatten().double()) for name in names)
    assert float(value) == pytest.approx(exact.loss)
    assert slopes.numpy() == pytest.approx(expected.numpy(), rel=1e-6)


def test_clients_of_one_class_pull_less_towards_it(tiny_config: Make) -> None:
    """Untrained, one class each: plain losses are lowered by the class's share alone, which adjusted ones know."""
    bench = Workbench.from_config(tiny_config())
    names, lengths = [name for unit in bench.adapted.units for name in unit.parameters], {}
    for strength in (0.0, 1.0):
        lengths[strength] = 0.0
        for label in (0, 1):
            data = trained_by(bench, np.flatnonzero(bench.train.labels == label)[:20], strength)
            loss, draw = BatchLoss(data, data.batch(range(20)), 0), DirectionStream(0, 1, 0).at_step(0)
            found = Backprop().estimate(bench.adapted.model, loss, names, draw, 20).gradients
            lengths[strength] += float(torch.cat([found[name].flatten() for name in names]).norm())
    assert lengths[1.0] < 0.3 * lengths[0.0]


def test_personalized_training_is_plain(tiny_config: Make) -> None:
    """What a client trains for all is adjusted; what it trains for itself is not."""
    found = {}
    for strength in (0.0, 1.0):
        config = tiny_config(
            method__name="fedavg",
            local__optimizer="sgd",  # Adam's first step is as long whatever the gradient
            local__logit_adjustment=strength,
            evaluation__held_out=0.3,
            partition__alpha=0.3,
        )
        bench = Workbench.from_config(config)
        skewed = int(np.argmax(np.abs(np.diff(bench.label_counts))))
        state, client = bench.initial_state(), bench.client(skewed)
        deal = Deal({skewed: tuple(bench.federation.units)}, {skewed: PassSettings()})
        task = client_task(state, bench.federation, skewed, deal)
        found[strength] = client.update(task), client.evaluate(EvaluationTask(1, skewed, state.values, task))
    names = found[0.0][0].tensors
    assert any(not torch.equal(names[name], found[1.0][0].tensors[name]) for name in names)
    assert found[0.0][1] == found[1.0][1]


@pytest.mark.parametrize("kind", ["qa", "language_model"])
def test_only_classes_have_shares(tiny_config: Make, kind: str) -> None:
    with pytest.raises(ConfigError, match="adjusts to shares of classes, which task"):
        tiny_config(
            task__kind=kind,
            partition__kind="iid",
            local__logit_adjustment=1.0,
            **({"data__text_columns": ["text", "topic"]} if kind == "qa" else {}),
        )
