"""The meter against PyTorch's own record of allocations; the check for unsupported modules."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    XLNetConfig,
)

from families import FAMILIES, batch_loss, build, padded_batch, trainable
from spryfl.config import TaskKind
from spryfl.errors import ModelError, UnsupportedModuleError
from spryfl.forward_mode.attention import register_attention
from spryfl.forward_mode.support import check_support, require_support
from spryfl.gradients.forward import loss_and_slopes
from spryfl.memory.meter import ActivationMeter
from spryfl.models.classes import require_class
from spryfl.models.skeleton import hollow_model


def test_meter_by_hand() -> None:
    outside = torch.zeros(1000)
    with ActivationMeter() as meter:
        a = outside + 1  # 4,000 bytes
        b = a * 2  # 8,000
        view = b[:10]
        del b
        assert meter.live_bytes == 8000  # the view keeps it
        del view
        assert meter.live_bytes == 4000
        del a
    assert meter.live_bytes == 0
    assert meter.peak_bytes == 8000


@pytest.mark.parametrize("pass_name", ["inference", "forward mode", "backprop"])
def test_meter_agrees_with_the_allocator(pass_name: str) -> None:
    """Within 10 % of the peak in PyTorch's profile of every allocation, scratch space included."""
    model, loss = build("bert").float(), batch_loss(padded_batch(8, 30))
    names = trainable(model)
    tangents = {name: torch.ones_like(model.get_parameter(name)).unsqueeze(0) for name in names}

    def run() -> None:
        if pass_name == "forward mode":
            loss_and_slopes(model, loss, tangents)
        else:
            with torch.set_grad_enabled(pass_name == "backprop"):
                value = loss(model)
            if pass_name == "backprop":
                torch.autograd.grad(value, [model.get_parameter(name) for name in names])

    run()
    with ActivationMeter() as meter:
        run()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    live = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert meter.peak_bytes == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families(family: str) -> None:
    register_attention()
    report = check_support(hollow_model(FAMILIES[family]()))
    assert report.problems == ()
    assert report.num_modules > 10


def test_a_model_of_any_size_takes_next_to_no_memory() -> None:
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, intermediate_size=11008, pad_token_id=0)
    model = hollow_model(config)
    assert sum(p.numel() for p in model.parameters()) > 6e9
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) < 1e4


class Opaque(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(super().forward(x).numpy() * 2)


class Detached(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


def test_all_problems_at_once_each_with_a_remedy() -> None:
    register_attention()
    model = hollow_model(
        BertConfig(
            **{
                "vocab_size": 20,
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 8,
            }
        )
    )
    layers = model.bert.encoder.layer
    layers[0].attention.output.dense = Opaque(16, 16)
    layers[1].intermediate.dense = Opaque(16, 8)
    layers[1].output.LayerNorm = Detached(16)
    problems = {problem.module: problem for problem in check_support(model).problems}
    assert set(problems) == {
        "bert.encoder.layer.0.attention.output.dense",
        "bert.encoder.layer.1.intermediate.dense",
        "bert.encoder.layer.1.output.LayerNorm",
    }
    assert problems["bert.encoder.layer.1.output.LayerNorm"].kind == "Detached"
    assert "NumPy" in problems["bert.encoder.layer.0.attention.output.dense"].remedy
    assert all(problem.remedy and problem.reason for problem in problems.values())
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(UnsupportedModuleError, match="tiny: 3 modules are not supported"):
        require_support(model, "tiny")


def test_attention_that_no_method_trains_is_named_alone() -> None:
    """It fails without tangents too, so the layers around it are not to blame."""
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    config = Gemma2Config(**small, intermediate_size=16, num_key_value_heads=1, pad_token_id=0)
    (problem,) = check_support(hollow_model(config)).problems
    assert (problem.module, problem.kind) == ("model.layers.0.self_attn", "Gemma2Attention")
    assert "no method here trains attention with softcap" in problem.reason


@pytest.mark.parametrize("task", ["classification", "qa"])
def test_a_model_that_transformers_has_no_class_of_is_refused(task: TaskKind) -> None:
    require_class(LlamaConfig(), "llama", task)
    with pytest.raises(
        ModelError, match=r"transformers has no AutoModelFor\w+ for folder, a mamba model: take another"
    ):
        require_class(MambaConfig(), "folder", task)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (XLNetConfig(), "xlnet puts tokens before the batch"),
        (BloomConfig(), "bloom puts the batch and heads into one dimension"),
        (FalconConfig(alibi=True), "falcon puts the batch and heads into one dimension"),
    ],
)
def test_a_model_that_cannot_run_some_rows_at_a_time_is_refused(config: PreTrainedConfig, reason: str) -> None:
    """Its layers would mix texts, or fail once a batch is too large for a chunk."""
    with pytest.raises(ModelError, match=reason):
        require_class(config, "folder", "classification")
    require_class(FalconConfig(), "falcon", "classification")


def test_checking_an_adapted_model_leaves_its_operators() -> None:
    model = build("llama").float()
    own = {path: vars(module)["forward"] for path, module in model.named_modules() if "forward" in vars(module)}
    assert own
    require_support(model, "llama")
    assert own == {path: vars(m)["forward"] for path, m in model.named_modules() if "forward" in vars(m)}
