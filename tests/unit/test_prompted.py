"""Templates, truncation, label words; the loss on the label word: padding, slopes and gradients in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Cohere2Config, Gemma2Config

import families
from families import DECODERS, FAMILIES, autograd_gradient, build, trainable
from prompted import TEMPLATE, WORDS, byte_tokenizer, left_padded, save_decoder
from spryfl.config import AdapterConfig, DataConfig, ModelConfig, TaskConfig, parse_config
from spryfl.data.classification import tokenize
from spryfl.data.examples import Examples
from spryfl.data.loading import load_rows
from spryfl.data.prompted import (
    PromptedClassification,
    Prompts,
    label_tokens,
    longest_first,
    positions_of,
    tokenize_prompts,
)
from spryfl.errors import ConfigError, DataError, ModelError
from spryfl.forward_mode.next_token import next_token_logits, takes_positions
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.forward import loss_and_slopes
from spryfl.memory.meter import ActivationMeter
from spryfl.models.dry_run import DryRun, Work
from spryfl.models.layers import layer_calls
from spryfl.models.loading import load_model
from spryfl.models.skeleton import skeleton
from spryfl.models.weights import count_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def task_of(template: str = TEMPLATE, words: list[str] = WORDS) -> TaskConfig:
    return TaskConfig(kind="prompted", template=template, label_words=words)


def prompts_of(tokenizer, template: str, texts: list[tuple[str, ...]], max_tokens: int) -> list[str]:
    columns = ("text", "other")[: len(texts[0])]
    rows = Dataset.from_dict({c: [t[i] for t in texts] for i, c in enumerate(columns)} | {"label": [0] * len(texts)})
    data = DataConfig(text_columns=columns, max_tokens=max_tokens)
    examples = tokenize_prompts(rows, data, task_of(template), tokenizer)
    assert all(len(e["input_ids"]) <= max_tokens for e in examples.encodings)
    return [tokenizer.decode(e["input_ids"]) for e in examples.encodings]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "prompted"}, "needs a template and label_words"),
        ({"kind": "prompted", "template": "{text}:"}, "needs a template and label_words"),
        ({"template": "{text}:"}, "template belongs to kind = 'prompted'"),
        ({"kind": "prompt"}, "task.kind"),
        ({"kind": "prompted", "template": "{txt}:", "label_words": WORDS}, "'{txt}' is not among data.text_columns"),
        ({"kind": "prompted", "template": "{txt}:", "label_words": WORDS}, "Did you mean 'text'?"),
        ({"kind": "prompted", "template": "no field", "label_words": WORDS}, "has no {text}"),
        ({"kind": "prompted", "template": "{text", "label_words": WORDS}, "a brace that is no column is doubled"),
        ({"kind": "prompted", "template": "{text!r}", "label_words": WORDS}, "write the column alone"),
        ({"kind": "prompted", "template": "{}", "label_words": WORDS}, "'{}' is not among"),
    ],
)
def test_mistakes(task: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"task": task})
    assert message in str(caught.value)


def test_empty_texts_are_named(tokenizer, tmp_path: Path) -> None:
    rows = [{"text": "good", "label": 0}, {"text": " ", "label": 1}] * 3
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(name=str(tmp_path))
    with pytest.raises(DataError, match="train row 1: its prompt is empty: drop the row"):
        load_rows(data, 0, task_of("{text}"))
    assert load_rows(data, 0, task_of("{text}:")).num_labels == 2
    texts = Dataset.from_list([{"text": "good", "label": 0}, {"text": "", "label": 1}])
    with pytest.raises(DataError, match="1 of 2 rows are empty, and this model's tokenizer makes no token of them"):
        tokenize(texts, DataConfig(), tokenizer)


def test_a_template_is_rendered_literally(tokenizer) -> None:
    """Braces are doubled in the template; those of a text are text."""
    task = task_of("{{a}} {text} | {other} = {text}?")
    assert Prompts(task, ("text", "other"), tokenizer).render(["{x}", "{0}"]) == "{a} {x} | {0} = {x}?"


def test_only_texts_are_cut(tokenizer) -> None:
    long, short = "the film is good " * 20, "a plot"
    (whole, cut) = prompts_of(tokenizer, TEMPLATE, [(short,), (long,)], 24)
    assert whole == "Review: a plot\nSentiment:"
    assert cut.startswith("Review: the film is good")
    assert cut.endswith("\nSentiment:")
    assert len(tokenizer(cut)["input_ids"]) >= 23  # what fits is kept
    (pair,) = prompts_of(tokenizer, "{text} | {other}\nSentiment:", [(short, long)], 24)
    assert pair.startswith("a plot | the film")
    assert pair.endswith("\nSentiment:")
    alone = len(tokenizer("Review: \nSentiment:")["input_ids"])
    with pytest.raises(DataError, match=rf"template alone takes {alone} tokens"):
        prompts_of(tokenizer, TEMPLATE, [(short,)], alone)
    (least,) = prompts_of(tokenizer, TEMPLATE, [(long,)], alone + 1)
    assert least.endswith("\nSentiment:")
    with pytest.raises(DataError, match="reads at most 64"):
        prompts_of(tokenizer, TEMPLATE, [(short,)], 65)


def test_cut_prompts_are_counted(tokenizer) -> None:
    rows = Dataset.from_dict({"text": ["a plot", "the film is good " * 20], "label": [0, 0]})
    assert tokenize_prompts(rows, DataConfig(max_tokens=24), task_of(), tokenizer).num_truncated == 1


def test_longest_first() -> None:
    assert longest_first([3, 9], 4) == [3, 5]
    assert longest_first([3, 9], 8) == [2, 2]
    assert longest_first([1, 1], 5) == [0, 0]


def test_label_words(tokenizer) -> None:
    data = DataConfig()

    def tokens(words: list[str], template: str = TEMPLATE) -> list[int]:
        return label_tokens(data, task_of(template, words), tokenizer, ["0", "1"])

    assert [tokenizer.decode([token]) for token in tokens(WORDS)] == WORDS
    with pytest.raises(DataError, match=r"' positive!' and ' positive\?' both begin with the token ' positive'"):
        tokens([" positive!", " positive?"])
    with pytest.raises(DataError, match=r"3 words for 2 classes; give one for each of \['0', '1'\]"):
        tokens([*WORDS, " other"])
    with pytest.raises(DataError, match="'' gets no token of its own"):
        tokens(["", " positive"])
    # " positive" is one token, so a template that ends in its space has no such end beside the word.
    with pytest.raises(DataError, match="put the space between them at the word's beginning"):
        tokens(["negative", "positive"], TEMPLATE + " ")


def test_nothing_comes_between_prompt_and_word(tiny_model: Path) -> None:
    """BERT's tokenizer appends [SEP]; and a word outside its vocabulary is refused."""
    bert = AutoTokenizer.from_pretrained(tiny_model)
    prompts = Prompts(task_of("the film is {text}", ["good", "bad"]), ("text",), bert)
    (ids,) = prompts.encode(["the film is good"])
    assert bert.convert_ids_to_tokens(ids) == ["[CLS]", "the", "film", "is", "good"]
    with pytest.raises(DataError, match="no token for ' unheard'"):
        Prompts(task_of("the film is {text}", [" good", " unheard"]), ("text",), bert).words()


# The loss.


def decoder(family: str) -> tuple[nn.Module, PromptedClassification]:
    model = build(family, task="prompted")
    positions = takes_positions(model.get_base_model())
    return model, PromptedClassification(torch.tensor([7, 11, 40]), 0, positions, CPU)


def batch_of(task: PromptedClassification, lengths: tuple[int, ...] = (4, 9, 7)) -> dict[str, Tensor]:
    generator = np.random.Generator(np.random.Philox(key=1))
    encodings = [{"input_ids": generator.integers(3, 50, n).tolist()} for n in lengths]
    return task.batch(Examples(encodings, np.arange(len(lengths)) % 3), range(len(lengths)))


@pytest.mark.parametrize("family", DECODERS)
def test_padding_changes_nothing(family: str) -> None:
    """Rows alone, together, and behind more padding have the logits transformers gives the prompt alone."""
    model, task = decoder(family)
    batch = batch_of(task)
    with torch.no_grad():
        together, padded = task.logits(model, batch), task.logits(model, left_padded(batch, 0))
        for row, length in enumerate((4, 9, 7)):
            ids = batch["input_ids"][row : row + 1, -length:]
            alone = model(input_ids=ids).logits[0, -1, task.words]
            assert torch.allclose(alone, together[row], rtol=0, atol=1e-9)
            assert torch.allclose(alone, padded[row], rtol=0, atol=1e-9)
    assert together.std() > 1e-3


@pytest.mark.parametrize("family", DECODERS)
def test_slopes_and_gradients_are_autograds(family: str) -> None:
    model, task = decoder(family)
    batch, names = batch_of(task), trainable(model)

    def loss(model: nn.Module) -> Tensor:
        return task.losses(model, batch).mean()

    def plain(model: nn.Module) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return nn.functional.cross_entropy(model(**inputs).logits[:, -1, task.words], batch["labels"])

    exact = autograd_gradient(model, plain, names)
    generator = torch.Generator().manual_seed(2)
    tangents = {n: torch.randn((2, *exact[n].shape), generator=generator, dtype=torch.float64) for n in names}
    value, slopes = loss_and_slopes(model, loss, tangents)
    expected = sum((exact[n] * tangents[n]).flatten(1).sum(1) for n in names)
    assert float(value) == pytest.approx(float(plain(model).detach()), abs=1e-10)
    assert torch.allclose(slopes, expected, rtol=0, atol=1e-9)
    for estimator in (Backprop(), Backprop("per_layer", layer_calls)):
        _, found = estimator.loss_and_gradient(model, loss, names)
        for name, gradient in zip(names, found, strict=True):
            assert torch.allclose(exact[name], gradient, rtol=0, atol=1e-10), name
            assert float(gradient.abs().max()) > 0


def test_positions() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert positions_of(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("kind", ["capped", "scaled"])
def test_what_the_model_does_to_its_logits_stays(kind: str) -> None:
    """Gemma 2 caps them, Cohere scales them: the rows of the head go through the same."""
    sizes = {**families.GROUPED, "head_dim": 8}
    config = (
        Gemma2Config(**sizes, final_logit_softcapping=2.0, attn_logit_softcapping=None)
        if kind == "capped"
        else Cohere2Config(**sizes, logit_scale=0.25)
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    nn.init.normal_(model.get_output_embeddings().weight)
    ids, words = torch.tensor([[3, 4, 5]]), torch.tensor([7, 11])
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
        rows = next_token_logits(model, {"input_ids": ids}, words)
        model.get_output_embeddings().forward = None  # never called
        again = next_token_logits(model, {"input_ids": ids}, words)
    assert torch.allclose(whole[:, words], rows, rtol=0, atol=1e-12)
    assert torch.equal(rows, again)


def test_no_logits_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FAMILIES["llama"]()
    config.vocab_size = 100_000
    monkeypatch.setitem(families.FAMILIES, "llama", lambda: config)
    model, task = decoder("llama")
    batch = batch_of(task)
    with ActivationMeter() as meter, torch.no_grad():
        task.losses(model, batch).mean()
    assert meter.peak_bytes < config.vocab_size * 8  # of one token's


def test_an_adapted_head_is_called_whole(tmp_path: Path) -> None:
    folder = save_decoder("llama", tmp_path)
    adapter = AdapterConfig(target_modules=("q_proj", "lm_head"))
    loaded = load_model(ModelConfig(name=str(folder), dtype="float32"), adapter, 2, 0, task="prompted")
    for parameter in loaded.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    ids, words = torch.tensor([[3, 4, 5]]), torch.tensor([7, 11])
    with torch.no_grad():
        whole = loaded.model(input_ids=ids).logits[:, -1]
        assert torch.allclose(whole[:, words], next_token_logits(loaded.model, {"input_ids": ids}, words))


# Models.


def test_encoders_are_refused(tiny_model: Path) -> None:
    for make in (
        lambda config: load_model(config, AdapterConfig(), 2, 0, task="prompted"),
        lambda config: skeleton(config, task="prompted"),
    ):
        with pytest.raises(ModelError, match="is a bert model, no decoder"):
            make(ModelConfig(name=str(tiny_model)))
    with pytest.raises(ModelError, match="is a distilbert model, no decoder"):
        skeleton(ModelConfig(name="shape:distilbert-base"), task="prompted")


@pytest.mark.parametrize(
    "settings", [{}, {"streamed": True}, {"quantization": "nf4"}], ids=["whole", "streamed", "nf4"]
)
def test_a_checkpoint_without_its_head_is_refused(settings: dict[str, object], tmp_path: Path) -> None:
    folder = save_decoder("llama", tmp_path)
    AutoModelForCausalLM.from_pretrained(folder).base_model.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"the checkpoint lacks 1 tensors, such as lm_head.weight"):
        load_model(ModelConfig(name=str(folder), dtype="float32", **settings), AdapterConfig(), 2, 0, task="prompted")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_streamed_and_packed_heads(family: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Nothing but LoRA is trained; streamed layers give the same numbers; the head is never packed."""
    folder = save_decoder(family, tmp_path, tied=tied, dtype=dtype)
    inputs, words = {"input_ids": torch.tensor([[3, 4, 5]])}, torch.tensor([7, 11])
    found = {}
    for name, settings in {
        "whole": {},
        "streamed": {"streamed": True},
        "nf4": {"quantization": "nf4"},
        "int8": {"quantization": "int8"},
    }.items():
        config = ModelConfig(name=str(folder), dtype="float32", device="cpu", **settings)
        loaded = load_model(config, AdapterConfig(), 2, 0, task="prompted")
        assert not any(unit.is_head for unit in loaded.units)
        assert loaded.num_trainable == sum(p.numel() for n, p in loaded.model.named_parameters() if "lora_" in n)
        head, table = loaded.model.get_output_embeddings(), loaded.model.get_input_embeddings()
        assert type(head) is nn.Linear
        assert (head.weight.data_ptr() == table.weight.data_ptr()) == tied
        with torch.inference_mode():
            found[name] = next_token_logits(loaded.model, inputs, words)
            whole = loaded.model(**inputs).logits[:, -1, words]
        assert torch.allclose(whole, found[name], atol=1e-5)
    assert torch.equal(found["whole"], found["streamed"])
    for name in ("nf4", "int8"):
        assert not torch.equal(found["whole"], found[name])
        assert torch.nn.functional.cosine_similarity(found["whole"], found[name]).item() > 0.5


# Predictions.


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_counted_once(tied: bool) -> None:
    config = FAMILIES["llama"]()
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    counted = count_weights(config, "float32", torch.float32, 10, task="prompted")
    assert counted.resident == 4 * sum(p.numel() for p in model.parameters())
    packed = count_weights(config, "nf4", torch.float32, 10, task="prompted")
    assert packed.outside == counted.outside  # embeddings, norm and head are not packed


@pytest.mark.parametrize(("family", "packed"), [("llama", True), ("opt", False)])
def test_dry_runs_agree_with_the_meter(family: str, packed: bool, tmp_path: Path) -> None:
    folder = save_decoder(family, tmp_path)
    settings = ModelConfig(name=str(folder), dtype="float32", device="cpu", quantization="nf4" if packed else "none")
    adapted = load_model(settings, AdapterConfig(), 2, 0, task="prompted")
    task = PromptedClassification(torch.tensor([7, 11]), 0, takes_positions(adapted.model.get_base_model()), CPU)
    examples = Examples([{"input_ids": list(range(3, 35))}] * 4, np.array([0, 1, 0, 1]))
    batch, names = task.batch(examples, range(4)), trainable(adapted.model)
    tangents = {n: torch.ones((1, *adapted.model.get_parameter(n).shape)) for n in names}

    def loss(model: nn.Module) -> Tensor:
        return task.losses(model, batch).mean()

    dry = DryRun(Work(adapted.model.config, AdapterConfig(), 4, 32, packed=packed, task="prompted"))
    assert dry.adapter.head_values == 0
    runs = {
        "forward": (lambda: loss_and_slopes(adapted.model, loss, tangents), dry.forward(1)),
        "backprop": (lambda: Backprop().loss_and_gradient(adapted.model, loss, names), dry.backprop()),
        "per_layer": (
            lambda: Backprop("per_layer", layer_calls).loss_and_gradient(adapted.model, loss, names),
            dry.backprop(True),
        ),
    }
    for name, (run, cost) in runs.items():
        with ActivationMeter() as meter:
            run()
        assert cost.peak_at(2) == pytest.approx(meter.peak_bytes, rel=0.1), name
