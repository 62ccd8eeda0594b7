"""The Runtime over a grid of our own: nodes that answer, fall silent, start anew, or lie."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from spryfl.federated.messages import ClientEvaluation, ClientFailure, ClientTask, ClientUpdate, EvaluationTask
from spryfl.runtime.flower import runtime as flower_runtime
from spryfl.runtime.flower.presence import Presence, _read
from spryfl.runtime.flower.runtime import FlowerRuntime
from spryfl.runtime.flower.wire import parcel_of, to_content
from spryfl.runtime.messages import decode_task, encode_answer
from spryfl.runtime.parcels import Parcel

VALUES = {"a": torch.ones(2)}
Answer = ClientUpdate | ClientEvaluation | ClientFailure | Error | None


def task(client: int, round: int = 1) -> ClientTask:
    return ClientTask(round, client, 0, ("u",), ("a",), VALUES, "values", deadline_seconds=0.0)


def update(task: ClientTask) -> ClientUpdate:
    return ClientUpdate(task.round, task.client, 4, 0.5, {"a": task.values["a"] + task.client})


def evaluation_task(client: int) -> EvaluationTask:
    return EvaluationTask(1, client, VALUES, deadline_seconds=0.0)


def evaluation(task: EvaluationTask) -> ClientEvaluation:
    return ClientEvaluation(task.round, task.client, 4, 0.5, {"accuracy": task.client / 8})


@dataclass
class Node:
    """A node: its partition, its base model, and what it does with a task; None: nothing, ever."""

    client: int
    base: str = "base"
    perform: Callable[[ClientTask], Answer] = update
    evaluate: Callable[[EvaluationTask], Answer] = evaluation
    since: str = "start"


class Grid:
    """Replies are there at the next pull."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        self.nodes = nodes
        self.replies: dict[str, Message] = {}
        self.sent: list[tuple[int, ClientTask | EvaluationTask]] = []
        self._numbers = count()

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(node_id=i, last_activated_at=node.since) for i, node in self.nodes.items()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(ids)}-{next(self._numbers)}"
            message.metadata.__dict__["_src_node_id"] = 1
            ids.append(message.metadata.message_id)
            content = self._answer(message.metadata.dst_node_id, parcel_of(message))
            if content is not None:
                self.replies[ids[-1]] = Message(content, reply_to=message)
        return ids

    def _answer(self, node_id: int, parcel: Parcel) -> Any:
        node = self.nodes[node_id]
        if json.loads(parcel.header)["kind"] == "presence":
            return to_content(Parcel(json.dumps({"kind": "presence", "client": node.client, "base": node.base})))
        asked = decode_task(parcel)
        self.sent.append((node_id, asked))
        answer = node.evaluate(asked) if isinstance(asked, EvaluationTask) else node.perform(asked)
        return answer if answer is None or isinstance(answer, Error) else to_content(encode_answer(answer))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies.pop(message_id) for message_id in message_ids if message_id in self.replies]


def connected(grid: Grid, **options: Any) -> FlowerRuntime:
    runtime = FlowerRuntime(grid, Presence(grid, "base", 100, lambda line: None), {"labels": ["0", "1"]}, **options)
    runtime.gather(len(grid.nodes), 5)
    return runtime


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("GRACE_SECONDS", 0.2), ("POLL_SECONDS", 0.01), ("LOOK_SECONDS", 0.02)):
        monkeypatch.setattr(flower_runtime, name, seconds)
    for name in ("_run_id", "_task_id", "_node_id"):  # as Flower sets them in a server app's process
        monkeypatch.setattr(TaskIdentity, name, 1)


def test_tasks_go_to_the_nodes_that_hold_their_partitions() -> None:
    grid = Grid({77: Node(2), 55: Node(0), 66: Node(1)})
    answers = list(connected(grid).run([task(0), task(2)]))
    assert sorted(a.client for a in answers) == [0, 2]
    assert all(torch.equal(a.tensors["a"], VALUES["a"] + a.client) for a in answers)
    assert [(node, t.client) for node, t in grid.sent] == [(55, 0), (77, 2)]


def test_every_way_to_return_nothing_has_its_kind() -> None:
    def crash(code: int) -> Callable[[ClientTask], Answer]:
        return lambda task: Error(code, "why")

    grid = Grid(
        {
            1: Node(0, perform=lambda task: ClientFailure(task.client, "no battery")),
            2: Node(1, perform=lambda task: None),
            3: Node(2, perform=crash(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)),
            4: Node(3, perform=crash(ErrorCode.NODE_UNAVAILABLE)),
            5: Node(4, base="another"),
            6: Node(6, perform=lambda task: replace(update(task), client=3)),
        }
    )
    answers = connected(grid).run([task(client) for client in range(7)])
    found = {a.client: (a.kind, a.reason) for a in answers if isinstance(a, ClientFailure)}
    assert {client: kind for client, (kind, _) in found.items()} == {
        0: "raised",
        1: "deadline",
        2: "raised",
        3: "lost",
        4: "refused",
        5: "absent",
        6: "refused",
    }
    assert "another base model (another) than this run's (base)" in found[4][1]
    assert found[6][1] == "it answered as client 3"


def test_a_node_started_anew_gets_its_task_again() -> None:
    """A registered node keeps its id, another gets a new one; what the first start still answers is not used twice."""
    silent = Node(0, perform=lambda task: None)
    grid = Grid({1: silent, 2: Node(1, perform=lambda task: None)})

    def restart() -> None:
        if len(grid.sent) == 2:
            grid.nodes = {1: Node(0, since="later"), 3: Node(1)}

    runtime = connected(grid, before_client=restart)
    answers = list(runtime.run([replace(task(client), deadline_seconds=5.0) for client in (0, 1)]))
    assert sorted(a.client for a in answers if isinstance(a, ClientUpdate)) == [0, 1]
    assert sorted((node, t.client) for node, t in grid.sent) == [(1, 0), (1, 0), (2, 1), (3, 1)]


def test_a_node_that_was_gone_is_used_if_it_returns_before_the_deadline() -> None:
    gone = Node(0, perform=lambda task: Error(ErrorCode.NODE_UNAVAILABLE, "gone"))
    for returns in (True, False):
        grid = Grid({1: gone})
        looks = iter(range(10**6))

        def before_client(grid: Grid = grid, looks: Iterator[int] = looks, returns: bool = returns) -> None:
            look = next(looks)
            if grid.sent:
                grid.nodes = {2: Node(0)} if returns and look > 20 else {}

        runtime = connected(grid, before_client=before_client)
        (answer,) = runtime.run([replace(task(0), deadline_seconds=1.0)])
        if returns:
            assert (type(answer), [node for node, _ in grid.sent]) == (ClientUpdate, [1, 2])
        else:
            assert (answer.kind, answer.reason) == ("lost", "gone")


def test_an_update_that_comes_too_late_is_handed_on_in_the_next_round() -> None:
    grid = Grid({1: Node(0), 2: Node(1)})
    runtime = connected(grid)
    held: dict[str, Message] = {}

    def hold(ids: Iterable[str]) -> list[Message]:
        held.update({i: grid.replies.pop(i) for i in list(grid.replies) if "m1" in i})
        return Grid.pull_messages(grid, ids)

    grid.pull_messages = hold
    first = list(runtime.run([task(0), task(1)]))
    assert [(a.client, getattr(a, "kind", None)) for a in first] == [(0, None), (1, "deadline")]
    del grid.pull_messages
    grid.replies |= held
    second = list(runtime.run([task(0, 2), task(1, 2)]))
    assert sorted((a.client, a.round) for a in second) == [(0, 2), (1, 1), (1, 2)]


def test_evaluations_come_from_the_nodes_that_hold_the_partitions() -> None:
    """Whoever is absent, refused, silent or sends an update instead is told of; no other is kept back."""
    grid = Grid(
        {
            77: Node(2),
            55: Node(0),
            66: Node(1, evaluate=lambda asked: None),
            44: Node(3, base="another"),
            33: Node(5, evaluate=lambda asked: update(task(asked.client))),
            22: Node(6, evaluate=lambda asked: replace(evaluation(asked), client=0)),
        }
    )
    runtime = connected(grid)
    answers = {a.client: a for a in runtime.evaluate([evaluation_task(client) for client in range(7)])}
    assert [answers[client] for client in (0, 2)] == [evaluation(evaluation_task(client)) for client in (0, 2)]
    kinds = {client: a.kind for client, a in answers.items() if isinstance(a, ClientFailure)}
    assert kinds == {1: "deadline", 3: "refused", 4: "absent", 5: "refused", 6: "refused"}
    assert list(runtime.evaluate([])) == []


def test_late_updates_outlast_an_evaluation_and_late_evaluations_do_not() -> None:
    """An update that comes while clients evaluate is late in the next round; an evaluation that comes then is gone."""
    grid = Grid({1: Node(0), 2: Node(1)})
    runtime = connected(grid)
    held: dict[str, Message] = {}

    def hold_second(ids: Iterable[str]) -> list[Message]:
        held.update({i: grid.replies.pop(i) for i in list(grid.replies) if "m1" in i})
        return Grid.pull_messages(grid, ids)

    grid.pull_messages = hold_second
    assert [getattr(a, "kind", None) for a in runtime.run([task(0), task(1)])] == [None, "deadline"]
    del grid.pull_messages
    grid.replies |= held  # the update comes now
    assert [type(a) for a in runtime.evaluate([evaluation_task(0)])] == [ClientEvaluation]
    held.clear()
    grid.pull_messages = hold_second
    late = list(runtime.evaluate([evaluation_task(0), evaluation_task(1)]))
    assert [getattr(a, "kind", None) for a in late] == [None, "deadline"]
    del grid.pull_messages
    grid.replies |= held  # the evaluation comes now
    second = list(runtime.run([task(0, 2), task(1, 2)]))
    assert all(isinstance(a, ClientUpdate) for a in second)
    assert sorted((a.client, a.round) for a in second) == [(0, 2), (1, 1), (1, 2)]


def test_a_node_of_another_base_model_does_not_put_out_the_honest_one() -> None:
    grid = Grid({1: Node(0)})
    lines: list[str] = []
    presence = Presence(grid, "base", 1, lines.append)
    runtime = FlowerRuntime(grid, presence, {"labels": ["0", "1"]})
    runtime.gather(1, 5)
    grid.nodes[2] = Node(0, base="another")
    for _ in range(2):  # it is asked, and its answer is there at the next look
        presence.look()
    assert "node 2 is refused as client 0, which another node is" in lines[-1]
    (answer,) = runtime.run([task(0)])
    assert isinstance(answer, ClientUpdate)
    assert grid.sent[0][0] == 1
    del grid.nodes[1]
    for _ in range(3):  # the honest one is seen to be gone, the other is asked again
        presence.look()
    assert presence.refused.keys() == {0}


def test_nodes_that_are_no_client_of_the_run_take_no_part() -> None:
    """Counted as present, they would start a run without those it waits for."""
    grid = Grid({node: Node(client) for node, client in enumerate((1, 2, -7, 10**30))})
    lines: list[str] = []
    runtime = FlowerRuntime(grid, Presence(grid, "base", 2, lines.append), {"labels": ["0", "1"]})
    assert runtime.gather(2, 0.2) == [1]
    assert "node 1 takes no part: its partition-id is 2, but clients are 0 to 1" in lines


@pytest.mark.parametrize(
    "header",
    [
        "",
        "[" * 100_000,
        "null",
        "{}",
        *(
            json.dumps(row)
            for row in ({"kind": "presence", "client": True, "base": "b"}, {"kind": "presence", "client": 0, "base": 1})
        ),
    ],
    ids=range(6),
)
def test_who_a_node_is_makes_no_sense(header: str) -> None:
    client, _, problem = _read(Parcel(header), 1)
    assert client is None
    assert problem.startswith("its answer to who it is")
