"""The Runtime over Flower's grid: tasks to nodes, answers back, until all have answered or the deadline is over."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from flwr.app import Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from spryfl.federated.failures import FailureKind
from spryfl.federated.messages import ClientEvaluation, ClientFailure, ClientTask, ClientUpdate, EvaluationTask
from spryfl.runtime.flower.presence import Presence, Session
from spryfl.runtime.flower.wire import parcel_of, to_content
from spryfl.runtime.messages import decode_evaluation, decode_update, encode_task

GRACE_SECONDS = 20.0
"""What a message takes beside its task: nodes ask for messages every 3 s and start a process for each."""
POLL_SECONDS = 0.25
LOOK_SECONDS = 1.0

Task: TypeAlias = ClientTask | EvaluationTask

_KINDS: dict[int, FailureKind] = {ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "raised"}


class FlowerRuntime:
    """Performs tasks on the nodes that hold their clients' partitions.

    A node that is started anew during a round gets its task again; one that is gone may come back until the deadline.
    Updates of earlier rounds are handed on as they come: the round loop counts them as late. Evaluations that come late
    are dropped: their clients are missing in the figures already.

    Args:
        presence: knows where clients are.
        about: what every task's client must know of the run.
        before_client: called while waiting; the place to stop at.
    """

    def __init__(
        self,
        grid: Grid,
        presence: Presence,
        about: Mapping[str, Any],
        before_client: Callable[[], None] = lambda: None,
    ) -> None:
        self._grid = grid
        self._presence = presence
        self._about = json.dumps(about)
        self._before_client = before_client
        self._sent: dict[str, tuple[Task, Session]] = {}
        self._looked = -math.inf

    def gather(self, num_clients: int, wait_seconds: float) -> list[int]:
        """Wait until all clients are connected, or for so long; returns those that are."""
        end = time.monotonic() + wait_seconds
        while len(self._clients()) + len(self._presence.refused) < num_clients and time.monotonic() < end:
            self._before_client()
            time.sleep(POLL_SECONDS)
        return self._clients()

    def _clients(self) -> list[int]:
        self._look()
        return self._presence.clients

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """See `Runtime.run`."""
        return self._each(tasks, ClientTask, MessageType.TRAIN)

    def evaluate(self, tasks: Sequence[EvaluationTask]) -> Iterator[ClientEvaluation | ClientFailure]:
        """See `Runtime.evaluate`. Late updates that come meanwhile stay with Flower until the next round asks."""
        yield from self._each(tasks, EvaluationTask, MessageType.EVALUATE)
        self._sent = {m: sent for m, sent in self._sent.items() if not isinstance(sent[0], EvaluationTask)}

    def _each(self, tasks: Sequence[Any], kind: type[Task], message_type: str) -> Iterator[Any]:
        """Have tasks of one kind performed."""
        if not tasks:
            return
        open_tasks = {task.client: task for task in tasks}
        self._look(now=True)
        for client in list(open_tasks):
            if self._presence.session(client) is None:
                del open_tasks[client]
                yield self._missing(client)
        self._send(list(open_tasks.values()), message_type)
        end = time.monotonic() + (_patience(tasks[0]) or math.inf)
        gone: dict[int, ClientFailure] = {}
        while open_tasks and time.monotonic() < end:
            self._before_client()
            for task, answer in self._answers(kind):
                if isinstance(answer, ClientFailure) and any(task is sent for sent, _ in self._sent.values()):
                    continue  # where it was sent first; where it was sent again it is still awaited
                current = open_tasks.get(task.client) is task
                if current and isinstance(answer, ClientFailure) and self._may_return(answer, end):
                    gone[task.client] = answer
                    continue
                if current:
                    del open_tasks[task.client]
                elif task.round == tasks[0].round or isinstance(answer, ClientFailure):
                    continue  # of a task that was sent twice, or that was given up already
                yield answer
            self._look()
            self._send([task for task in open_tasks.values() if self._moved(task)], message_type)
            time.sleep(POLL_SECONDS)
        for client in open_tasks:
            yield gone.get(client, ClientFailure(client, "no answer by its deadline", "deadline"))

    def _may_return(self, failure: ClientFailure, end: float) -> bool:
        """Whether the client's node is gone and the round's deadline lets it come back."""
        if failure.kind != "lost" or end == math.inf:
            return False
        self._look(now=True)
        return self._presence.session(failure.client) is None

    def _missing(self, client: int) -> ClientFailure:
        if client in self._presence.refused:
            return ClientFailure(client, self._presence.refused[client], "refused")
        return ClientFailure(client, "it is not connected", "absent")

    def _look(self, now: bool = False) -> None:
        if now or time.monotonic() >= self._looked + LOOK_SECONDS:
            self._looked = time.monotonic()
            self._presence.look()

    def _moved(self, task: Task) -> bool:
        """Whether the client is now elsewhere than where its task was sent."""
        session = self._presence.session(task.client)
        return session is not None and not any(t is task and s == session for t, s in self._sent.values())

    def _send(self, tasks: Sequence[Task], message_type: str) -> None:
        if not tasks:
            return
        sessions = [self._presence.session(task.client) for task in tasks]
        messages = [
            Message(
                to_content(encode_task(task), self._about),
                session.node,
                message_type,
                group_id=str(task.round),
                ttl=None if (patience := _patience(task)) is None else 2 * patience,
            )
            for task, session in zip(tasks, sessions, strict=True)
            if session is not None
        ]
        pairs = [(task, session) for task, session in zip(tasks, sessions, strict=True) if session is not None]
        self._sent |= dict(zip(self._grid.push_messages(messages), pairs, strict=True))

    def _answers(self, kind: type[Task]) -> Iterator[tuple[Task, ClientUpdate | ClientEvaluation | ClientFailure]]:
        """What has come since for tasks of a kind, with the task it answers: of this round or an earlier one."""
        awaited = [message_id for message_id, (task, _) in self._sent.items() if isinstance(task, kind)]
        if not awaited:
            return
        decode = decode_update if kind is ClientTask else decode_evaluation
        for reply in self._grid.pull_messages(awaited):
            task, _ = self._sent.pop(reply.metadata.reply_to_message_id)
            if reply.has_error():
                yield task, _failure(task.client, reply)
            else:
                yield task, decode(parcel_of(reply), task.client)


def _patience(task: Task) -> float | None:
    """Seconds from sending a task until it is given up."""
    return None if task.deadline_seconds is None else task.deadline_seconds + GRACE_SECONDS


def _failure(client: int, reply: Message) -> ClientFailure:
    """Flower's own report that a message has no reply."""
    reason = " ".join((reply.error.reason or f"Flower's error {reply.error.code}").split())[:500]
    return ClientFailure(client, reason, _KINDS.get(reply.error.code, "lost"))
