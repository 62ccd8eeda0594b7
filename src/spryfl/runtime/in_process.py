"""Clients one after another in this process, sharing one frozen model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from spryfl.errors import DeadlineError, SpryError
from spryfl.federated.client import Client
from spryfl.federated.failures import FailureKind
from spryfl.federated.fitting import PassSettings
from spryfl.federated.messages import ClientEvaluation, ClientFailure, ClientTask, ClientUpdate, EvaluationTask
from spryfl.memory.meter import ActivationMeter

FAILURES = (SpryError, RuntimeError, ValueError, ArithmeticError, IndexError)
"""What a client may raise without ending the run."""


class InProcessRuntime:
    """Performs tasks in turn; a client exists only while its task runs.

    Args:
        client: makes the client of a partition id.
        before_client: called before each task; the place to stop at.
        batch_tokens: the most tokens any batch of a client can have. A task is metered, which slows it
            by a fifth or so, only when that exceeds what was metered before with as many units and the same settings:
            activations grow with it.
    """

    def __init__(
        self,
        client: Callable[[int], Client[Any]],
        batch_tokens: Callable[[int], int],
        before_client: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._before_client = before_client
        self._batch_tokens = batch_tokens
        self._metered: dict[tuple[int, PassSettings], int] = {}

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """See `Runtime.run`. A client that raises is a failure; the others go on."""
        for task in tasks:
            self._before_client()
            try:
                yield self._perform(task)
            except FAILURES as error:
                yield _failure(task.client, error)

    def evaluate(self, tasks: Sequence[EvaluationTask]) -> Iterator[ClientEvaluation | ClientFailure]:
        """See `Runtime.evaluate`. A client that raises is a failure; the others go on."""
        for task in tasks:
            self._before_client()
            try:
                yield self._client(task.client).evaluate(task)
            except FAILURES as error:
                yield _failure(task.client, error)

    def _perform(self, task: ClientTask) -> ClientUpdate:
        client = self._client(task.client)
        tokens, kind = self._batch_tokens(task.client), (len(task.units), task.settings)
        if tokens <= self._metered.get(kind, 0):
            return client.update(task)
        with ActivationMeter() as meter:
            update = client.update(task)
        self._metered[kind] = tokens  # one that failed on its way was not
        return replace(update, peak_activation_bytes=meter.peak_bytes)


def _failure(client: int, error: Exception) -> ClientFailure:
    kind: FailureKind = "deadline" if isinstance(error, DeadlineError) else "raised"
    return ClientFailure(client, " ".join(str(error).split())[:500], kind)
