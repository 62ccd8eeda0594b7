"""Worker processes that die, in a task and between rounds."""

import os
from collections.abc import Iterator, Sequence

import pytest

from spryfl.errors import SpryError
from spryfl.federated.messages import ClientFailure, ClientTask, ClientUpdate, Runtime
from spryfl.runtime.workers import WorkerRuntime


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_dies_fails_its_own_task_alone(num_workers: int) -> None:
    tasks = [ClientTask(1, client, 0, (), (), {}, "values") for client in range(5)]
    runtime = WorkerRuntime(FragileRuntime, num_workers, None)
    try:
        answers = list(runtime.run(tasks))
        assert sorted(answer.client for answer in answers) == [0, 1, 2, 3, 4]
        (failure,) = (answer for answer in answers if isinstance(answer, ClientFailure))
        assert (failure.client, failure.kind) == (0, "lost")
        assert all(isinstance(answer, ClientUpdate) for answer in runtime.run(tasks[1:]))
    finally:
        runtime.close()


def test_a_worker_that_died_between_rounds_is_replaced() -> None:
    task = ClientTask(1, 1, 0, (), (), {}, "values")
    runtime = WorkerRuntime(FragileRuntime, 1, None)
    try:
        assert isinstance(next(iter(runtime.run([task]))), ClientUpdate)
        (pool,) = runtime._workers.values()
        (worker,) = pool._processes.values()
        worker.kill()
        worker.join()
        answers = [answer for _ in range(3) for answer in runtime.run([task])]
        assert isinstance(answers[-1], ClientUpdate)  # the first may have been sent before its end was seen
    finally:
        runtime.close()


def test_a_worker_that_cannot_start_ends_the_run() -> None:
    """Each of its tasks would be lost, with the processes that are started for them."""
    runtime = WorkerRuntime(_no_memory, 2, None)
    try:
        with pytest.raises(SpryError, match=r"of 2 ended while it loaded .* lower runtime\.num_workers"):
            list(runtime.run([ClientTask(1, client, 0, (), (), {}, "values") for client in range(5)]))
    finally:
        runtime.close()


def _no_memory() -> Runtime:
    os._exit(1)


class FragileRuntime:
    """Dies of client 0's task."""

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate]:
        if tasks[0].client == 0:
            os._exit(1)
        yield ClientUpdate(1, tasks[0].client, 1, 0.0)
