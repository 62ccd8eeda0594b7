"""Our operators against the obvious ones: PyTorch's own derivatives, in float64."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from spryfl.forward_mode.attention import attention, attention_forward
from spryfl.forward_mode.budget import ATTENTION_SHARE, FEED_FORWARD_SHARE, chunks_of
from spryfl.forward_mode.dual import make_dual, split
from spryfl.forward_mode.feed_forward import chunk_feed_forward
from spryfl.forward_mode.loss import head_cross_entropy
from spryfl.forward_mode.operators import linear, use_lean_operators
from spryfl.forward_mode.rows import chunk_layers
from spryfl.memory.meter import ActivationMeter


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


def jvps(function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """The obvious way: PyTorch's forward mode once for each of K tangents; (1 + K, ..), the primal first."""
    found = [torch.func.jvp(function, primals, each) for each in zip(*tangents, strict=True)]
    return torch.stack([found[0][0], *(tangent for _, tangent in found)])


K = 3


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("block_bytes", [1, 2000, 10**9])
@pytest.mark.parametrize("mask", [*MASKS, "causal", "causal and padding"])
def test_attention(key_heads: int, block_bytes: int, mask: str) -> None:
    primals = tuple(normal(2, heads, 7, 5, seed=i) for i, heads in enumerate((4, key_heads, key_heads)))
    tangents = tuple(normal(K, *p.shape, seed=10 + i) for i, p in enumerate(primals))
    causal, given = "causal" in mask, MASKS.get(mask.removeprefix("causal and "))
    for present in itertools.product((True, False), repeat=3):
        if not any(present):
            continue
        expected = jvps(
            lambda q, k, v: plain_attention(q, k, v, given, causal, 0.4),
            primals,
            tuple(t if there else torch.zeros_like(t) for t, there in zip(tangents, present, strict=True)),
        )
        duals = (make_dual(p, t) if there else p for p, t, there in zip(primals, tangents, present, strict=True))
        with chunks_of(block_bytes * ATTENTION_SHARE):
            output = attention(*duals, mask=given, causal=causal, scaling=0.4)
        assert torch.allclose(output.stacked, expected, atol=1e-12)


def test_attention_rows_that_attend_to_nothing_stay_finite() -> None:
    q = make_dual(normal(1, 1, 3, 4), normal(K, 1, 1, 3, 4))
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    assert attention(q, q, q, mask=mask, causal=False, scaling=1.0).stacked.isfinite().all()


@pytest.mark.parametrize(
    "module",
    [nn.Linear(6, 5), nn.Linear(6, 5, bias=False), nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False)],
    ids=repr,
)
def test_lean_operator(module: nn.Module) -> None:
    module = module.double()
    x, v = normal(2, 3, 6), normal(K, 2, 3, 6, seed=1)
    with torch.no_grad():
        expected = jvps(module, (x,), (v,))
        use_lean_operators(module)
        output = module(make_dual(x, v))
    assert torch.allclose(output.stacked, expected, atol=1e-12)


@pytest.mark.parametrize("norm", [LlamaRMSNorm, GemmaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_rms_norm(norm: type[nn.Module], dtype: torch.dtype) -> None:
    """Against transformers' own, which computes in float32; the primal bitwise."""
    module = norm(6)
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(5))
    module = module.to(dtype).requires_grad_(False)
    x, v = normal(2, 3, 6).to(dtype), normal(K, 2, 3, 6, seed=1).to(dtype)
    expected, plain = jvps(module, (x,), (v,)), module(x)
    use_lean_operators(module)
    stacked = module(make_dual(x, v)).stacked
    tolerance = {"atol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    assert torch.equal(stacked[0], plain)
    assert torch.allclose(stacked.float(), expected.float(), **tolerance)


@pytest.mark.parametrize("with_input_tangent", [True, False])
@pytest.mark.parametrize("parameters", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_perturbed_parameters(kind: type[nn.Module], with_input_tangent: bool, parameters: tuple[str, ...]) -> None:
    module = (nn.Linear(6, 5) if kind is nn.Linear else nn.LayerNorm(6)).double().requires_grad_(False)
    x, v = normal(2, 6), normal(K, 2, 6, seed=1) * with_input_tangent
    values = tuple(module.get_parameter(name) for name in parameters)
    tangents = tuple(normal(K, *value.shape, seed=3) for value in values)

    def of(x: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, given, strict=True)), (x,))

    expected = jvps(of, (x, *values), (v, *tangents))
    use_lean_operators(module)
    for name, value, tangent in zip(parameters, values, tangents, strict=True):
        module._parameters[name] = make_dual(value, tangent)
    output = module(make_dual(x, v) if with_input_tangent else x)
    assert torch.allclose(output.stacked, expected, atol=1e-12)


def composite(x: Tensor) -> Tensor:
    """Operators with rules and without, views, both kinds of products, in-place sums."""
    turned = torch.cat((-x[..., 3:], x[..., :3]), -1).view(2, -1, 2, 3).transpose(1, 2)
    mixed = (turned * x.view(2, -1, 2, 3).permute(0, 2, 1, 3)).transpose(1, 2).reshape(2, -1, 6)
    mixed = mixed / 2.0 + x.unsqueeze(1).expand(2, 1, 4, 6).squeeze(1) - 0.5 * torch.ones(6, dtype=x.dtype)
    mixed = mixed @ torch.ones(6, 6, dtype=x.dtype).tril() + torch.bmm(x, x.transpose(1, 2)) @ x
    mixed += nn.functional.softplus(x)  # no rule of ours
    wide = nn.functional.gelu(mixed, approximate="tanh") + nn.functional.silu(mixed) * torch.tanh(mixed)
    wide = torch.relu(wide).pow(2).mean(-1, keepdim=True) * torch.sigmoid(mixed) + wide.exp().clamp(max=2.0)
    wide = wide + torch.rsqrt(1.0 + mixed.pow(2)) + 1.5 - torch.softmax(mixed, -1)
    picked = wide[torch.arange(2), torch.tensor([1, 3])]
    first, second = picked.split(3, dim=-1)
    return nn.functional.cross_entropy(first - second, torch.tensor([0, 2])) + picked.sum() + first.mean()


def test_rules_of_operators() -> None:
    x, v = normal(2, 4, 6), normal(K, 2, 4, 6, seed=1)
    output, tangents = split(composite(make_dual(x, v)))
    expected = jvps(composite, (x,), (v,))
    assert torch.allclose(torch.stack([output, *tangents]), expected, atol=1e-10)


def test_indices_keep_the_axis_of_tangents_first() -> None:
    x, rows, columns = normal(2, 3, 4), torch.tensor([1, 0, 1]), torch.tensor([0, 2, 3])
    dual = make_dual(x, normal(K, *x.shape, seed=1))
    for function in (lambda x: x[rows], lambda x: x[:, rows, columns], lambda x: x[:, :, columns]):
        assert torch.equal(function(dual).stacked, torch.stack([function(part) for part in dual.stacked]))
    with pytest.raises(NotImplementedError, match="forward AD"):
        dual[rows, :, columns]


def test_sums_and_products_have_the_type_that_pytorch_gives_them() -> None:
    narrow, wide = normal(3, 4).bfloat16(), normal(4, seed=1).float()
    for make in (lambda x: make_dual(x, torch.ones(K, *x.shape, dtype=x.dtype)), lambda x: x):
        for function in (torch.add, torch.sub, torch.mul):
            for a, b in ((make_dual(narrow, torch.ones(K, 3, 4).bfloat16()), make(wide)), (make(wide), make(narrow))):
                output = function(a, b)
                assert output.dtype == torch.float32
                assert torch.equal(split(output)[0], function(split(a)[0], split(b)[0]))


def test_a_dual_written_into_a_plain_tensor_is_refused() -> None:
    """It would lose its tangents without a word."""
    dual = make_dual(normal(3), normal(K, 3))
    with pytest.raises(NotImplementedError, match="forward AD"):
        normal(3).add_(dual)
    with pytest.raises((NotImplementedError, RuntimeError)):
        normal(3).copy_(dual)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.zeros(2, 3)[0] = dual


@pytest.mark.parametrize("budget", [1, 2000, 10**9])
def test_head_cross_entropy(budget: int) -> None:
    """Losses and slopes of a language model's head by row, shares of its tokens uneven, against the whole matrix."""
    hidden, weight = normal(7, 6), normal(11, 6, seed=1)
    v, w = normal(K, 7, 6, seed=2), normal(K, 11, 6, seed=3)
    labels, shares = torch.tensor([1, 4, 10, 0, 2, 2, 9]), normal(2, 7, seed=4).abs()

    def whole(hidden: Tensor, weight: Tensor) -> Tensor:
        return shares @ nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")

    def chunked(hidden: Tensor, weight: Tensor) -> Tensor:
        return head_cross_entropy(lambda part: linear(part, weight), 11, hidden, labels, shares)

    with chunks_of(budget):
        with torch.no_grad():
            output = chunked(make_dual(hidden, v), make_dual(weight, w))
            assert torch.allclose(output.stacked, jvps(whole, (hidden, weight), (v, w)), atol=1e-12)
            assert torch.allclose(chunked(hidden, weight), whole(hidden, weight))
        hidden.requires_grad_(True)
        (found,) = torch.autograd.grad(chunked(hidden, weight).sum(), hidden)
        assert torch.allclose(found, torch.autograd.grad(whole(hidden, weight).sum(), hidden)[0], atol=1e-12)


def test_the_head_s_loss_never_holds_all_logits() -> None:
    hidden, weight, labels, shares = torch.randn(400, 8), torch.randn(5000, 8), torch.arange(400), torch.ones(1, 400)
    dual, budget = make_dual(hidden, torch.randn(2, 400, 8)), 10**6
    with torch.no_grad(), chunks_of(budget), ActivationMeter() as meter:
        head_cross_entropy(lambda part: linear(part, weight), 5000, dual, labels, shares)
    assert meter.peak_bytes < 2 * budget < 400 * 5000 * 4
    with pytest.raises(ValueError, match="no token carries a label"):
        head_cross_entropy(lambda part: linear(part, weight), 5000, hidden[:0], labels[:0], shares[:, :0])


def test_chunks_need_no_linear_module() -> None:
    """GPT-2's feed-forward is made of Conv1D, which has no out_features."""
    module = GPT2MLP(16, GPT2Config(n_embd=4)).double().eval().requires_grad_(False)
    x = normal(3, 5, 4)
    expected = module(x)
    chunk_feed_forward(module)
    with torch.no_grad(), chunks_of(4 * 16 * 8 * 4):
        assert torch.allclose(module(x), expected, atol=1e-12)


class TinyMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.up(hidden).tanh())


def test_chunks_of_tokens_change_no_result() -> None:
    module = TinyMLP().double().requires_grad_(False)
    x, v = normal(3, 5, 4), normal(K, 3, 5, 4, seed=1)
    calls: list[int] = []
    expected = jvps(module, (x,), (v,))
    module.up.register_forward_hook(lambda m, args, output: calls.append(args[0].shape[0]))
    chunk_feed_forward(module)
    with torch.no_grad(), chunks_of(FEED_FORWARD_SHARE * 4 * 2 * (1 + K) * 16 * 8):  # four tokens
        output = module(make_dual(x, v))
    assert calls == [4, 4, 4, 3]
    assert torch.allclose(output.stacked, expected, atol=1e-12)


def test_chunks_of_rows_change_no_result_and_reuse_the_hidden_state() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(4, 4)

        def forward(self, hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            seen.append(hidden.shape[0])
            return self.map(hidden) * scale + shift

    seen: list[int] = []
    layer = Layer().double().requires_grad_(False)
    x, v, shift, scale = normal(3, 5, 4), normal(K, 3, 5, 4, seed=1), normal(3, 1, 4, seed=2), normal(1, 5, 4, seed=3)
    expected = jvps(lambda x: layer(x, shift, scale), (x,), (v,))
    chunk_layers([layer])
    dual, kept = make_dual(x, v), x.clone()
    seen.clear()
    with torch.no_grad(), chunks_of(1):
        plain = layer(x, shift, scale=scale)
        output = layer(dual, shift, scale=scale)
    assert seen == [1] * 6
    assert torch.equal(x, kept)  # a plain hidden state may be the caller's
    assert torch.allclose(plain, expected[0], atol=1e-12)
    assert torch.allclose(output.stacked, expected, atol=1e-12)
    assert output is dual  # its memory is used again


def test_whose_causality_counts_beside_a_mask_of_padding() -> None:
    """A module that says it is causal is; one that says nothing is an encoder with a mask of its own."""
    q, k, v = (normal(2, 4, 7, 5, seed=i) for i in range(3))
    padding = MASKS["padding"]
    for is_causal, mask in ((True, padding), (None, padding), (True, torch.zeros_like(padding, dtype=q.dtype))):
        module = nn.Module()
        if is_causal is not None:
            module.is_causal = is_causal
        expected = plain_attention(q, k, v, mask, bool(is_causal), 5**-0.5)
        plain, _ = attention_forward(module, q, k, v, mask)
        dual, _ = attention_forward(module, make_dual(q, torch.zeros_like(q).unsqueeze(0)), k, v, mask)
        assert torch.allclose(plain, expected, atol=1e-12)
        assert torch.allclose(split(dual)[0], expected, atol=1e-12)
