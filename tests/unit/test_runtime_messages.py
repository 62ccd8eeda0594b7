"""Tasks and updates as bytes and back, bit by bit; what is malformed is refused by name."""

import json
import socket
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from spryfl.federated.fitting import PassSettings
from spryfl.federated.messages import ClientFailure, ClientTask, ClientUpdate
from spryfl.runtime.messages import decode_answer, decode_task, encode_answer, encode_task
from spryfl.runtime.parcels import Parcel, receive_parcel, send_parcel

VALUES = {"low.a": torch.randn(2, 3), "high.b": torch.zeros(0), "head": torch.tensor(1e-42)}
TASK = ClientTask(3, 7, 2**62 + 1, ("low", "head"), ("low.a", "head"), VALUES, "values", groups=(("low.a",), ("head",)))
UPDATE = ClientUpdate(3, 7, 5, 0.1 + 0.2, {"low.a": VALUES["low.a"]}, None, 1.5, 0.5, 10)

SLOPES = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9)


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
    got = decode_task(encode_task(task))
    parts = ("values", "maps", "momentum", "last_change")
    for name in parts:
        assert_same(getattr(got, name), getattr(task, name))
    nothing = {name: {} for name in parts}
    assert replace(got, **nothing) == replace(task, **nothing)


def test_clients_with_the_same_values_get_the_same_tensor_bytes() -> None:
    """So the SuperLink keeps them once."""
    assert encode_task(TASK).tensors == encode_task(replace(TASK, client=1, units=("high",))).tensors


@settings(max_examples=30, deadline=None)
@given(
    loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    variance=st.none() | st.floats(0, 1e30),
    slopes=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9),
)
def test_an_update_arrives_as_it_was_sent(loss: float | None, variance: float | None, slopes: list[float]) -> None:
    update = replace(UPDATE, loss=loss, variance=variance, slopes=torch.tensor([slopes]), tensors={})
    got = decode_answer(encode_answer(update), 7)
    assert isinstance(got, ClientUpdate)
    assert torch.equal(got.slopes, update.slopes)
    assert replace(got, slopes=None) == replace(update, slopes=None)


def test_slopes_take_less_than_a_kilobyte() -> None:
    """A step of K = 8 slopes, with everything that is said about it."""
    parcel = encode_answer(replace(UPDATE, tensors={}, slopes=torch.randn(1, 8)))
    assert len(parcel.header) + len(parcel.tensors) < 400


def test_a_failure_arrives_as_it_was_sent() -> None:
    failure = ClientFailure(7, "no battery", "deadline")
    assert decode_answer(encode_answer(failure), 7) == failure


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
    answer = decode_answer(malformed()[reason], 7)
    assert isinstance(answer, ClientFailure)
    assert answer.kind == "refused"
    assert reason in answer.reason


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
