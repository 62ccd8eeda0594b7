"""Clients in several processes of this machine, each with its own copy of the model.

For models small enough that a step is mostly overhead: two processes of one thread finish sooner than one
process of two threads, and do not stall when something else takes a core (OpenMP's threads spin while they
wait for each other).
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

import torch

from spryfl.errors import SpryError
from spryfl.federated.messages import (
    ClientEvaluation,
    ClientFailure,
    ClientTask,
    ClientUpdate,
    EvaluationTask,
    Runtime,
)

_local: Runtime | None = None
"""The runtime of this worker process, made once when it starts."""


class WorkerRuntime:
    """Performs tasks in `num_workers` processes, each with a runtime of its own.

    Args:
        make_local: makes the runtime of a worker; must be picklable.
        num_threads: of each worker; None leaves PyTorch's choice.
        before_client: called before each answer is handed on; the place to stop at.
    """

    def __init__(
        self,
        make_local: Callable[[], Runtime],
        num_workers: int,
        num_threads: int | None,
        before_client: Callable[[], None] = lambda: None,
    ) -> None:
        self._make_local = make_local
        self._num_workers = num_workers
        self._num_threads = num_threads
        self._before_client = before_client
        self._workers: dict[int, ProcessPoolExecutor] = {}
        self._started: dict[int, Future[None]] = {}

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """See `Runtime.run`. A worker that dies fails its task; another takes its place.

        Raises:
            SpryError: a worker cannot be started; those of later tasks could not either.
        """
        return self._each(_perform, tasks)

    def evaluate(self, tasks: Sequence[EvaluationTask]) -> Iterator[ClientEvaluation | ClientFailure]:
        """See `Runtime.evaluate`."""
        return self._each(_evaluate, tasks)

    def _each(self, work: Callable[[Any], Any], tasks: Sequence[ClientTask | EvaluationTask]) -> Iterator[Any]:
        """A task to every worker, and the next one to whichever has finished."""
        waiting = iter(tasks)
        running: dict[Future[Any], tuple[int, int]] = {}  # to worker and client

        def give(worker: int) -> None:
            task = next(waiting, None)
            if task is not None:
                running[self._submit(worker, work, task)] = worker, task.client

        for worker in range(self._num_workers):
            give(worker)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                worker, client = running.pop(future)
                answer = self._answer(future, worker, client)
                give(worker)
                self._before_client()
                yield answer

    def _submit(self, worker: int, work: Callable[[Any], Any], task: ClientTask | EvaluationTask) -> "Future[Any]":
        try:
            return self._worker(worker).submit(work, task)
        except BrokenProcessPool:  # it died between rounds, with no task
            del self._workers[worker]
            return self._worker(worker).submit(work, task)

    def _answer(self, future: "Future[Any]", worker: int, client: int) -> Any:
        try:
            return future.result()
        except BrokenProcessPool:
            del self._workers[worker]
            if self._started[worker].exception() is not None:
                raise SpryError(
                    f"worker {worker + 1} of {self._num_workers} ended while it loaded model and data (out of "
                    "memory?): lower runtime.num_workers, and go on with the run"
                ) from None
            return ClientFailure(client, "its worker process died (out of memory?)", "lost")

    def close(self) -> None:
        """Stop the workers; tasks not begun are dropped."""
        for worker in self._workers.values():
            worker.shutdown(wait=True, cancel_futures=True)
        self._workers.clear()

    def _worker(self, worker: int) -> ProcessPoolExecutor:
        """A pool of one process for each worker: one that dies breaks its pool, and so all that the pool was given."""
        if worker not in self._workers:
            self._workers[worker] = ProcessPoolExecutor(
                1,
                mp_context=get_context("spawn"),  # forking a process that runs threads can deadlock
                initializer=_start_worker,
                initargs=(self._make_local, self._num_threads),
            )
            self._started[worker] = self._workers[worker].submit(_nothing)  # done once the initializer is
        return self._workers[worker]


def _start_worker(make_local: Callable[[], Runtime], num_threads: int | None) -> None:
    global _local  # noqa: PLW0603  # a worker process has exactly one
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops us
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    _local = make_local()


def _nothing() -> None:
    """What a worker does first."""


def _perform(task: ClientTask) -> ClientUpdate | ClientFailure:
    assert _local is not None
    return next(iter(_local.run([task])))


def _evaluate(task: EvaluationTask) -> ClientEvaluation | ClientFailure:
    assert _local is not None
    return next(iter(_local.evaluate([task])))


def _die_with_parent() -> None:
    """A parent killed with -9 cannot stop its workers, and they would wait for tasks for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
