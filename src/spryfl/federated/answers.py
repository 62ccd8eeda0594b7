"""What comes back from a round's clients: validated, and turned into the changes that it proposes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from spryfl.errors import UpdateRefusedError
from spryfl.federated.aggregation import Contribution
from spryfl.federated.messages import ClientFailure, ClientTask, ClientUpdate, Runtime
from spryfl.federated.state import Federation
from spryfl.federated.validation import MAX_EXAMPLES, require_norm, validate_update


@dataclass
class Answers:
    """What became of a round's tasks.

    Attributes:
        updates: that passed validation, without their tensors, which would stand twice.
        contributions: what they propose.
        bytes_up: of them, tensors included.
    """

    updates: list[ClientUpdate] = field(default_factory=list)
    bytes_up: int = 0
    contributions: list[Contribution] = field(default_factory=list)
    failures: list[ClientFailure] = field(default_factory=list)
    refused: list[ClientFailure] = field(default_factory=list)
    late: list[ClientFailure] = field(default_factory=list)


def collect_answers(runtime: Runtime, tasks: Sequence[ClientTask], federation: Federation) -> Answers:
    """Everything that comes back, validated and sorted; each task ends in an update, a failure or a refusal."""
    found = Answers()
    open_tasks = {task.client: task for task in tasks}
    for answer in runtime.run(tasks):
        if isinstance(answer, ClientFailure):
            open_tasks.pop(answer.client, None)
            (found.refused if answer.kind == "refused" else found.failures).append(answer)
            continue
        if isinstance(answer.round, int) and 1 <= answer.round < tasks[0].round:
            found.late.append(ClientFailure(answer.client, f"its update of round {answer.round} came too late"))
            continue
        task = open_tasks.pop(answer.client, None)
        try:
            validate_update(
                answer,
                task,
                _slopes_shape(answer, task, federation),
                tells_loss=federation.training.tells_loss,
                most_examples=federation.sizes[answer.client]
                if task is not None and federation.sizes
                else MAX_EXAMPLES,
            )
            assert task is not None
            change = proposed_change(answer, task, federation)
            require_norm(change, federation.max_update_norm)
        except UpdateRefusedError as error:
            found.refused.append(ClientFailure(answer.client, str(error), "refused"))
        else:
            found.updates.append(replace(answer, tensors={}, slopes=None))
            found.bytes_up += answer.payload_bytes
            if not _varies_too_much(answer, federation):
                weight = federation.sampling.weight(answer.client, answer.num_examples)
                found.contributions.append(Contribution(answer.client, change, weight))
    found.failures += [ClientFailure(client, "no answer came", "lost") for client in open_tasks]
    return found


def proposed_change(update: ClientUpdate, task: ClientTask, federation: Federation) -> dict[str, Tensor]:
    """What a validated update proposes: trained minus old values, or minus one step's gradient.

    From slopes alone the server rebuilds the client's gradients, and for methods that train for an
    epoch replays its local optimizer over them.
    """
    training = federation.training
    old = {name: task.values[name] for name in task.parameters}
    if update.slopes is not None:
        directions = training.directions(task)
        shapes = {name: value.shape for name, value in old.items()}
        optimizer = training.new_optimizer(old)
        for step, slopes in enumerate(update.slopes):
            gradients = directions.at_step(step).gradient(slopes, shapes)
            if training.pace == "iteration":
                return {name: -gradient for name, gradient in gradients.items()}
            optimizer.step(gradients)
        return {name: optimizer.values[name] - value for name, value in old.items()}
    if task.upload == "gradients":
        return {name: -gradient for name, gradient in update.tensors.items()}
    return {name: update.tensors[name] - value for name, value in old.items()}


def _varies_too_much(update: ClientUpdate, federation: Federation) -> bool:
    own = update.variance
    return federation.pacing == "leave_out" and own is not None and own > federation.variance_threshold


def _slopes_shape(update: ClientUpdate, task: ClientTask | None, federation: Federation) -> tuple[int, int] | None:
    if federation.upload != "slopes":
        return None
    training = federation.training
    steps = training.num_steps(update.num_examples) if isinstance(update.num_examples, int) else 1
    if task is None:  # refused for that
        return steps, training.num_tangents
    own = task.settings.num_tangents or training.num_tangents
    return steps, training.directions(task).at_step(0).num_slopes(task.parameters, own)
