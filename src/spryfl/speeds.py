"""How fast each kind of estimator runs on this machine, measured once before the first round."""

from dataclasses import replace

import numpy as np

from spryfl.federated.choosing import KINDS, Candidate
from spryfl.federated.messages import ClientTask
from spryfl.federated.state import FederatedState
from spryfl.gradients.guesses import maps_for
from spryfl.gradients.tangents import tangent_groups
from spryfl.workbench import PartitionData, Workbench

ENOUGH_SECONDS = 1.0
MOST_STEPS = 3


def measure_speeds(bench: Workbench, state: FederatedState) -> dict[str, float]:
    """Processor seconds of a step over what its operations predict, by kind; one step of each on the longest batch.

    Kinds that the largest budget does not hold are left out. Short steps are repeated and the fastest counts, as a
    first step pays for what later ones find done.
    """
    choice = bench.client_choice
    assert choice is not None
    budget = max(choice.memory.budgets, default=None)
    shared = bench.federation.shared
    found: dict[str, float] = {}
    for unit in [unit for unit in bench.federation.units if unit not in shared] or list(bench.federation.units):
        units = (unit, *shared) if unit not in shared else (unit,)
        for candidate in choice.candidates(budget, units):
            fits = budget is None or candidate.peak_bytes <= budget
            if fits and candidate.kind not in found:
                found[candidate.kind] = _step_seconds(bench, state, units, candidate) / candidate.seconds
        if len(found) == len(KINDS):
            break
    return found


def _step_seconds(bench: Workbench, state: FederatedState, units: tuple[str, ...], candidate: Candidate) -> float:
    client, rows = _longest_batch(bench)
    own = bench.client_with(PartitionData(bench.task, bench.train, rows))
    own = replace(own, training=replace(own.training, epochs=1))
    federation = bench.federation
    task = ClientTask(
        round=0,
        client=client,
        seed=federation.seed,
        units=units,
        parameters=tuple(name for unit in units for name in federation.units[unit]),
        values=state.values,
        upload=federation.upload,
        settings=candidate.settings,
        maps=maps_for(state.maps, {place for unit in units for place in federation.places.get(unit, ())}),
        groups=tangent_groups(federation.training.tangents_per, [federation.units[unit] for unit in units]),
    )
    # What neighbours take of a CPU is no matter of the step; an accelerator's work is in no process's CPU time.
    on_cpu = next(bench.adapted.model.parameters()).device.type == "cpu"
    seconds: list[float] = []
    while not seconds or (len(seconds) < MOST_STEPS and sum(seconds) < ENOUGH_SECONDS):
        update = own.update(task)
        seconds.append(update.cpu_seconds if on_cpu else update.seconds)
    return max(min(seconds), 1e-9)  # clocks may be coarse


def _longest_batch(bench: Workbench) -> tuple[int, np.ndarray]:
    """The client whose batches can have the most tokens, and the longest of its rows that make a batch."""
    client = max(range(len(bench.partition)), key=bench.batch_tokens)
    rows = bench.partition[client]
    lengths = [len(bench.train.encodings[row]["input_ids"]) for row in rows]
    return client, rows[np.argsort(lengths, kind="stable")[::-1][: bench.config.local.batch_size]]
