"""What a configuration says against hostile clients and for privacy, held to what the federation is."""

from spryfl.config import RunConfig
from spryfl.errors import ConfigError
from spryfl.federated.accounting import Accountant, ClientAccountant, ExampleAccountant
from spryfl.federated.rounds import Federation

MAJORITY = 3
"""Clients of a unit, the fewest of which one can be told to be unlike the others."""


def require_majorities(config: RunConfig, federation: Federation) -> None:
    """Refuse an aggregation against hostile clients where too few train a unit for it to tell them."""
    if config.server.aggregation == "mean":
        return
    blocks = federation.blocks or [(unit,) for unit in federation.units]
    dealt = [block for block in blocks if not set(block) <= set(federation.shared)]
    split = federation.assignment == "split" and bool(dealt)
    fewest = max(federation.cohort_size // len(dealt), 1) if split else federation.cohort_size
    if fewest < MAJORITY:
        remedy = f"raise server.cohort_size to {MAJORITY * len(dealt) if split else MAJORITY}"
        if split:
            remedy += ", or choose a method that gives all units to every client, such as fedavg"
        raise ConfigError(
            f"server.aggregation = '{config.server.aggregation}': some unit has {fewest} of a round's clients, and of "
            f"fewer than {MAJORITY} nobody can tell which one is hostile: {remedy}"
        )


def accountant_of(config: RunConfig, federation: Federation) -> Accountant | None:
    """What tells how much privacy is spent; None where there is none."""
    privacy = config.privacy
    if privacy.level == "none":
        return None
    _, noise_multiplier = privacy.strength
    known = (noise_multiplier, privacy.delta, federation.num_clients, federation.cohort_size)
    if privacy.level == "client":
        return ClientAccountant(*known)
    passes = config.local.epochs if federation.training.pace == "epoch" else 1
    return ExampleAccountant(*known, seed=config.seed, passes=passes)
