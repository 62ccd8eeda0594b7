"""Clients one after another: what one raises, and which are metered."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from spryfl.errors import DeadlineError
from spryfl.federated.messages import ClientFailure, ClientTask, ClientUpdate
from spryfl.runtime.in_process import InProcessRuntime

TASKS = [ClientTask(1, client, 0, (), (), {}, "values") for client in range(3)]


class Raising:
    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def update(self, task: ClientTask) -> ClientUpdate:
        if self.error is not None:
            raise self.error
        held = torch.zeros(1000)
        return ClientUpdate(task.round, task.client, 1, float(held.sum()))


def runtime(*errors: Exception | None) -> Any:
    return InProcessRuntime(lambda client: Raising(errors[client]), lambda client: 1)  # type: ignore[arg-type,return-value]


def test_a_client_that_raises_does_not_stop_the_others() -> None:
    found = list(runtime(DeadlineError("late"), ValueError("a\n  b" + "c" * 600), None).run(TASKS))
    assert [getattr(answer, "kind", None) for answer in found] == ["deadline", "raised", None]
    assert isinstance(found[1], ClientFailure)
    assert found[1].reason.startswith("a bc")
    assert len(found[1].reason) == 500


def test_a_mistake_of_ours_ends_the_run() -> None:
    with pytest.raises(TypeError, match="ours"):
        list(runtime(TypeError("ours"), None, None).run(TASKS))


def test_a_client_that_failed_was_not_metered() -> None:
    """So the next one with as many tokens is."""
    answers = list(runtime(DeadlineError("late"), None, None).run(TASKS))
    assert [getattr(own, "peak_activation_bytes", 0) >= 4000 for own in answers] == [False, True, False]
    again = replace(TASKS[2], units=("more",))
    (other,) = runtime(None, None, None).run([again])
    assert other.peak_activation_bytes >= 4000
