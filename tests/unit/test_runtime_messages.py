"""Tasks and updates as bytes and back, bit by bit; what is malformed is refused by name."""

import json
import math
import socket
import struct
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from spryfl.federated.fitting import PassSettings
from spryfl.federated.messages import ClientEvaluation, ClientFailure, ClientTask, ClientUpdate, EvaluationTask
from spryfl.runtime.messages import decode_evaluation, decode_task, decode_update, encode_answer, encode_task
from spryfl.runtime.parcels import Parcel, receive_parcel, send_parcel

VALUES = {"low.a": torch.linspace(-1, 2, 6).reshape(2, 3), "high.b": torch.zeros(0), "head": torch.tensor(1e-42)}
TASK = ClientTask(3, 7, 2**62 + 1, ("low", "head"), ("low.a", "head"), VALUES, "values", groups=(("low.a",), ("head",)))
EVALUATION = ClientEvaluation(3, 7, 5, 0.1 + 0.2, {"accuracy": 1 / 3, "f1": 1.0})
UPDATE = ClientUpdate(3, 7, 5, 0.1 + 0.2, {"low.a": VALUES["low.a"]}, None, 1.5, 0.5, 10)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


@pytest.mark.parametrize(
    "task",
    [
        TASK,
        replace(TASK, groups=None, upload="slopes", deadline_seconds=2.5),
        replace(TASK, maps={"basis": torch.ones(2, 2), "3/own": torch.zeros(1)}, momentum={"low.a": torch.ones(2, 3)}),
        replace(TASK, last_change={"low.a": torch.full((2, 3), -0.5)}),
        replace(TASK, settings=PassSettings(4, 2**20, "backprop", "budgeted", 10**6, 2, "unit", "it fits")),
    ],
)
def test_a_task_arrives_as_it_was_sent(task: ClientTask) -> None:
    assert_same_task(decode_task(encode_task(task)), task)


def assert_same_task(got: ClientTask, task: ClientTask) -> None:
    parts = ("values", "maps", "momentum", "last_change")
    for name in parts:
        assert_same(getattr(got, name), getattr(task, name))
    nothing = {name: {} for name in parts}
    assert replace(got, **nothing) == replace(task, **nothing)


@pytest.mark.parametrize("training", [None, replace(TASK, last_change={"low.a": torch.ones(2, 3)})])
def test_an_evaluations_task_arrives_as_it_was_sent(training: ClientTask | None) -> None:
    """The values once, though it trains from them first."""
    task = EvaluationTask(3, 7, VALUES, training, 2.5)
    parcel = encode_task(task)
    names = [f"values/{name}" for name in VALUES] + ([] if training is None else ["last_change/low.a"])
    assert sorted(load(parcel.tensors)) == sorted(names)
    got = decode_task(parcel)
    assert_same(got.values, VALUES)
    assert replace(got, values={}, training=None) == replace(task, values={}, training=None)
    if training is None:
        assert got.training is None
    else:
        assert_same_task(got.training, training)


def test_clients_with_the_same_values_get_the_same_tensor_bytes() -> None:
    """So the SuperLink keeps them once."""
    assert encode_task(TASK).tensors == encode_task(replace(TASK, client=1, units=("high",))).tensors
    one, other = (encode_task(EvaluationTask(3, client, VALUES)) for client in (0, 1))
    assert one.tensors == other.tensors


@settings(max_examples=30, deadline=None)
@given(
    loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    variance=st.none() | st.floats(0, 1e30),
    slopes=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9),
)
def test_an_update_arrives_as_it_was_sent(loss: float | None, variance: float | None, slopes: list[float]) -> None:
    update = replace(UPDATE, loss=loss, variance=variance, slopes=torch.tensor([slopes]), tensors={})
    got = decode_update(encode_answer(update), 7)
    assert isinstance(got, ClientUpdate)
    assert torch.equal(got.slopes, update.slopes)
    assert replace(got, slopes=None) == replace(update, slopes=None)


def test_slopes_take_less_than_a_kilobyte() -> None:
    """A step of K = 8 slopes, with everything that is said about it."""
    parcel = encode_answer(replace(UPDATE, tensors={}, slopes=torch.randn(1, 8)))
    assert len(parcel.header) + len(parcel.tensors) < 400


def test_a_failure_arrives_as_it_was_sent() -> None:
    failure = ClientFailure(7, "no battery", "deadline")
    assert decode_update(encode_answer(failure), 7) == failure
    assert decode_evaluation(encode_answer(failure), 7) == failure


def test_an_evaluation_arrives_as_it_was_sent() -> None:
    """Bit by bit, the main metric first; a loss that is not finite too, for the rounds to refuse."""
    got = decode_evaluation(encode_answer(EVALUATION), 7)
    assert got == EVALUATION
    assert list(got.metrics) == list(EVALUATION.metrics)
    lost = decode_evaluation(encode_answer(replace(EVALUATION, loss=math.nan, metrics={"perplexity": math.inf})), 7)
    assert math.isnan(lost.loss)
    assert lost.metrics == {"perplexity": math.inf}


def malformed() -> dict[str, Parcel]:
    good = encode_answer(UPDATE)
    row = json.loads(good.header)

    def header(**changes: object) -> Parcel:
        return replace(good, header=json.dumps(row | changes))

    return {
        "Invalid JSON": replace(good, header="{"),
        "kind": replace(good, header="{}"),
        "num_examples": header(num_examples="many"),
        "num_examples: Input should be a valid integer": header(num_examples=True),
        "seconds": header(seconds=-1.0),
        "cpu_seconds": header(cpu_seconds=float("nan")),
        "extra": header(extra=1),
        "answered as client 8": header(client=8),
        "tensors cannot be read": replace(good, tensors=good.tensors[:-1]),
        "'values/low.a' that is no part": replace(good, tensors=save({"values/low.a": torch.ones(1)})),
    }


@pytest.mark.parametrize("reason", malformed())
def test_a_malformed_answer_is_refused(reason: str) -> None:
    answer = decode_update(malformed()[reason], 7)
    assert isinstance(answer, ClientFailure)
    assert answer.kind == "refused"
    assert reason in answer.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "update"}, "does not match any of the expected tags"),
        ({"client": 8}, "answered as client 8"),
        ({"num_examples": "5"}, "num_examples: Input should be a valid integer"),
        ({"loss": None}, "loss: Input should be a valid number"),
        ({"metrics": {"accuracy": "1"}}, "metrics.accuracy: Input should be a valid number"),
        ({"metrics": {str(name): 1.0 for name in range(101)}}, "metrics: Dictionary should have at most 100 items"),
        ({"metrics": {"x" * 101: 1.0}}, "String should have at most 100 characters"),
    ],
)
def test_a_malformed_evaluation_is_refused(changes: dict[str, object], reason: str) -> None:
    row = json.loads(encode_answer(EVALUATION).header) | changes
    answer = decode_evaluation(Parcel(json.dumps(row)), 7)
    assert isinstance(answer, ClientFailure)
    assert answer.kind == "refused"
    assert reason in answer.reason
    assert len(answer.reason) < 500


def test_an_evaluation_has_no_tensors() -> None:
    answer = decode_evaluation(replace(encode_answer(EVALUATION), tensors=save({"x": torch.ones(1)})), 7)
    assert answer == ClientFailure(7, "it sent tensors, which are no part of an evaluation", "refused")


def test_parcels_pass_a_stream_whole() -> None:
    """Larger than any buffer, so in pieces."""
    one, other = socket.socketpair()
    big = Parcel('{"kind": "é"}', save({"x": torch.arange(10**6)}))
    with one, other:
        sender = threading.Thread(target=send_parcel, args=(one, big))
        sender.start()
        got = receive_parcel(other)
        sender.join()
        assert got == big
        assert torch.equal(load(got.tensors)["x"], torch.arange(10**6))
        one.close()
        with pytest.raises(ConnectionError):
            receive_parcel(other)


def test_a_shape_that_no_tensor_has_is_refused() -> None:
    """Its bytes, none, are what the header says, so that only making the tensor can fail."""
    head = json.dumps({"tensors/a": {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}}).encode()
    answer = decode_update(replace(encode_answer(UPDATE), tensors=struct.pack("<Q", len(head)) + head), 7)
    assert isinstance(answer, ClientFailure)
    assert (answer.kind, "tensors cannot be read" in answer.reason) == ("refused", True)
