"""Predictions against the meter: every family, every estimator, dense and packed, with chunks and without."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from families import DECODERS, FAMILIES
from spryfl.config import AdapterConfig, TaskKind
from spryfl.forward_mode import packed
from spryfl.forward_mode.attention import ATTENTION_NAME, register_attention
from spryfl.forward_mode.budget import DEFAULT_CHUNK_BYTES, chunks_of, dry_run, each
from spryfl.forward_mode.loss import row_losses
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.estimator import GradientEstimator
from spryfl.gradients.forward import ForwardGradient
from spryfl.gradients.guided import GuidedGradient
from spryfl.gradients.zeroth_order import ZerothOrder
from spryfl.memory.meter import ActivationMeter
from spryfl.memory.plan import PassCost
from spryfl.models.adapters import adapt
from spryfl.models.classes import MODEL_CLASSES
from spryfl.models.dry_run import DryRun, HollowModel, PackedLinear, Work, pack, shallower
from spryfl.models.heads import head_modules
from spryfl.models.layers import layer_calls
from spryfl.models.lean import make_lean
from spryfl.models.units import parameters_of, trainable_units

BATCH, TOKENS, LAYERS = 4, 32, 5
SMALL_CHUNKS = 160 * 2**10
RANK = AdapterConfig(rank=2)
DRAW = DirectionStream(0, 1, 0).at_step(0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads on operators as small as these spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(family: str) -> PreTrainedConfig:
    """Wide enough that activations matter, five layers, so that the dry run extrapolates from two and three."""
    config = type(FAMILIES[family]())
    sizes = {"vocab_size": 90, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0, "use_cache": False}
    if family == "distilbert":
        return config(**sizes, dim=64, n_layers=LAYERS, n_heads=4, hidden_dim=192)
    sizes |= {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    if family == "opt":
        return config(**sizes, ffn_dim=192, word_embed_proj_dim=64)
    if family in DECODERS:
        sizes |= {"num_key_value_heads": 2}
    if family in ("gemma", "qwen3"):
        sizes |= {"head_dim": 16}
    more = {"albert": {"embedding_size": 32}, "mistral": {"sliding_window": 16}}.get(family, {})
    return config(**sizes, intermediate_size=192, **more)


class Real:
    """The same model with weights, and a batch."""

    def __init__(
        self,
        config: PreTrainedConfig,
        packed: bool = False,
        padded: bool = False,
        task: TaskKind = "classification",
    ) -> None:
        register_attention()
        self.task = task
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = MODEL_CLASSES[task].auto.from_config(config, attn_implementation=ATTENTION_NAME)
            self.model = adapt(base, RANK, head_modules(base, (), task), task).eval()
        if packed:
            pack(self.model)
        make_lean(self.model, {PackedLinear: lambda module, rows, out: out.zero_()})
        self.names = parameters_of(trainable_units(self.model))
        self.ids = torch.ones((BATCH, TOKENS), dtype=torch.long)
        self.mask = torch.ones_like(self.ids)
        if padded:
            self.mask[1, TOKENS // 2 :] = 0

    def loss(self, model: nn.Module) -> Tensor:
        inputs, labels = {"input_ids": self.ids, "attention_mask": self.mask}, torch.zeros(BATCH, dtype=torch.long)
        if self.task == "language_model":
            return row_losses(model, inputs, self.ids).mean()
        output = model(**inputs)
        logits = [output.start_logits, output.end_logits] if self.task == "qa" else [output.logits]
        return sum((nn.functional.cross_entropy(own.float(), labels) for own in logits), start=torch.zeros(()))

    def peak(self, estimator: GradientEstimator | None, chunk_bytes: int) -> int:
        def run() -> None:
            with chunks_of(chunk_bytes):
                if estimator is None:
                    with torch.inference_mode():
                        self.loss(self.model)
                else:
                    estimator.estimate(self.model, self.loss, self.names, DRAW, BATCH)

        with ActivationMeter() as meter:
            run()
        return meter.peak_bytes


ESTIMATORS: dict[str, tuple[Callable[[], GradientEstimator | None], Callable[[DryRun, int], PassCost]]] = {
    "inference": (lambda: None, lambda dry, chunks: dry.inference(chunks)),
    "forward": (ForwardGradient, lambda dry, chunks: dry.forward(1, chunks)),
    "forward, 3 tangents": (lambda: ForwardGradient(3), lambda dry, chunks: dry.forward(3, chunks)),
    "zeroth order": (ZerothOrder, lambda dry, chunks: dry.inference(chunks)),
    "backprop": (Backprop, lambda dry, chunks: dry.backprop(False, chunks)),
    "checkpointed": (lambda: Backprop("per_layer", layer_calls), lambda dry, chunks: dry.backprop(True, chunks)),
    "guided": (lambda: GuidedGradient(layer_calls, slopes_per="none"), lambda dry, chunks: dry.guided(False, chunks)),
    "guided, horizon 2": (
        lambda: GuidedGradient(layer_calls, horizon=2, slopes_per="none"),
        lambda dry, chunks: dry.guided(True, chunks),
    ),
}
CHUNKED = ("forward", "checkpointed", "guided")


def misses(
    config: PreTrainedConfig, packed: bool, cases: list[tuple[str, int]], task: TaskKind = "classification"
) -> dict[tuple[str, int], float]:
    """Predicted over measured, wherever they differ by more than 15 %."""
    real, dry = Real(config, packed, task=task), DryRun(Work(config, RANK, BATCH, TOKENS, packed=packed, task=task))
    ratios = {}
    for name, chunks in cases:
        estimator, predicted = ESTIMATORS[name]
        ratios[name, chunks] = predicted(dry, chunks).peak_at(LAYERS) / real.peak(estimator(), chunks)
    return {case: ratio for case, ratio in ratios.items() if abs(ratio - 1) > 0.15}


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_within_15_percent_of_the_meter(family: str) -> None:
    """Extrapolated from two and three layers to five, for every estimator; in small chunks, too."""
    cases = [*((name, DEFAULT_CHUNK_BYTES) for name in ESTIMATORS), *((name, SMALL_CHUNKS) for name in CHUNKED)]
    assert not misses(config_of(family), False, cases)


@pytest.mark.parametrize(("task", "family"), [("qa", "bert"), ("language_model", "llama")])
def test_predictions_with_other_losses(task: TaskKind, family: str) -> None:
    """A vocabulary wide enough that its logits are what the peak is made of, unless they come in chunks."""
    config = config_of(family)
    config.vocab_size, config.num_labels = 4000, 2
    cases = [(name, chunks) for name in CHUNKED for chunks in (DEFAULT_CHUNK_BYTES, SMALL_CHUNKS)]
    assert not misses(config, False, cases, task)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("enough", [packed.ENOUGH_VECTORS, 32], ids=["few chunks", "many chunks"])
def test_packed_weights_too(family: str, enough: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "ENOUGH_VECTORS", enough)
    assert not misses(config_of(family), True, [(name, SMALL_CHUNKS) for name in (*CHUNKED, "inference")])


@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
@pytest.mark.parametrize("below", [1, 3])
def test_units_of_the_upper_layers(family: str, below: int) -> None:
    """Where BERT holds its embeddings' output, forward mode takes a hidden state more than from the first layer on."""
    config = config_of(family)
    real, dry = Real(config), DryRun(Work(config, RANK, BATCH, TOKENS))
    lower = {p for layer in layer_calls(real.model)[:below] for p in layer.parameters()}
    real.names = tuple(name for name in real.names if real.model.get_parameter(name) not in lower)
    trained = LAYERS - below
    said = {
        "forward": dry.forward(1, SMALL_CHUNKS, upper=True).peak_at(LAYERS),
        "backprop": dry.backprop(False, SMALL_CHUNKS, upper=True).peak_at(trained + 1),
        "checkpointed": dry.backprop(True, SMALL_CHUNKS, upper=True).peak_at(trained + 1),
        "guided": dry.guided(False, SMALL_CHUNKS, upper=True).peak_at(trained + 1),
    }
    assert family != "bert" or said["forward"] > dry.forward(1, SMALL_CHUNKS).peak_at(LAYERS)
    for name, predicted in said.items():
        assert predicted == pytest.approx(real.peak(ESTIMATORS[name][0](), SMALL_CHUNKS), rel=0.15), name


@pytest.mark.parametrize("family", ["bert", "llama", "mistral"])
def test_padding_changes_little(family: str) -> None:
    """A dry run has no padding; a batch that has some stays within 15 %."""
    config = config_of(family)
    real, dry = Real(config, padded=True), DryRun(Work(config, RANK, BATCH, TOKENS))
    for name in ("forward", "checkpointed", "inference"):
        estimator, predicted = ESTIMATORS[name]
        said = predicted(dry, DEFAULT_CHUNK_BYTES).peak_at(LAYERS)
        assert said == pytest.approx(real.peak(estimator(), DEFAULT_CHUNK_BYTES), rel=0.15)


@pytest.mark.parametrize("kept", [1, 3])
def test_backprop_within_a_budget(kept: int) -> None:
    """Each layer input that is not kept takes its bytes off what checkpointing per layer takes."""
    config = config_of("llama")
    real, dry = Real(config), DryRun(Work(config, RANK, BATCH, TOKENS))
    state = dry.work.state_bytes
    said = dry.backprop(True).peak_at(LAYERS) - (LAYERS - kept) * state
    measured = real.peak(Backprop("budgeted", layer_calls, kept * state), DEFAULT_CHUNK_BYTES)
    assert said == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("family", ["opt", "qwen3"])
def test_operations_and_peaks_are_linear_in_depth(family: str) -> None:
    """What two and three layers tell of seven is what seven tell of themselves."""
    work = Work(shallower(config_of(family), 7), RANK, BATCH, TOKENS)
    shallow, deep = DryRun(work), DryRun(work)
    deep.models = {7: HollowModel(work, 7)}
    for predict in (
        lambda dry: dry.inference(SMALL_CHUNKS),
        lambda dry: dry.forward(2, SMALL_CHUNKS),
        lambda dry: dry.backprop(False, SMALL_CHUNKS),
        lambda dry: dry.backprop(True, SMALL_CHUNKS),
    ):
        ours, theirs = predict(shallow), predict(deep)
        assert ours.peak_at(7) == pytest.approx(theirs.peak_bytes, rel=0.02)
        assert ours.flops_at(7) == theirs.flops
    assert shallow.adapter == deep.adapter


def test_each_tangent_costs_a_little_more_than_inference() -> None:
    """1 + K of the linear maps' operations; attention has two more products a tangent."""
    dry = DryRun(Work(config_of("bert"), RANK, BATCH, TOKENS))
    basis = dry.inference().flops_at(LAYERS)
    times = [dry.forward(k).flops_at(LAYERS) / basis for k in (1, 2, 3)]
    assert 2 < times[0] < 2.5
    assert 1 < times[1] - times[0] < 1.5
    assert times[2] - times[1] == pytest.approx(times[1] - times[0])
    assert 2.8 < dry.backprop(True).flops_at(LAYERS) / basis < 3.1


def test_a_dry_run_leaves_out_only_chunks_like_others() -> None:
    assert list(each(range(7))) == list(range(7))
    with dry_run():
        assert list(each(range(7))) == [0, 1, 6]
        assert list(each(range(2))) == [0, 1]
    assert list(each(range(7))) == list(range(7))
