"""What a client does, and what the server rebuilds from the little it is sent."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from families import autograd_gradient, batch_loss, build, padded_batch, trainable
from spryfl.config import AdapterConfig
from spryfl.errors import DeadlineError
from spryfl.federated.answers import proposed_change
from spryfl.federated.client import BatchLoss, Client, LocalTraining, read_values
from spryfl.federated.messages import ClientTask
from spryfl.federated.server_optimizer import ServerUpdate
from spryfl.federated.state import Federation
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.bottleneck import BottleneckGradient
from spryfl.gradients.estimator import GradientEstimator
from spryfl.gradients.exact_head import ExactHead
from spryfl.gradients.forward import ForwardGradient, loss_and_slopes
from spryfl.gradients.guided import GuidedGradient
from spryfl.gradients.tangents import SPREADS, tangent_groups
from spryfl.gradients.zeroth_order import ZerothOrder
from spryfl.models.adapters import dropout_modules
from spryfl.models.layers import layer_calls

ESTIMATORS = {"forward": ForwardGradient(2), "zeroth_order": ZerothOrder(2)}


class Rows:
    """Ten rows made of three: enough for three batches of four."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __len__(self) -> int:
        return 10

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        self.batches.append(rows)
        whole = padded_batch()
        return {name: tensor[[row % 3 for row in rows]] for name, tensor in whole.items()}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return batch_loss(batch).parts(model) * len(batch["labels"])

    token_losses = losses


def training(**changes: object) -> LocalTraining:
    base = LocalTraining("epoch", 2, 4, "adamw", 1e-2, 0.01, 2, "gaussian")
    return replace(base, **changes)


def task_for(model: nn.Module, upload: str = "values", **changes: object) -> ClientTask:
    names = trainable(model)
    values = read_values(model, names)
    task = ClientTask(3, 5, 1, ("unit",), tuple(names[:2]), values, upload)
    return replace(task, **changes)


def federation(training: LocalTraining) -> Federation:
    return Federation(1, 9, 3, {}, (), "split", True, "slopes", training, ServerUpdate("yogi", 0.01))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("pace", ["iteration", "epoch"])
@pytest.mark.parametrize("distribution", SPREADS)
@pytest.mark.parametrize("per", ["step", "tensor"])
def test_the_server_rebuilds_from_slopes_what_the_client_did(
    estimator: str, pace: str, distribution: str, per: str
) -> None:
    """Bitwise: per iteration its gradient, per epoch the values its local optimizer came to."""
    model = build("bert").float()
    settings = training(pace=pace, distribution=distribution, tangents_per=per, shrinkage=per == "tensor")
    client = Client(model, Rows(), ESTIMATORS[estimator], settings)
    task = task_for(model, "slopes")
    task = replace(task, groups=tangent_groups(per, [task.parameters]))
    sent = client.update(task)
    own = client.update(replace(task, upload="gradients" if pace == "iteration" else "values"))
    assert sent.tensors == {}
    num_slopes = 2 * (1 if per == "step" else 2)
    assert sent.slopes.shape == (settings.num_steps(10), num_slopes)
    assert sent.payload_bytes == 4 * num_slopes * settings.num_steps(10)
    rebuilt = proposed_change(sent, task, federation(settings))
    for name, tensor in own.tensors.items():
        expected = -tensor if pace == "iteration" else tensor - task.values[name]
        assert torch.equal(rebuilt[name], expected)


def test_a_client_weighs_its_data_whatever_part_of_it_a_step_sees() -> None:
    """So that methods of either pace aim at the same mean over all data."""
    model = build("bert").float()
    for pace, upload, rows in (("iteration", "gradients", 4), ("epoch", "values", 20)):
        data = Rows()
        update = Client(model, data, Backprop(), training(pace=pace)).update(task_for(model, upload))
        assert update.num_examples == len(data) == 10
        assert sum(map(len, data.batches)) == rows


def test_an_update_leaves_the_model_as_it_was() -> None:
    model = build("bert").float()
    task = task_for(model)
    task = replace(task, values={name: value + 1 for name, value in task.values.items()})
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    update = Client(model, Rows(), ForwardGradient(), training(num_tangents=1)).update(task)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert set(update.tensors) == set(task.parameters)
    assert not torch.equal(update.tensors[task.parameters[0]], task.values[task.parameters[0]])


def test_a_client_stops_itself_at_its_deadline() -> None:
    """No step begins after it; the model is left as it was."""
    model = build("bert")
    before = read_values(model, trainable(model))
    client = Client(model, Rows(), Backprop(), training())
    assert client.update(task_for(model, deadline_seconds=60.0)).num_examples == 10
    with pytest.raises(DeadlineError, match=r"stopped after \d steps: its deadline of 1e-09 s"):
        client.update(task_for(model, deadline_seconds=1e-9))
    after = read_values(model, trainable(model))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_row_is_seen_once_an_epoch_in_another_order() -> None:
    rows = Rows()
    model = build("bert").float()
    client = Client(model, rows, Backprop(), training())
    update = client.update(task_for(model))
    assert [len(batch) for batch in rows.batches] == [4, 4, 2, 4, 4, 2]
    first, second = sum(rows.batches[:3], []), sum(rows.batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert update.num_examples == 10
    rows.batches.clear()
    again = client.update(task_for(model))
    assert sum(rows.batches[:3], []) == first  # the same task, the same batches
    assert all(torch.equal(again.tensors[n], t) for n, t in update.tensors.items())


def test_dropout_draws_one_mask_a_step() -> None:
    """All K slopes of a step are of the same function, and the masks come from the seed."""
    model = build("bert").float()
    losses = []

    class Noisy(Rows):
        def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            noise = torch.rand(())
            losses.append(float(noise))
            return super().losses(model, batch) * (1 + noise)

    Client(model, Noisy(), ZerothOrder(3), training(epochs=1, num_tangents=3)).update(task_for(model))
    assert len(losses) == 18
    assert all(len(set(losses[i : i + 6])) == 1 for i in (0, 6, 12))
    assert len(set(losses)) == 3


IN_HEAD = [name for name in trainable(build("bert")) if "classifier" in name]
OF_EVERY_KIND: dict[str, GradientEstimator] = {
    "forward": ForwardGradient(2),
    "bottleneck": BottleneckGradient(2),
    "guided": GuidedGradient(layer_calls),
    "zeroth_order": ZerothOrder(2),
    "backprop": Backprop(),
    "per_layer": Backprop("per_layer", layer_calls),
    "exact_head": ExactHead(ForwardGradient(), layer_calls, frozenset(IN_HEAD)),
}


@pytest.mark.parametrize("name", OF_EVERY_KIND)
def test_epochs_and_dropout_with_every_estimator(name: str) -> None:
    """Two epochs go further than one; dropout changes what is trained, but for the zeroth order, which has none."""
    adapter = AdapterConfig(rank=2, dropout=0.5)
    found = {}
    for epochs, active in ((1, True), (2, True), (2, False)):
        model = build("bert", adapter=adapter).float()
        dropout = dropout_modules(model) if active else []
        client = Client(model, Rows(), OF_EVERY_KIND[name], training(epochs=epochs), dropout)
        task = task_for(model, parameters=(*trainable(model)[:2], *IN_HEAD))
        update, again = (client.update(task) for _ in range(2))
        assert update.num_examples == 10
        assert all(torch.equal(again.tensors[n], t) for n, t in update.tensors.items())  # masks are the seed's
        assert not any(module.training for module in model.modules())
        found[epochs, active] = torch.cat([t.flatten() for t in update.tensors.values()])
    assert not torch.equal(found[1, True], found[2, True])
    assert torch.equal(found[2, True], found[2, False]) == (name == "zeroth_order")


def test_forward_modes_slopes_are_of_the_masked_function() -> None:
    """In float64, with dropout active: all K of a step against autograd under the same mask."""
    model = build("bert", adapter=AdapterConfig(rank=2, dropout=0.5))
    names, rows = trainable(model), Rows()
    loss = BatchLoss(rows, rows.batch([0, 1, 2]), seed=7)
    generator = torch.Generator().manual_seed(2)
    tangents = {n: torch.randn((3, *model.get_parameter(n).shape), generator=generator).double() for n in names}
    slopes = []
    for active in (True, False):
        for module in dropout_modules(model):
            module.training = active
        exact = autograd_gradient(model, loss, names)
        expected = sum((exact[n] * tangents[n]).flatten(1).sum(1) for n in names)
        slopes.append(loss_and_slopes(model, loss, tangents)[1])
        assert torch.allclose(slopes[-1], expected, rtol=1e-9)
    assert not torch.allclose(*slopes, rtol=1e-3)


def test_low_precision_models_train_float32_masters() -> None:
    """Steps too small for bfloat16 add up in what is sent back."""
    model = build("bert").bfloat16()
    task = task_for(model)
    settings = training(optimizer="sgd", learning_rate=1e-4, weight_decay=0.0)
    update = Client(model, Rows(), Backprop(), settings).update(task)
    name = task.parameters[0]
    change = update.tensors[name] - task.values[name]
    assert update.tensors[name].dtype == torch.float32
    assert (change.abs() > 0).any()
    assert torch.equal(update.tensors[name].bfloat16(), task.values[name].bfloat16())
