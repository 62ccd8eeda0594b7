"""Worker processes that die, in a task and between rounds."""

import os
from collections.abc import Iterator, Sequence

from spryfl.federated.messages import ClientFailure, ClientTask, ClientUpdate
from spryfl.runtime.workers import WorkerRuntime


def test_a_worker_that_dies_fails_its_tasks_and_is_replaced() -> None:
    tasks = [ClientTask(1, client, 0, (), (), {}, "values") for client in range(3)]
    runtime = WorkerRuntime(FragileRuntime, 1, None)
    try:
        assert all(isinstance(answer, ClientFailure) for answer in runtime.run(tasks))
        (answer,) = runtime.run(tasks[1:2])
        assert isinstance(answer, ClientUpdate)
    finally:
        runtime.close()


def test_a_worker_that_died_between_rounds_is_replaced() -> None:
    task = ClientTask(1, 1, 0, (), (), {}, "values")
    runtime = WorkerRuntime(FragileRuntime, 1, None)
    try:
        assert isinstance(next(iter(runtime.run([task]))), ClientUpdate)
        assert runtime._pool is not None
        (worker,) = runtime._pool._processes.values()
        worker.kill()
        worker.join()
        answers = [answer for _ in range(3) for answer in runtime.run([task])]
        assert isinstance(answers[-1], ClientUpdate)
    finally:
        runtime.close()


class FragileRuntime:
    """Dies of client 0's task."""

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate]:
        if tasks[0].client == 0:
            os._exit(1)
        yield ClientUpdate(1, tasks[0].client, 1, 0.0)
