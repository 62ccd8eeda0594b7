"""What a client does with a task: Spry's ClientTrain, for any estimator."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from spryfl.errors import DeadlineError, SpryError
from spryfl.federated.local_optimizer import LocalOptimizer, LocalOptimizerName
from spryfl.federated.messages import ClientEvaluation, ClientTask, ClientUpdate, EvaluationTask
from spryfl.federated.method import Pace
from spryfl.federated.pacing import Halves
from spryfl.forward_mode.budget import chunks_of
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.directions import EVERYONE, DirectionStream
from spryfl.gradients.estimator import GradientEstimator, Loss
from spryfl.gradients.exact_head import ExactHead
from spryfl.gradients.guided import GuidedGradient
from spryfl.gradients.kinds import Distribution, TangentsPer
from spryfl.gradients.private import PrivateSlopes

BatchT = TypeVar("BatchT")


class ClientData(Protocol[BatchT]):
    """One client's examples and how they become losses."""

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int]) -> BatchT: ...

    def losses(self, model: nn.Module, batch: BatchT) -> Tensor:
        """(rows,) the loss of each row of the batch."""
        ...

    def token_losses(self, model: nn.Module, batch: BatchT) -> Tensor:
        """(rows, tokens) what each row's loss is the sum of, if a causal model's; else `losses`."""
        ...


class Scores(Protocol):
    """How a model does on some examples."""

    @property
    def num_examples(self) -> int: ...

    @property
    def loss(self) -> float: ...

    @property
    def metrics(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class BatchLoss(Generic[BatchT]):
    """The loss of one step's batch; dropout draws the same mask at every evaluation."""

    data: ClientData[BatchT]
    batch: BatchT
    seed: int

    def __call__(self, model: nn.Module) -> Tensor:
        return self._losses(model).mean()

    def parts(self, model: nn.Module) -> Tensor:
        """See `SeparableLoss.parts`."""
        losses = self._losses(model)
        return losses / losses.shape[0]

    def token_parts(self, model: nn.Module) -> Tensor:
        """See `TokenLoss.token_parts`."""
        torch.manual_seed(self.seed)
        losses = self.data.token_losses(model, self.batch)
        return losses / losses.shape[0]

    def _losses(self, model: nn.Module) -> Tensor:
        torch.manual_seed(self.seed)
        return self.data.losses(model, self.batch)


@dataclass(frozen=True)
class LocalTraining:
    """How clients train: the same for all clients of a run, known to them and the server.

    Attributes:
        num_candidates, same_directions: see `method.Method`.
        tells_variance: clients measure how much their steps' gradients vary (`federated.pacing`).
        tells_loss: whether a client's mean training loss travels; where its examples are private it must not.
    """

    pace: Pace
    epochs: int
    batch_size: int
    optimizer: LocalOptimizerName
    learning_rate: float
    weight_decay: float
    num_tangents: int
    distribution: Distribution
    tangents_per: TangentsPer = "step"
    shrinkage: bool = False
    chunk_bytes: int | None = None
    num_candidates: int = 1
    same_directions: bool = False
    tells_variance: bool = False
    tells_loss: bool = True

    def num_steps(self, num_examples: int) -> int:
        """Local steps a round of a client with this many examples."""
        return 1 if self.pace == "iteration" else self.epochs * -(-num_examples // self.batch_size)

    def new_optimizer(self, values: Mapping[str, Tensor]) -> LocalOptimizer:
        return LocalOptimizer(values, self.optimizer, self.learning_rate, self.weight_decay)

    def directions(self, task: ClientTask) -> DirectionStream:
        return DirectionStream(
            seed=task.seed,
            round=task.round,
            client=EVERYONE if self.same_directions else task.client,
            distribution=self.distribution,
            groups=task.groups,
            shrinkage=self.shrinkage,
            num_candidates=self.num_candidates,
            known=task.last_change,
        )


@dataclass(frozen=True)
class Client(Generic[BatchT]):
    """A client: its data, the shared frozen model, an estimator.

    Attributes:
        dropout: the adapter's dropout modules, active during an update; the base model's never are.
        estimators: by name, those that a task's settings may ask for instead.
        score: how a model does on the rows this client holds out; None where it holds none.
        personal: the same examples with the loss that serves this client alone; None where that is `data`'s.
    """

    model: nn.Module
    data: ClientData[BatchT]
    estimator: GradientEstimator
    training: LocalTraining
    dropout: Sequence[nn.Module] = ()
    estimators: Mapping[str, GradientEstimator] = field(default_factory=dict)
    score: Callable[[nn.Module], Scores] | None = None
    personal: ClientData[BatchT] | None = None

    def update(self, task: ClientTask) -> ClientUpdate:
        """Perform a task: local steps on the assigned units; the model is left as it was found.

        Each step estimates the gradient of its batch's loss at the current values and steps the local
        optimizer (Spry, algorithm 1, ClientTrain).

        Raises:
            DeadlineError: a step would begin after the task's deadline.
        """
        started, cpu_started = time.perf_counter(), time.process_time()
        directions = self.training.directions(task)
        optimizer = self.training.new_optimizer({name: task.values[name] for name in task.parameters})
        losses, slopes, num_seen, gradients, halves = [], [], 0, {}, Halves()
        device = next(self.model.parameters()).device
        accelerators = [] if device.type == "cpu" else [device]
        random = torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda")
        estimator, chunks = self._estimator(task), chunks_of(task.settings.chunk_bytes or self.training.chunk_bytes)
        with loaded(self.model, task.values), in_training(self.dropout), random, chunks:
            for step, rows in enumerate(self._batches(task)):
                _require_time(task, time.perf_counter() - started, f"{step} steps")
                estimate = estimator.estimate(
                    self.model,
                    self._loss(task, step, rows),
                    task.parameters,
                    directions.at_step(step),
                    len(rows),
                )
                gradients = estimate.gradients
                losses.append(estimate.loss * len(rows))
                num_seen += len(rows)
                if self.training.tells_variance:
                    halves.add(gradients, 1.0)
                if estimate.slopes is not None:
                    slopes.append(estimate.slopes)
                if self.training.pace == "epoch":
                    optimizer.step(gradients)
                    write_values(self.model, optimizer.values)
        return ClientUpdate(
            round=task.round,
            client=task.client,
            num_examples=num_seen // self.training.epochs if self.training.pace == "epoch" else len(self.data),
            loss=sum(losses) / num_seen if self.training.tells_loss else None,
            tensors={"values": optimizer.values, "gradients": gradients, "slopes": {}}[task.upload],
            slopes=torch.stack(slopes) if task.upload == "slopes" else None,
            variance=halves.variance,
            seconds=time.perf_counter() - started,
            cpu_seconds=time.process_time() - cpu_started,
        )

    def evaluate(self, task: EvaluationTask) -> ClientEvaluation:
        """Evaluate values on the rows this client holds out; the model is left as it was found.

        With `task.training` it trains first, as in a round, but for whole epochs whatever the method's pace: the one
        step of a per-iteration method's round would personalize nothing.

        Raises:
            DeadlineError: training has taken up the time to evaluate.
            SpryError: it holds no rows out.
        """
        if self.score is None:
            raise SpryError(f"client {task.client} holds out no rows")
        started, values = time.perf_counter(), task.values
        if task.training is not None:
            whole_epochs = replace(self.training, pace="epoch")
            own = replace(self, data=self.data if self.personal is None else self.personal, training=whole_epochs)
            values = values | own.update(task.training).tensors
        _require_time(task, time.perf_counter() - started, "training")
        with loaded(self.model, values):
            scores = self.score(self.model)
        return ClientEvaluation(task.round, task.client, scores.num_examples, scores.loss, dict(scores.metrics))

    def _estimator(self, task: ClientTask) -> GradientEstimator:
        """The run's estimator or the one chosen for this client, with its settings and the guides it was sent."""
        settings = task.settings
        estimator = self.estimator if settings.estimator is None else self.estimators[settings.estimator]
        if isinstance(estimator, Backprop) and settings.checkpointing is not None:
            return replace(estimator, checkpointing=settings.checkpointing, budget_bytes=settings.checkpoint_bytes)
        if isinstance(estimator, GuidedGradient):
            if settings.horizon is not None and settings.slopes is not None:
                estimator = replace(estimator, horizon=settings.horizon, slopes_per=settings.slopes)
            return estimator.guided_by(task.maps, task.momentum)
        return estimator if settings.num_tangents is None else _with_tangents(estimator, settings.num_tangents)

    def _batches(self, task: ClientTask) -> Iterator[np.ndarray]:
        """Row numbers of each local step's batch: shuffled anew each round and epoch, from the seed."""
        size = self.training.batch_size
        order = np.random.Generator(np.random.Philox(key=task.seed, counter=_address(task, "batches")))
        if len(self.data) == 0:
            raise SpryError(f"client {task.client} has no examples")
        if self.training.pace == "iteration":
            yield order.permutation(len(self.data))[:size]
            return
        for _ in range(self.training.epochs):
            rows = order.permutation(len(self.data))
            yield from (rows[start : start + size] for start in range(0, len(rows), size))

    def _loss(self, task: ClientTask, step: int, rows: np.ndarray) -> Loss:
        seed = int.from_bytes(
            hashlib.blake2b(f"{task.seed}/{task.round}/{task.client}/{step}".encode(), digest_size=7).digest(), "little"
        )
        return BatchLoss(self.data, self.data.batch(rows.tolist()), seed)


def _require_time(task: ClientTask | EvaluationTask, seconds: float, done: str) -> None:
    if task.deadline_seconds is not None and seconds > task.deadline_seconds:
        raise DeadlineError(f"stopped after {done}: its deadline of {task.deadline_seconds:g} s is over")


def _with_tangents(estimator: Any, num_tangents: int) -> GradientEstimator:
    wraps = isinstance(estimator, ExactHead | PrivateSlopes)
    own = {"inner": _with_tangents(estimator.inner, num_tangents)} if wraps else {"num_tangents": num_tangents}
    changed: GradientEstimator = replace(estimator, **own)
    return changed


def _address(task: ClientTask, purpose: str) -> np.ndarray:
    tag = int.from_bytes(purpose.encode()[:7], "little")
    return np.array([0, tag, task.client, task.round], dtype=np.uint64)


def write_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy float32 master values into the model's parameters, in their device and dtype."""
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)


def read_values(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Float32 copies, on the CPU, of some parameters."""
    return {name: model.get_parameter(name).detach().to("cpu", torch.float32, copy=True) for name in names}


@contextmanager
def loaded(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these values in its trainable parameters, its own restored afterwards."""
    saved = {name: model.get_parameter(name).detach().clone() for name in values}
    try:
        write_values(model, values)
        yield
    finally:
        write_values(model, saved)


@contextmanager
def in_training(modules: Sequence[nn.Module]) -> Iterator[None]:
    """These modules in training mode, each back in its own mode afterwards."""
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = True
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
