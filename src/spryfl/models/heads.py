"""Which modules are trained in full beside the adapter."""

from collections.abc import Sequence

from torch import nn

from spryfl.config import TaskKind
from spryfl.errors import ModelError
from spryfl.models.classes import MODEL_CLASSES

# A head by the names transformers gives it. A head is also whatever the checkpoint lacks.
HEAD_NAMES = ("classifier", "score", "pre_classifier", "qa_outputs")


def head_modules(base: nn.Module, missing: Sequence[str], task: TaskKind = "classification") -> list[str]:
    """Top-level modules to train in full: the known heads, and all that the checkpoint did not hold.

    A module the checkpoint lacks has random values that no one else can reproduce, so it must be
    trained and saved with the adapter (DistilBERT's pre_classifier, a missing pooler). A model that writes has nothing
    of the kind: what it knows before training lies in all of its weights.

    Raises:
        ModelError: a model that writes lacks weights.
    """
    if MODEL_CLASSES[task].writes:
        if missing:
            raise ModelError(
                f"task.kind = '{task}': the checkpoint lacks {len(missing)} tensors, such as {sorted(missing)[0]}: "
                "take one saved with its language-model head"
            )
        return []
    names = [name for name in HEAD_NAMES if hasattr(base, name)]
    for key in sorted(missing):
        parts = key.split(".")
        # model.score.weight -> score; bert.pooler.dense.weight -> pooler
        module = parts[0] if parts[0] in names or len(parts) < 3 else parts[1]
        if module not in names and parts[0] not in names:
            names.append(module)
    return names
