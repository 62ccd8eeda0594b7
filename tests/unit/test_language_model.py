"""What a language model is to write, its losses against transformers' and autograd, and its scores."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config

from families import autograd_gradient, build, padded_batch, trainable
from prompted import byte_tokenizer, save_decoder
from spryfl.config import AdapterConfig, DataConfig, ModelConfig, TaskConfig
from spryfl.data.examples import Batch, Examples
from spryfl.data.language_model import LanguageModel, tokenize_texts
from spryfl.errors import DataError, ModelError
from spryfl.forward_mode.budget import carrying, chunks_of
from spryfl.forward_mode.dual import split
from spryfl.forward_mode.inject import injected
from spryfl.forward_mode.loss import IGNORED, require_bare_logits, row_losses
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.forward import loss_and_slopes
from spryfl.models.layers import layer_calls
from spryfl.models.loading import load_model
from spryfl.models.weights import count_weights

TOKENIZER = byte_tokenizer()
ENDED = byte_tokenizer()
ENDED.eos_token = "<pad>"
TASK = TaskConfig(kind="language_model", template="Review: {text}\nSentiment: {answer}")
DATA = DataConfig(text_columns=("text", "answer"), max_tokens=40)
ROWS = Dataset.from_dict({"text": ["the film is good", "the plot was awful"], "answer": ["positive", "negative"]})


def written(examples: Examples, row: int) -> str:
    return str(TOKENIZER.decode(examples.encodings[row]["input_ids"][int(examples.labels[row]) :]))


def test_the_last_column_is_written() -> None:
    """The space before the answer is of the answer's token."""
    examples = tokenize_texts(ROWS, DATA, TASK, TOKENIZER)
    assert [written(examples, row) for row in (0, 1)] == [" positive", " negative"]
    whole = TOKENIZER.decode(examples.encodings[0]["input_ids"])
    assert whole == "Review: the film is good\nSentiment: positive"
    ended = tokenize_texts(ROWS, DATA, TASK, ENDED)
    for with_end, without in zip(ended.encodings, examples.encodings, strict=True):
        assert with_end["input_ids"] == [*without["input_ids"], ENDED.eos_token_id]


def test_a_cut_row_keeps_its_template_and_does_not_end() -> None:
    length = len(tokenize_texts(ROWS, DATA, TASK, TOKENIZER).encodings[0]["input_ids"])
    data = DATA.model_copy(update={"max_tokens": length - 2})
    cut = tokenize_texts(ROWS, data, TASK, ENDED)
    ids = cut.encodings[0]["input_ids"]
    assert len(ids) <= length - 2
    assert (cut.num_truncated, tokenize_texts(ROWS, DATA, TASK, ENDED).num_truncated) == (2, 0)
    assert ids[-1] != ENDED.eos_token_id
    assert TOKENIZER.decode(ids).startswith("Review: the")
    assert "\nSentiment:" in TOKENIZER.decode(ids)
    assert written(cut, 0)


def test_a_text_alone_counts_from_its_second_token() -> None:
    data = DATA.model_copy(update={"text_columns": ("text",)})
    examples = tokenize_texts(ROWS, data, TaskConfig(kind="language_model"), TOKENIZER)
    assert examples.labels.tolist() == [1, 1]
    batch = LanguageModel(TOKENIZER, torch.device("cpu")).batch(examples, [0, 1])
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["labels"][:, 1:][real[:, 1:]], batch["input_ids"][:, 1:][real[:, 1:]])
    assert (batch["labels"][:, 0] == IGNORED).all()
    assert (batch["labels"][~real] == IGNORED).all()


@pytest.mark.parametrize(
    ("texts", "limit", "message"),
    [(["good"], 4, "the template alone takes"), (["good"], 100, "reads at most 64"), (["x"], 40, "'x' has no token")],
)
def test_rows_that_cannot_be_written(texts: list[str], limit: int, message: str) -> None:
    alone = message.endswith("has no token")
    rows = Dataset.from_dict({"text": texts, "answer": texts})
    data = DATA.model_copy(update={"max_tokens": limit, "text_columns": ("text",) if alone else ("text", "answer")})
    with pytest.raises(DataError, match=message):
        tokenize_texts(rows, data, TaskConfig(kind="language_model") if alone else TASK, TOKENIZER)


def test_a_sample_stays_within_what_the_model_reads() -> None:
    """Also after a prompt that fills its positions, of which OPT has no more."""
    model, tokenizer = build("opt", task="language_model"), byte_tokenizer()
    tokenizer.model_max_length = limit = model.config.max_position_embeddings
    task, long = LanguageModel(tokenizer, torch.device("cpu")), [5] * limit
    (sample,) = task.samples(model, Examples([{"input_ids": long}], np.array([limit - 2])), [0])
    assert sample["prompt"] == tokenizer.decode(long[:-2])
    assert len(tokenizer(sample["written"])["input_ids"]) <= 2


def lm_batch() -> Batch:
    batch = padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    labels[:, :2] = IGNORED
    labels[2, 5:] = IGNORED
    return batch | {"labels": labels}


def losses_of(model: nn.Module, batch: Batch) -> Tensor:
    return LanguageModel(TOKENIZER, torch.device("cpu")).losses(model, batch)


def whole_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The obvious way, all logits at once."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    tokens = nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return tokens.sum(1) / (targets != IGNORED).sum(1)


@pytest.mark.parametrize("chunk_bytes", [1, 10**9])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma"])
def test_losses_and_derivatives(family: str, chunk_bytes: int) -> None:
    """Against all logits at once, transformers' own loss, and autograd; whatever the chunks."""
    model, batch = build(family, task="language_model"), lm_batch()
    names = trainable(model)
    generator = torch.Generator().manual_seed(2)
    tangents = {n: torch.randn(2, *model.get_parameter(n).shape, generator=generator).double() for n in names}
    gradient = autograd_gradient(model, lambda m: whole_losses(m, batch).mean(), names)
    with chunks_of(chunk_bytes):
        with torch.no_grad():
            losses = losses_of(model, batch)
            assert torch.allclose(losses, whole_losses(model, batch), atol=1e-12)
            row = {name: tensor[:1] for name, tensor in batch.items()}
            own = model(**row).loss  # of transformers, in float32
            assert float(losses[0]) == pytest.approx(float(own), rel=1e-5)
        loss, slopes = loss_and_slopes(model, lambda m: losses_of(m, batch).mean(), tangents)
        for k in range(2):
            expected = sum((gradient[n] * tangents[n][k]).sum() for n in names)
            assert float(slopes[k]) == pytest.approx(float(expected), rel=1e-9)
        for checkpointing in ("none", "per_layer"):
            backprop = Backprop(checkpointing, layer_calls)
            _, found = backprop.loss_and_gradient(model, lambda m: losses_of(m, batch).mean(), names)
            assert all(torch.allclose(g, gradient[n], atol=1e-12) for n, g in zip(names, found, strict=True))
    assert loss == pytest.approx(float(losses.mean()))


@pytest.mark.parametrize("chunk_bytes", [1, 10**9])
def test_losses_token_by_token(chunk_bytes: int) -> None:
    """Rows' losses are their sums, slopes too, and each is autograd's of the tokens up to it alone."""
    model, batch = build("llama", task="language_model"), lm_batch()
    task, names = LanguageModel(TOKENIZER, torch.device("cpu")), trainable(model)
    generator = torch.Generator().manual_seed(2)
    tangents = {n: torch.randn(2, *model.get_parameter(n).shape, generator=generator).double() for n in names}
    with chunks_of(chunk_bytes), torch.no_grad(), injected(model, tangents), carrying(2):
        rows, row_slopes = split(task.losses(model, batch))
        tokens, slopes = split(task.token_losses(model, batch))
    assert row_slopes is not None
    assert slopes is not None
    assert tokens.shape == batch["input_ids"].shape
    assert torch.allclose(tokens.sum(1), rows)
    assert torch.allclose(slopes.sum(2), row_slopes)
    labelled = batch["labels"][:, 1:] != IGNORED
    assert torch.equal(tokens[:, :-1] != 0, labelled)
    row, place = (int(found[-1]) for found in labelled.nonzero(as_tuple=True))
    one = torch.full_like(batch["labels"], IGNORED)
    one[row, place + 1] = batch["labels"][row, place + 1]
    share = 1 / float(labelled[row].sum())
    gradient = autograd_gradient(model, lambda m: whole_losses(m, batch | {"labels": one})[row] * share, names)
    for k in range(2):
        expected = sum((gradient[n] * tangents[n][k]).sum() for n in names)
        assert float(slopes[k, row, place]) == pytest.approx(float(expected), rel=1e-9)
    with pytest.raises(ValueError, match="no token carries a label"):
        task.token_losses(model, batch | {"labels": torch.full_like(batch["labels"], IGNORED)})


@pytest.mark.parametrize("settings", [{"quantization": "nf4"}, {"streamed": True}])
def test_a_head_that_is_a_table_of_another_type_is_cast_once(settings: dict[str, Any], tmp_path: Path) -> None:
    """Not at every step; it counts among the weights, as the table of which only rows are looked up does not."""
    folder = save_decoder("llama", tmp_path, tied=True, dtype=torch.bfloat16)
    config = ModelConfig(name=str(folder), dtype="float32", device="cpu", **settings)
    loaded = load_model(config, AdapterConfig(), 2, 0, task="language_model")
    base: Any = loaded.model.get_base_model()
    table, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    assert (table.dtype, head.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(table.float(), head)
    counted = [
        count_weights(base.config, "nf4", torch.float32, 2, task=task).touched
        for task in ("language_model", "prompted")
    ]
    assert counted[0] - counted[1] == head.nbytes


def test_scores() -> None:
    """Perplexity weighs tokens alike; the loss weighs rows alike."""
    examples = tokenize_texts(ROWS, DATA.model_copy(update={"text_columns": ("text", "answer")}), TASK, ENDED)
    config = build("llama", task="language_model").config
    config.vocab_size = len(ENDED)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config).eval()
    rows = [0, 1, 0]
    evaluation = LanguageModel(ENDED, torch.device("cpu")).evaluate(model, examples, rows, batch_size=2)
    means, total, right, count = [], 0.0, 0, 0
    for row in rows:
        ids, begin = torch.tensor([examples.encodings[row]["input_ids"]]), int(examples.labels[row])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, begin - 1 : -1]
        losses = nn.functional.cross_entropy(logits, ids[0, begin:], reduction="none")
        means.append(float(losses.mean()))
        total, count = total + float(losses.sum()), count + len(losses)
        right += int((logits.argmax(-1) == ids[0, begin:]).sum())
    assert evaluation.num_examples == 3
    assert evaluation.loss == pytest.approx(sum(means) / 3, rel=1e-5)
    assert list(evaluation.metrics) == ["perplexity", "token_accuracy"]
    assert evaluation.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert evaluation.metrics["token_accuracy"] == right / count


def test_changed_logits_are_refused() -> None:
    small = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    config = Gemma2Config(**small, intermediate_size=16, num_key_value_heads=1, final_logit_softcapping=30.0)
    config.initializer_range = 1.0  # logits large enough for the cap to show
    with pytest.raises(ModelError, match="this one changes its logits after its head"):
        require_bare_logits(AutoModelForCausalLM.from_config(config), "this one")
    config.final_logit_softcapping = None
    require_bare_logits(AutoModelForCausalLM.from_config(config), "this one")


def test_nothing_to_write_is_an_error() -> None:
    batch = padded_batch()
    with pytest.raises(ValueError, match="no token carries a label"):
        row_losses(
            build("llama", task="language_model"),
            {k: batch[k] for k in ("input_ids", "attention_mask")},
            torch.full_like(batch["input_ids"], IGNORED),
        )
