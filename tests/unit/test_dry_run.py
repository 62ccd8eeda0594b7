"""Predictions against the meter: every family, every estimator, dense and packed, with chunks and without."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from families import DECODERS, FAMILIES
from spryfl.config import AdapterConfig
from spryfl.forward_mode.attention import ATTENTION_NAME, register_attention
from spryfl.forward_mode.budget import DEFAULT_CHUNK_BYTES, chunks_of
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.estimator import GradientEstimator
from spryfl.gradients.forward import ForwardGradient
from spryfl.memory.meter import ActivationMeter
from spryfl.memory.plan import PassCost
from spryfl.models.adapters import adapter_config, add_adapter
from spryfl.models.dry_run import DryRun, PackedLinear, Work, pack
from spryfl.models.heads import head_modules
from spryfl.models.layers import layer_calls
from spryfl.models.lean import make_lean
from spryfl.models.units import parameters_of, trainable_units

BATCH, TOKENS, LAYERS = 4, 48, 5
SMALL_CHUNKS = 96 * 2**10
RANK = AdapterConfig(rank=2)
DRAW = DirectionStream(0, 1, 0).at_step(0)


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

    def __init__(self, config: PreTrainedConfig, packed: bool = False, padded: bool = False) -> None:
        register_attention()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = AutoModelForSequenceClassification.from_config(config, attn_implementation=ATTENTION_NAME)
            self.model = add_adapter(base, adapter_config(RANK, base, head_modules(base, ()))).eval()
        if packed:
            pack(self.model)
        make_lean(self.model, {PackedLinear: lambda module, dtype: PackedLinear.unpack(module, dtype).zero_()})
        self.names = parameters_of(trainable_units(self.model))
        self.ids = torch.ones((BATCH, TOKENS), dtype=torch.long)
        self.mask = torch.ones_like(self.ids)
        if padded:
            self.mask[1, TOKENS // 2 :] = 0

    def loss(self, model: nn.Module) -> Tensor:
        logits = model(input_ids=self.ids, attention_mask=self.mask).logits
        return nn.functional.cross_entropy(logits.float(), torch.zeros(BATCH, dtype=torch.long))

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
    "inference": (lambda: None, lambda dry, chunks: dry.inference(chunk_bytes=chunks)),
    "forward": (ForwardGradient, lambda dry, chunks: dry.forward(1, chunk_bytes=chunks)),
    "forward, 3 tangents": (lambda: ForwardGradient(3), lambda dry, chunks: dry.forward(3, chunk_bytes=chunks)),
    "backprop": (Backprop, lambda dry, chunks: dry.backprop(False, chunk_bytes=chunks)),
    "checkpointed": (
        lambda: Backprop("per_layer", layer_calls),
        lambda dry, chunks: dry.backprop(True, chunk_bytes=chunks),
    ),
}


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_within_15_percent_of_the_meter(family: str, packed: bool) -> None:
    config = config_of(family)
    real, dry = Real(config, packed), DryRun(Work(config, RANK, BATCH, TOKENS, packed=packed))
    wrong = {}
    for name, (estimator, predicted) in ESTIMATORS.items():
        for chunks in (DEFAULT_CHUNK_BYTES, SMALL_CHUNKS):
            measured, said = real.peak(estimator(), chunks), predicted(dry, chunks).peak_at(LAYERS)
            print(f"{family} {name} {chunks}: {measured:,} {said:,} {said / measured:.3f}")
            if said != pytest.approx(measured, rel=0.15):
                wrong[name, chunks] = (said, measured, said / measured)
    assert not wrong
