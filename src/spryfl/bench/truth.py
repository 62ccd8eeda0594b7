"""Slopes in bfloat16 and NF4 beside float32's, on SmolLM2-135M and real text.

Two questions for NF4: is the arithmetic true (against the same packed weights computed in float32), and how
far is the quantized model's slope from the unquantized model's? The second is no matter of arithmetic: another
model has another gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn

from spryfl.config import AdapterConfig, DataConfig, ModelConfig
from spryfl.data.loading import load_rows
from spryfl.federated.client import read_values, write_values
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.forward import loss_and_slopes
from spryfl.gradients.zeroth_order import ZerothOrder
from spryfl.models.loading import AdaptedModel, load_model
from spryfl.models.units import parameters_of

Row = dict[str, Any]
MODEL = "builtin:smollm2"
NUM_BATCHES, BATCH, TOKENS, K = 2, 8, 64, 8
SETTINGS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "nf4, computed in bfloat16": {"dtype": "bfloat16", "quantization": "nf4"},
    "nf4, computed in float32": {"dtype": "float32", "quantization": "nf4"},
}
PAIRS = (
    ("bfloat16", "float32"),
    ("nf4, computed in bfloat16", "nf4, computed in float32"),
    ("nf4, computed in bfloat16", "float32"),
)


def measure_truth() -> list[Row]:
    """Relative errors |s - s'| / |s'| over all slopes, and the cosine of the two vectors of slopes."""
    slopes, differences, values = {}, {}, None
    for name, settings in SETTINGS.items():
        adapted = load_model(ModelConfig(name=MODEL, device="cpu", **settings), AdapterConfig(), 2, seed=0)
        values = _values(adapted, values)
        slopes[name] = _slopes(adapted)
        if name in ("float32", "bfloat16"):
            differences[name] = _zeroth_order(adapted)
    rows = [_row("forward", of, against, slopes[of], slopes[against]) for of, against in PAIRS]
    for name, found in differences.items():
        rows.append(_row("zeroth_order", name, "float32", found, slopes["float32"][: len(found)]))
    return rows


def _values(adapted: AdaptedModel, values: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The same trainable values in every model, B's no longer zero: random ones rounded as bfloat16 rounds."""
    names = parameters_of(adapted.units)
    if values is None:
        draw = DirectionStream(1, round=1, client=0).at_step(0)
        values = read_values(adapted.model, names)
        moved = {n: 0.02 * draw.numbers(0, n, v.shape) for n, v in values.items() if "lora_B" in n}
        values = {n: v.bfloat16().float() for n, v in (values | moved).items()}
    write_values(adapted.model, values)
    return values


def _slopes(adapted: AdaptedModel) -> Tensor:
    """(batches x K,) along the same directions in every precision; one unit perturbed at a time would be alike."""
    found = []
    for number, loss in enumerate(_losses(adapted)):
        found.append(loss_and_slopes(adapted.model, loss, _tangents(adapted, number))[1].float())
    return torch.cat(found)


def _zeroth_order(adapted: AdaptedModel) -> Tensor:
    """Central differences along the first batch's directions."""
    loss = next(iter(_losses(adapted)))
    draw = DirectionStream(0, round=1, client=0).at_step(0)
    found = ZerothOrder(K).estimate(adapted.model, loss, parameters_of(adapted.units), draw, BATCH).slopes
    assert found is not None
    return found


def _tangents(adapted: AdaptedModel, step: int) -> dict[str, Tensor]:
    draw = DirectionStream(0, round=1, client=0).at_step(step)
    shapes = {name: adapted.model.get_parameter(name).shape for name in parameters_of(adapted.units)}
    return {name: torch.stack([draw.numbers(k, name, shape) for k in range(K)]) for name, shape in shapes.items()}


def _losses(adapted: AdaptedModel) -> list[Any]:
    """The losses of a few batches of movie reviews."""
    rows = load_rows(DataConfig(max_train_examples=NUM_BATCHES * BATCH), seed=0).train
    text, labels = list(rows["text"]), torch.tensor(rows["label"])
    losses = []
    for start in range(0, NUM_BATCHES * BATCH, BATCH):
        batch = adapted.tokenizer(
            text[start : start + BATCH], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        wanted = labels[start : start + BATCH]

        def loss(model: nn.Module, batch: Any = batch, wanted: Tensor = wanted) -> Tensor:
            return nn.functional.cross_entropy(model(**batch).logits.float(), wanted)

        losses.append(loss)
    return losses


def _row(estimator: str, of: str, against: str, found: Tensor, expected: Tensor) -> Row:
    return {
        "work": "truth",
        "model": MODEL,
        "estimator": estimator,
        "precision": of,
        "against": against,
        "batch": BATCH,
        "tokens": TOKENS,
        "k": K,
        "num_slopes": len(found),
        "relative_error": float((found - expected).norm() / expected.norm()),
        "cosine": float(torch.nn.functional.cosine_similarity(found, expected, dim=0)),
    }
