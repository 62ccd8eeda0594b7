"""Bottleneck tangents against autograd, in float64 on tiny models of several families."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from families import autograd_gradient, batch_loss, build, padded_batch, trainable
from spryfl.config import AdapterConfig
from spryfl.errors import ModelError
from spryfl.forward_mode.budget import chunks_of
from spryfl.forward_mode.patching import patched_forwards
from spryfl.gradients.bottleneck import BottleneckGradient, bottlenecks
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.estimator import GradientEstimator, Loss
from spryfl.gradients.exact_head import ExactHead
from spryfl.gradients.forward import ForwardGradient
from spryfl.gradients.tangents import Draw
from spryfl.models.layers import layer_calls

STREAM = DirectionStream(0, 1, 0)
DRAW = STREAM.at_step(0)
WIDE = 10**9
FROZEN_B = AdapterConfig(rank=1, frozen="b")


def flat(gradients: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([gradients[name].flatten().double() for name in names])


def errors_of(
    estimator: GradientEstimator, model: nn.Module, loss: Loss, names: list[str], stream: DirectionStream, draws: int
) -> Tensor:
    """(draws, d): estimate - gradient, in units of the gradient's norm."""
    exact = flat(autograd_gradient(model, loss, names), names)
    found = [flat(estimator.estimate(model, loss, names, stream.at_step(i), 3).gradients, names) for i in range(draws)]
    return (torch.stack(found) - exact) / exact.norm()


def is_unbiased(errors: Tensor) -> bool:
    """Whether each number's mean error is within five of its standard errors."""
    return bool((errors.mean(0).abs() <= 5 * errors.std(0) / len(errors) ** 0.5 + 1e-6).all())


@pytest.mark.parametrize(
    ("family", "per"), [("bert", "step"), ("albert", "step"), ("llama", "step"), ("bert", "tensor")]
)
def test_unbiased_for_all_parameters(family: str, per: str) -> None:
    """A, B and the head together; 150 draws, each number within five standard errors."""
    model, loss = build(family), batch_loss(padded_batch(left=family == "llama"))
    names = trainable(model)
    stream = STREAM if per == "step" else replace(STREAM, groups=tuple((name,) for name in names))
    errors = errors_of(BottleneckGradient(4), model, loss, names, stream, 150)
    sizes = [model.get_parameter(name).numel() for name in names]
    parts = dict(zip(names, errors.split(sizes, dim=1), strict=True))
    for kind in ("lora_A", "lora_B", "modules_to_save"):
        own = torch.cat([part for name, part in parts.items() if kind in name], dim=1)
        assert float(own.square().sum(1).mean()) > 0
        assert is_unbiased(own), kind
    # Shares of the error along the gradient itself, where a bias of scale would show: four standard errors.
    exact = autograd_gradient(model, loss, names)
    for kind in ("lora_A", "lora_B", "modules_to_save"):
        own = [name for name in names if kind in name]
        along = torch.cat([parts[name] for name in own], dim=1) @ flat(exact, own)
        assert abs(along.mean()) < 4 * along.std() / len(along) ** 0.5, kind


def gradients_at_low(model: nn.Module, loss: Loss, module: nn.Module) -> list[Tensor]:
    """Autograd's gradient at the output of each call of a module."""
    outputs = []

    def keeping(_: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            outputs.append(forward(x))
            return outputs[-1]

        return run

    with torch.enable_grad(), patched_forwards([module], keeping):
        return list(torch.autograd.grad(loss(model), outputs))


@pytest.mark.parametrize(
    ("family", "kind"), [("bert", "lora"), ("albert", "lora"), ("llama", "lora"), ("bert", "dora")]
)
def test_estimate_is_each_examples_slope_times_its_tangent(family: str, kind: str) -> None:
    """K = 2, one A: sum over calls and examples of mean_k (grad_z[i] . v_ik) v_ik x_i^T, with autograd's grad_z[i]."""
    model = build(family, adapter=AdapterConfig(kind=kind, rank=2, alpha=2))
    batch = padded_batch(left=family == "llama")
    loss, mask = batch_loss(batch), batch["attention_mask"].double()
    name = next(name for name in trainable(model) if "lora_A" in name)
    module = bottlenecks(model, [name])[name]
    inputs = []
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    exact = gradients_at_low(model, loss, module)
    hook.remove()
    assert len(exact) == (2 if family == "albert" else 1)
    v = [
        torch.stack([DRAW.numbers(k, f"{name}@bottleneck/{call}", g.shape).double() for k in range(2)])
        * mask.unsqueeze(-1)
        for call, g in enumerate(exact)
    ]
    # All calls of an example share a slope.
    slopes = sum((g * own).flatten(2).sum(2) for g, own in zip(exact, v, strict=True))
    expected = sum(torch.einsum("ki,kitr,itn->rn", slopes, own, x) / 2 for own, x in zip(v, inputs, strict=True))
    found = BottleneckGradient(2).estimate(model, loss, [name], DRAW, 3)
    assert torch.allclose(found.gradients[name].double(), expected, rtol=1e-5, atol=1e-9)
    assert float(expected.norm()) > 1e-4
    assert found.slopes is None


@pytest.mark.parametrize("family", ["bert", "albert", "llama", "opt"])
def test_chunks_change_nothing(family: str) -> None:
    """One row and one token at a time, dropout aside: the same tangents, the same kept inputs."""
    model, loss = build(family), batch_loss(padded_batch())
    names = trainable(model)
    found = []
    for budget in (1, WIDE):
        with chunks_of(budget):
            found.append(BottleneckGradient(2).estimate(model, loss, names, DRAW, 3))
    assert found[0].loss == pytest.approx(found[1].loss, abs=1e-12)
    for name in names:
        assert torch.allclose(found[0].gradients[name], found[1].gradients[name], rtol=1e-5, atol=1e-7), name


def test_dropout_is_before_the_kept_input() -> None:
    """With the same mask at every pass, the estimate's mean is the gradient of the network that was dropped from."""
    model, plain = build("bert", adapter=AdapterConfig(rank=2, dropout=0.5)), batch_loss(padded_batch())
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p == 0.5:
            module.train()

    @dataclass(frozen=True)
    class Seeded:
        def __call__(self, model: nn.Module) -> Tensor:
            torch.manual_seed(3)
            return plain(model)

        def parts(self, model: nn.Module) -> Tensor:
            torch.manual_seed(3)
            return plain.parts(model)

    names = [name for name in trainable(model) if "lora_A" in name]
    dropped, whole = (flat(autograd_gradient(model, loss, names), names) for loss in (Seeded(), plain))
    assert float((dropped - whole).norm()) > 0.3 * float(dropped.norm())
    assert is_unbiased(errors_of(BottleneckGradient(8), model, Seeded(), names, STREAM, 200))


def test_head_exact_beside_it() -> None:
    model, loss = build("bert", adapter=FROZEN_B), batch_loss(padded_batch())
    names = trainable(model)
    head = frozenset(name for name in names if "modules_to_save" in name)
    exact = autograd_gradient(model, loss, names)
    others = [name for name in names if name not in head]
    found = ExactHead(BottleneckGradient(2), layer_calls, head).estimate(model, loss, names, DRAW, 3).gradients
    alone = BottleneckGradient(2).estimate(model, loss, others, DRAW, 3).gradients
    assert all(torch.allclose(found[name].double(), exact[name], rtol=1e-5, atol=1e-7) for name in head)
    assert all(torch.equal(found[name], alone[name]) for name in others)


@pytest.mark.parametrize("draw", [DRAW, DirectionStream(0, 1, 0, "rademacher").at_step(0)])
def test_without_an_a_it_is_the_forward_gradient(draw: Draw) -> None:
    """A client may be assigned the head alone."""
    model, loss = build("bert"), batch_loss(padded_batch())
    names = [name for name in trainable(model) if "lora_A" not in name]
    found, plain = (e.estimate(model, loss, names, draw, 3) for e in (BottleneckGradient(2), ForwardGradient(2)))
    assert all(torch.allclose(found.gradients[name], plain.gradients[name], rtol=1e-5, atol=1e-7) for name in names)


def test_less_error_than_parameter_tangents() -> None:
    """9 tokens, rank 1, 32 inputs, B frozen, one unit: 9 numbers an example instead of 32, and a slope for each."""
    model, loss = build("bert", adapter=FROZEN_B), batch_loss(padded_batch())
    names = [name for name in trainable(model) if "lora_A" in name][:1]
    own, plain = (
        float(errors_of(e, model, loss, names, STREAM, 200).square().sum(1).mean())
        for e in (BottleneckGradient(1), ForwardGradient(1))
    )
    assert plain == pytest.approx(33, rel=0.35)
    assert own < 0.6 * plain


@dataclass(frozen=True)
class NextToken:
    """A language model's loss: a part for each token, of what it says of the next one."""

    batch: dict[str, Tensor]

    def __call__(self, model: nn.Module) -> Tensor:
        return self.parts(model).sum()

    def parts(self, model: nn.Module) -> Tensor:
        return self.token_parts(model).sum(1)

    def token_parts(self, model: nn.Module) -> Tensor:
        ids, mask = self.batch["input_ids"], self.batch["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask).logits
        following, counts = ids.roll(-1, 1), mask * mask.roll(-1, 1)
        counts[:, -1] = 0
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
        return losses.view(ids.shape) * counts / counts.sum()

    def by_row(self) -> "ByRow":
        return ByRow(self.batch)


class ByRow(NextToken):
    def token_parts(self, model: nn.Module) -> Tensor:
        return super().token_parts(model).sum(1)

    def parts(self, model: nn.Module) -> Tensor:
        return self.token_parts(model)


def test_a_causal_models_parts_count_from_their_token_on() -> None:
    """Unbiased as above, and of less error than a slope for each row."""
    model, loss = build("llama", task="prompted"), NextToken(padded_batch())
    names = trainable(model)
    errors = errors_of(BottleneckGradient(4), model, loss, names, STREAM, 150)
    by_row = errors_of(BottleneckGradient(4), model, loss.by_row(), names, STREAM, 50)
    assert is_unbiased(errors)
    own = [name for name in names if "lora_A" in name]
    is_a = torch.cat([torch.full((model.get_parameter(name).numel(),), "lora_A" in name) for name in names])
    exact = autograd_gradient(model, loss, names)
    along = errors[:, is_a] @ flat(exact, own)
    assert abs(along.mean()) < 4 * along.std() / len(along) ** 0.5
    assert errors[:, is_a].square().sum(1).mean() < 0.8 * by_row[:, is_a].square().sum(1).mean()
    with chunks_of(1):
        chunked = BottleneckGradient(4).estimate(model, loss, names, DRAW, 3).gradients
    assert torch.allclose((flat(chunked, names) - flat(exact, names)) / flat(exact, names).norm(), errors[0], atol=1e-5)


def test_what_it_cannot_do_is_refused() -> None:
    model, loss = build("bert"), batch_loss(padded_batch())
    with pytest.raises(ModelError, match="no `parts`"):
        BottleneckGradient().estimate(model, loss.__call__, trainable(model), DRAW, 3)
    with pytest.raises(ModelError, match="3 parts of the loss for 6 examples"):
        BottleneckGradient().estimate(model, loss, trainable(model), DRAW, 6)
    vera = build("bert", adapter=AdapterConfig(kind="vera", rank=4))
    with pytest.raises(ModelError, match=r"no lora_A.*estimator = 'forward'"):
        BottleneckGradient().estimate(vera, loss, trainable(vera), DRAW, 3)
    flattened = build("opt", adapter=AdapterConfig(target_modules=("fc1",)))
    with pytest.raises(ModelError, match=r"fc1.*cannot be told apart"):
        BottleneckGradient().estimate(flattened, loss, trainable(flattened), DRAW, 3)
