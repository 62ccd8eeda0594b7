"""What PEFT's TinyLoRA layers need to serve here: factors made fast, and values of a module's own.

PEFT decomposes a weight in full, which takes a minute at Llama's sizes, where a few singular vectors do. And it
registers all modules' trained vectors in each of them, so that one module would seem to own the vectors of all.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tinylora.layer import TinyLoraLayer
from torch import Tensor, nn

from spryfl.errors import ModelError

OVERSAMPLING, ITERATIONS = 8, 10  # of the randomized decomposition (Halko et al. 2011), as LoRA-XS's own code has it


@contextmanager
def singular_factors(*, balanced: bool) -> Iterator[None]:
    """Let layers made inside take their frozen factors from a truncated decomposition W = U S V^T.

    Args:
        balanced: B = U sqrt(S), A = sqrt(S) V^T, as PEFT's TinyLoRA has it; else B = U S, A = V^T, as LoRA-XS.
    """

    def factors(layer: TinyLoraLayer, name: str, rank: int, fan_in_fan_out: bool) -> None:
        weight = layer.get_base_layer().weight.detach()
        left, right = truncated_svd(weight.T if fan_in_fan_out else weight, rank, balanced=balanced)
        layer.tinylora_A[name], layer.tinylora_B[name] = right.to(weight), left.to(weight)
        layer.r[name] = rank

    plain = TinyLoraLayer._init_svd
    TinyLoraLayer._init_svd = factors  # PEFT offers no other way in; what it makes is stored and reopened as ever
    try:
        yield
    finally:
        TinyLoraLayer._init_svd = plain


def truncated_svd(weight: Tensor, rank: int, *, balanced: bool) -> tuple[Tensor, Tensor]:
    """(out x rank), (rank x in): factors of the best approximation of this rank, in float32 at least.

    Made on the CPU, from its generator, and of one sign wherever that is: they stay with the client, so that all have
    to come to the same.

    Raises:
        ModelError: the weight has no such rank.
    """
    most = min(weight.shape)
    if rank > most:
        raise ModelError(f"adapter.rank = {rank} exceeds a target module's {tuple(weight.shape)}: lower it to {most}")
    precise = weight.to("cpu", torch.promote_types(weight.dtype, torch.float32))
    u, s, v = torch.svd_lowrank(precise, q=min(most, rank + OVERSAMPLING), niter=ITERATIONS)
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    u, s, v = (u * signs)[:, :rank], s[:rank], (v * signs)[:, :rank]
    left, right = (s.sqrt(), s.sqrt()) if balanced else (s, torch.ones_like(s))
    return (u * left).contiguous(), (v * right).T.contiguous()


def use_every_entry(model: nn.Module) -> None:
    """Make the i-th of a module's rank^2 numbers the i-th entry of R, row by row."""
    for layer in _layers(model):
        for name, projection in layer.tinylora_P.items():
            num_values, rank, _ = projection.shape
            layer.tinylora_P[name] = torch.eye(num_values).to(projection).view(num_values, rank, rank)


def own_values(model: nn.Module) -> None:
    """Register in each module the trained vector it uses, and no other's. What PEFT saves are the same parameters."""
    for layer in _layers(model):
        shared = layer.tinylora_v
        layer.tinylora_v = nn.ModuleDict(
            {name: nn.ParameterDict({key: shared[name][key]}) for name, key in layer._tinylora_v_key.items()}
        )


def _layers(model: nn.Module) -> list[TinyLoraLayer]:
    return [module for module in model.modules() if isinstance(module, TinyLoraLayer)]
