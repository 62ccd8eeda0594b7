"""What clients' evaluations come to, by hand-sized numbers, and what they are asked."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from spryfl.config import EvaluationConfig
from spryfl.data.task import Evaluation
from spryfl.federated.client import Client, LocalTraining
from spryfl.federated.evaluation import (
    ClientsEvaluation,
    evaluate_generalized,
    evaluate_personalized,
    sample_evaluated,
)
from spryfl.federated.fitting import PassSettings
from spryfl.federated.messages import ClientEvaluation, ClientFailure, EvaluationTask
from spryfl.federated.server_optimizer import ServerUpdate
from spryfl.federated.state import FederatedState, Federation
from spryfl.gradients.backprop import Backprop
from spryfl.runtime.in_process import InProcessRuntime

TRAINING = LocalTraining("epoch", 1, 8, "sgd", 0.5, 0.0, 1, "gaussian")
SERVER = ServerUpdate("sgd", 1.0)


class Scale(nn.Module):
    """One number w; it answers "positive" where w x > 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([7.0]))


@dataclass(frozen=True)
class Rows:
    """A client's examples, who all pull w towards one number: the loss is (w - target)^2."""

    target: float

    def __len__(self) -> int:
        return 4

    def batch(self, rows: list[int]) -> Tensor:
        return torch.full((len(rows),), self.target)

    def losses(self, model: Scale, batch: Tensor) -> Tensor:
        return (model.w - batch) ** 2


def score(labels: Sequence[bool]) -> Callable[[Scale], Evaluation]:
    """Of held-out rows with x = 1: those are right whose label is what w says."""

    def of(model: Scale) -> Evaluation:
        w = model.w.item()
        return Evaluation(abs(w), {"accuracy": sum(label == (w > 0) for label in labels) / len(labels)}, len(labels))

    return of


def federation(**changes: object) -> Federation:
    base = Federation(0, 3, 2, {"unit": ("w",)}, (), "split", True, "gradients", TRAINING, SERVER)
    return replace(base, **changes)


def runtime(model: Scale, pace: str = "epoch") -> InProcessRuntime:
    """Client 0 wants w positive on three of its four rows, client 1 negative on both; client 2 holds none out."""
    held_out = [score([True, True, True, False]), score([False, False]), None]
    training = replace(TRAINING, pace=pace)
    clients = [
        Client(model, Rows(target), Backprop(), training, score=own)
        for target, own in zip((1.0, -1.0, 1.0), held_out, strict=True)
    ]
    return InProcessRuntime(clients.__getitem__, lambda client: 1)


def test_generalized_by_hand() -> None:
    model = Scale()
    state = FederatedState(5, {"w": torch.tensor([0.5])})
    found = evaluate_generalized(state, [0, 1], runtime(model), "accuracy")
    assert found.metrics == {"accuracy": pytest.approx((4 * 0.75 + 2 * 0.0) / 6)}
    assert (found.score, found.loss) == (pytest.approx(0.5), 0.5)
    assert (found.lowest, found.highest, found.std) == (0.0, 0.75, 0.375)  # each client once
    assert (found.num_clients, found.num_examples, found.failures) == (2, 6, ())
    assert model.w.item() == 7.0


@pytest.mark.parametrize("pace", ["epoch", "iteration"])
def test_personalized_by_hand(pace: str) -> None:
    """One SGD step of rate 0.5 on (w - target)^2 takes w to the target, also where a round would send a gradient."""
    model = Scale()
    state = FederatedState(5, {"w": torch.tensor([0.5])})
    found = evaluate_personalized(state, federation(), [0, 1], runtime(model, pace), "accuracy")
    assert found.metrics == {"accuracy": pytest.approx((4 * 0.75 + 2 * 1.0) / 6)}
    assert found.loss == 1.0  # |w| of both
    assert (found.lowest, found.highest, found.std) == (0.75, 1.0, 0.125)
    assert model.w.item() == 7.0
    assert state.values["w"].item() == 0.5


def test_a_client_stops_itself_at_its_deadline() -> None:
    """Before it evaluates, where training took all the time; it is missing, the others are not."""

    class Slow(Rows):
        def losses(self, model: Scale, batch: Tensor) -> Tensor:
            time.sleep(0.5)
            return super().losses(model, batch)

    model, score_one = Scale(), score([True])
    clients = [Client(model, rows(1.0), Backprop(), TRAINING, score=score_one) for rows in (Rows, Slow)]
    here = InProcessRuntime(clients.__getitem__, lambda client: 1)
    state = FederatedState(5, {"w": torch.tensor([0.5])})
    found = evaluate_personalized(state, federation(deadline_seconds=0.4), [0, 1], here, "accuracy")
    assert (found.num_clients, found.failures) == (1, ("1: stopped after training: its deadline of 0.4 s is over",))
    assert evaluate_generalized(state, [0, 1], here, "accuracy", 0.4).num_clients == 2


def test_a_client_without_held_out_rows_is_missing() -> None:
    state = FederatedState(5, {"w": torch.tensor([0.5])})
    found = evaluate_generalized(state, [0, 2], runtime(Scale()), "accuracy")
    assert found.failures == ("2: client 2 holds out no rows",)
    assert (found.score, found.num_clients) == (0.75, 1)
    nobody = evaluate_generalized(state, [2], runtime(Scale()), "accuracy")
    assert nobody == ClientsEvaluation(failures=("2: client 2 holds out no rows",))
    assert nobody.score is None


def test_an_infinite_perplexity_counts() -> None:
    """Left out, it would make the mean better."""
    answers = [ClientEvaluation(5, client, 2, 1.0, {"perplexity": own}) for client, own in ((0, 7.0), (1, math.inf))]
    found = evaluate_generalized(FederatedState(5, {}), [0, 1], Hostile(*answers), "perplexity")
    assert found.metrics == {"perplexity": math.inf}
    assert (found.num_clients, found.lowest, found.highest, found.std) == (2, 7.0, math.inf, math.inf)


class Hostile:
    """Answers whatever it is told to, and keeps what it was asked."""

    def __init__(self, *answers: ClientEvaluation | ClientFailure) -> None:
        self.answers = answers
        self.asked: list[EvaluationTask] = []

    def evaluate(self, tasks: Sequence[EvaluationTask]) -> Iterator[ClientEvaluation | ClientFailure]:
        self.asked += tasks
        yield from self.answers


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"client": 9}, "it was not asked for an evaluation"),
        ({"round": 4}, "its evaluation is for round 4, not 5"),
        ({"num_examples": 0}, "num_examples is 0"),
        ({"num_examples": 1001}, "num_examples is above 1,000"),
        ({"loss": float("nan")}, "its loss is nan"),
        ({"metrics": {"accuracy": float("inf")}}, "its accuracy is inf"),
        ({"metrics": {"accuracy": 1.0, "perplexity": math.nan}}, "its perplexity is nan"),
        ({"metrics": {"accuracy": "1"}}, "its accuracy is '1'"),
        ({"metrics": {"f1": 1.0}}, "its evaluation has no accuracy"),
    ],
)
def test_malformed_evaluations_are_named(changes: dict[str, object], reason: str) -> None:
    good = ClientEvaluation(5, 0, 2, 1.0, {"f1": 0.1, "accuracy": 0.5})
    bad = replace(ClientEvaluation(5, 1, 1000, 1.0, {"accuracy": 1.0}), **changes)
    state = FederatedState(5, {})
    held_out = {0: 2, 1: 1000}
    found = evaluate_generalized(state, [0, 1], Hostile(good, bad, good), "accuracy", most_examples=held_out)
    assert found.metrics == {"accuracy": 0.5, "f1": 0.1}
    assert list(found.metrics) == ["accuracy", "f1"]  # the main metric first, wherever a client puts it
    assert found.num_clients == 1
    unasked = ("1: no answer came",) if changes.get("client") == 9 else ()
    assert len(found.failures) == 2 + len(unasked)
    assert any(reason in failure for failure in found.failures)
    assert set(unasked) <= set(found.failures)
    assert "0: it was not asked for an evaluation, or has already sent one" in found.failures


def test_personalized_clients_get_the_units_of_a_cohort() -> None:
    """In turn the places of a cohort of two, also where only one client is left for the last."""
    units = {f"u{i}": (f"p{i}",) for i in range(4)} | {"head": ("h",)}
    state = FederatedState(1, {name: torch.zeros(1) for own in units.values() for name in own})
    own = federation(units=units, shared=("head",), num_clients=9)
    asked = Hostile()
    evaluate_personalized(state, replace(own, deadline_seconds=7.0), [3, 5, 8], asked, "accuracy")
    assert {(task.deadline_seconds, task.training.deadline_seconds) for task in asked.asked} == {(7.0, 7.0)}
    assert {task.client: task.training.units for task in asked.asked} == {
        3: ("u1", "u3", "head"),  # after one round the cycle starts at u1
        5: ("u0", "u2", "head"),
        8: ("u1", "u3", "head"),
    }
    assert {task.training.upload for task in asked.asked} == {"values"}

    def fit(client: int, units: Sequence[str]) -> PassSettings | None:
        return None if client == 5 else PassSettings(chunk_bytes=client)

    asked = Hostile()
    found = evaluate_personalized(state, replace(own, fit=fit), [3, 5, 8], asked, "accuracy")
    assert [(task.client, task.training.settings.chunk_bytes) for task in asked.asked] == [(3, 3), (8, 8)]
    silent = ("3: no answer came", "8: no answer came")  # nor any failure: they are counted all the same
    assert found.failures == (silent[0], "5: it has the memory for no unit", silent[1])


def test_sampled_clients_are_the_same_at_every_evaluation() -> None:
    clients = list(range(0, 100, 2))
    found = sample_evaluated(clients, 10, seed=0)
    assert found == sorted(set(found)) == sample_evaluated(clients, 10, seed=0)
    assert len(found) == 10
    assert set(found) <= set(clients)
    assert found != sample_evaluated(clients, 10, seed=1)
    assert sample_evaluated(clients, None, 0) == sample_evaluated(clients, 50, 0) == clients


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_clients": 5}, "max_clients: clients hold out no rows to evaluate on; set held_out = 0.2"),
        ({"generalized": "every"}, "generalized: clients hold out no rows"),
        ({"held_out": 0.2, "generalized": "never", "personalized": "never"}, "leave it out"),
        ({"held_out": 1.0}, "less than 1"),
        ({"held_out": -0.1}, "greater than or equal to 0"),
    ],
)
def test_impossible_settings(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**given)
