"""What a configuration asks of its clients, held to what model and federation are."""

from collections.abc import Sequence
from itertools import chain

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from spryfl.config import RunConfig
from spryfl.errors import ConfigError
from spryfl.federated.accounting import Accountant, ClientAccountant, ExampleAccountant
from spryfl.federated.state import Federation
from spryfl.gradients.tangents import require_dimensions, tangent_groups
from spryfl.models.loading import AdaptedModel
from spryfl.models.units import HEAD

MAJORITY = 3
"""Clients of a unit, the fewest of which one can be told to be unlike the others."""


def require_checkpoint_budget(config: RunConfig, adapted: AdaptedModel, batch_tokens: Sequence[int]) -> None:
    """Refuse a checkpointing budget that some client's batch exceeds with a single hidden state.

    Args:
        batch_tokens: the most tokens of a batch of each client, padding included.
    """
    budget = config.method.budget
    size = getattr(adapted.model.config.get_text_config(), "hidden_size", None)
    if budget is None or size is None or config.method.own_estimator != "backprop":
        return
    tokens, client = max((tokens, client) for client, tokens in enumerate(batch_tokens))
    least = tokens * size * adapted.dtype.itemsize
    if budget < least:
        raise ConfigError(
            f"method.budget = {budget:,} bytes: one layer's input takes {least:,} bytes for a batch of client "
            f"{client}, {tokens:,} tokens; raise it to that, or lower local.batch_size or data.max_tokens"
        )


def require_enough_dimensions(config: RunConfig, federation: Federation, model: nn.Module) -> None:
    """Refuse more orthogonal tangents than the least that a client may train has dimensions."""
    method = config.method
    if method.own_estimator in ("backprop", "guided"):
        return

    def size(group: Sequence[str]) -> int:
        return sum(model.get_parameter(name).numel() for name in group)

    left_out = {HEAD} if method.exact_head else set()  # its gradient is exact, and no tangent moves it
    shared = [federation.units[unit] for unit in federation.shared if unit not in left_out]
    blocks = federation.blocks or [[unit] for unit in federation.units]
    apart = left_out.union(federation.shared)
    own = [[federation.units[unit] for unit in block if unit not in apart] for block in blocks]
    dealt = sorted(filter(None, own), key=lambda block: sum(map(size, block)))
    if method.tangents_per == "step" and federation.assignment == "split":
        dealt = dealt[: max(1, len(dealt) // federation.cohort_size if federation.fit is None else 1)]
    for group in tangent_groups(method.tangents_per, [*chain(*dealt), *shared]):
        require_dimensions(method.distribution, method.own_num_tangents, size(group), group)


def require_guessable(config: RunConfig, adapted: AdaptedModel) -> None:
    """Refuse guessed gradients of embeddings, which lie below all layers; the estimator itself sees it in round 1."""
    if config.method.own_estimator != "guided":
        return
    for unit in adapted.units:
        module = None if unit.is_head else adapted.model.get_base_model().get_submodule(unit.name)
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), nn.Embedding):
            raise ConfigError(
                f"adapter.target_modules: '{unit.name}' is an embedding, below the layers, where no guess reaches: "
                "leave it out, or choose a method with another estimator, such as spry or fedyogi"
            )


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


def require_clients_apart(config: RunConfig, federation: Federation) -> None:
    """Refuse a delta that would allow publishing a client outright, of as many as a column has values."""
    share = 1 / federation.num_clients
    if config.privacy.level == "client" and config.privacy.delta >= share:
        raise ConfigError(
            f"privacy.delta = {config.privacy.delta:g} would allow publishing one of {federation.num_clients} clients "
            f"outright; set it well below {share:g}"
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
