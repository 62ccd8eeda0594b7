"""Our operators against the obvious ones: PyTorch's own derivatives, in float64."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from spryfl.forward_mode.attention import attention_jvp
from spryfl.forward_mode.feed_forward import chunk_feed_forward
from spryfl.forward_mode.operators import use_lean_operators


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = scaling * q @ k.transpose(-1, -2)
    if causal:
        scores = scores.masked_fill(~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2)


MASKS = {
    "none": None,
    "padding": torch.tensor([[1] * 7, [1] * 4 + [0] * 3], dtype=torch.bool)[:, None, None, :],
    "full": (torch.arange(7)[None, :] <= torch.arange(7)[:, None])[None, None].expand(2, 1, 7, 7),
    "added": normal(1, 1, 7, 7, seed=9),
}


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("block_bytes", [1, 2000, 10**9])
@pytest.mark.parametrize("mask", [*MASKS, "causal"])
def test_attention_jvp(key_heads: int, block_bytes: int, mask: str) -> None:
    primals = tuple(normal(2, heads, 7, 5, seed=i) for i, heads in enumerate((4, key_heads, key_heads)))
    tangents = tuple(normal(*p.shape, seed=10 + i) for i, p in enumerate(primals))
    causal, given = mask == "causal", MASKS.get(mask)
    for present in itertools.product((True, False), repeat=3):
        if not any(present):
            continue
        expected, expected_tangent = torch.func.jvp(
            lambda q, k, v: plain_attention(q, k, v, given, causal, 0.4),
            primals,
            tuple(t if there else torch.zeros_like(t) for t, there in zip(tangents, present, strict=True)),
        )
        output, tangent = attention_jvp(
            primals,
            tuple(t if there else None for t, there in zip(tangents, present, strict=True)),
            mask=given,
            causal=causal,
            scaling=0.4,
            block_bytes=block_bytes,
        )
        assert torch.allclose(output, expected, atol=1e-12)
        assert torch.allclose(tangent, expected_tangent, atol=1e-12)


def test_attention_rows_that_attend_to_nothing_stay_finite() -> None:
    q = normal(1, 1, 3, 4)
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    output, tangent = attention_jvp((q, q, q), (q, q, q), mask=mask, causal=False, scaling=1.0)
    assert output.isfinite().all()
    assert tangent.isfinite().all()


@pytest.mark.parametrize(
    "module",
    [nn.Linear(6, 5), nn.Linear(6, 5, bias=False), nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False)],
    ids=repr,
)
def test_lean_operator(module: nn.Module) -> None:
    module = module.double()
    x, v = normal(2, 3, 6), normal(2, 3, 6, seed=1)
    with torch.no_grad():
        expected, expected_tangent = torch.func.jvp(module, (x,), (v,))
        use_lean_operators(module)
        with forward_ad.dual_level():
            output, tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, v)))
    assert torch.allclose(output, expected, atol=1e-12)
    assert torch.allclose(tangent, expected_tangent, atol=1e-12)


@pytest.mark.parametrize("with_input_tangent", [True, False])
@pytest.mark.parametrize("parameters", [("weight",), ("bias",), ("weight", "bias")])
def test_lean_linear_with_perturbed_parameters(with_input_tangent: bool, parameters: tuple[str, ...]) -> None:
    module = nn.Linear(6, 5).double().requires_grad_(False)
    use_lean_operators(module)
    x, v = normal(2, 6), normal(2, 6, seed=1)
    tangents = {name: normal(*module.get_parameter(name).shape, seed=3) for name in parameters}
    expected = (v @ module.weight.T if with_input_tangent else 0) + (
        x @ tangents["weight"].T if "weight" in tangents else 0
    )
    expected = expected + tangents.get("bias", 0) + torch.zeros(2, 5, dtype=torch.float64)
    with torch.no_grad(), forward_ad.dual_level():
        for name, tangent in tangents.items():
            module._parameters[name] = forward_ad.make_dual(module._parameters[name].detach(), tangent)
        tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, v) if with_input_tangent else x)).tangent
    assert torch.allclose(tangent, expected, atol=1e-12)


def test_chunks_need_no_linear_module() -> None:
    """GPT-2's feed-forward is made of Conv1D, which has no out_features."""
    module = GPT2MLP(16, GPT2Config(n_embd=4)).double().eval().requires_grad_(False)
    x = normal(3, 5, 4)
    expected = module(x)
    chunk_feed_forward(module, chunk_bytes=2 * 16 * 8 * 4)
    with torch.no_grad():
        assert torch.allclose(module(x), expected, atol=1e-12)


def test_chunks_change_no_result() -> None:
    class TinyMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 4)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.down(self.up(hidden).tanh())

    module = TinyMLP().double().requires_grad_(False)
    x, v = normal(3, 5, 4), normal(3, 5, 4, seed=1)
    calls = []
    handle = module.up.register_forward_hook(lambda m, args, output: calls.append(args[0].shape[0]))
    expected, expected_tangent = torch.func.jvp(module, (x,), (v,))
    calls.clear()
    chunk_feed_forward(module, chunk_bytes=2 * 16 * 8 * 4)  # four tokens
    with torch.no_grad(), forward_ad.dual_level():
        output, tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, v)))
    handle.remove()
    assert calls == [4, 4, 4, 3]
    assert torch.allclose(output, expected, atol=1e-12)
    assert torch.allclose(tangent, expected_tangent, atol=1e-12)
