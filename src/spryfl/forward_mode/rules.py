"""How each PyTorch operator acts on duals: an explicit table, and PyTorch's own jvp for all others.

Three kinds have rows: operators that only move or combine numbers (one call on the whole stack), products,
and element-wise functions with a cheap derivative. An operator without a row goes through `torch.func.jvp`
under `vmap`: correct wherever PyTorch has a forward derivative, at the price of a second primal.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from spryfl.forward_mode.dual import Dual, carrying_tangents, make_dual, new_stack, num_tangents, split

aten = torch.ops.aten
Rule = Callable[..., Any]


def apply_rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator some of whose arguments are duals."""
    rule = RULES.get(func)
    return by_jvp(func, args, kwargs) if rule is None else rule(func, *args, **kwargs)


def by_jvp(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The general rule: K tangents by vmap over PyTorch's forward derivative of one operator.

    Raises:
        NotImplementedError: the operator writes into its argument, or PyTorch has no derivative of it.
    """
    if func._schema.is_mutable:
        raise NotImplementedError(f"{func} writes a dual number in place, which has no rule (forward AD)")
    flat, spec = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Dual)]

    def of(*primals: Tensor) -> Any:
        filled = list(flat)
        for place, primal in zip(places, primals, strict=True):
            filled[place] = primal
        new_args, new_kwargs = tree_unflatten(filled, spec)
        return func(*new_args, **new_kwargs)

    pairs = [split(flat[i]) for i in places]
    primals = tuple(primal for primal, _ in pairs)
    if not any(primal.is_floating_point() for primal in primals):
        return of(*primals)
    # Inside a dispatch PyTorch's derivatives are switched off; this switches them on again.
    with torch.overrides.enable_reentrant_dispatch():
        jvp: Any = lambda *moving: torch.func.jvp(of, primals, moving)  # noqa: E731
        every: Any = torch.func.vmap(jvp, out_dims=(None, 0), randomness="same")  # type: ignore[arg-type]
        output, tangents = every(*(tangent for _, tangent in pairs))
    return tree_map(lambda p, t: make_dual(p, t) if p.is_floating_point() or p.is_complex() else p, output, tangents)


# Operators that move or combine numbers: one call on the stack, with dimensions counted one further.


def _dim(dual: Dual, dim: int) -> int:
    return dim + 1 if dim >= 0 else dim


def _view(func: Any, x: Dual, size: list[int]) -> Dual:
    return Dual(func(x.stacked, [x.stacked.shape[0], *_resolved(x, size)]))


def _resolved(x: Dual, size: list[int]) -> list[int]:
    """The size with its -1, which would stand for the tangents too, written out."""
    if -1 not in size:
        return size
    known = math.prod(s for s in size if s != -1)
    return [x.numel() // known if s == -1 else s for s in size]


def _expand(func: Any, x: Dual, size: list[int], **kwargs: Any) -> Dual:
    leading = len(size) - x.dim()
    stacked = x.stacked.view(x.stacked.shape[0], *(1,) * leading, *x.shape) if leading else x.stacked
    return Dual(func(stacked, [stacked.shape[0], *size], **kwargs))


def _whole(func: Any, x: Dual, *args: Any, **kwargs: Any) -> Dual:
    """Operators without dimensions: f applied to the stack."""
    return Dual(func(x.stacked, *args, **kwargs))


def _one_dim(func: Any, x: Dual, dim: int = 0, *args: Any, **kwargs: Any) -> Any:
    output = func(x.stacked, _dim(x, dim), *args, **kwargs)
    return Dual(output) if isinstance(output, Tensor) else [Dual(part) for part in output]


def _split_rule(func: Any, x: Dual, sizes: Any, dim: int = 0) -> list[Dual]:
    return [Dual(part) for part in func(x.stacked, sizes, _dim(x, dim))]


def _unsqueeze(func: Any, x: Dual, dim: int) -> Dual:
    return Dual(func(x.stacked, _dim(x, dim)))


def _transpose(func: Any, x: Dual, first: int, second: int) -> Dual:
    return Dual(func(x.stacked, _dim(x, first), _dim(x, second)))


def _t(func: Any, x: Dual) -> Dual:
    return Dual(x.stacked.transpose(-1, -2) if x.dim() == 2 else x.stacked)


def _permute(func: Any, x: Dual, dims: list[int]) -> Dual:
    return Dual(func(x.stacked, [0, *(d % x.dim() + 1 for d in dims)]))


def _reduce(func: Any, x: Dual, dims: list[int] | None = None, *args: Any, **kwargs: Any) -> Dual:
    dims = dims or list(range(x.dim()))
    return Dual(func(x.stacked, [d % x.dim() + 1 for d in dims], *args, **kwargs))


def _reduce_all(func: Any, x: Dual, **kwargs: Any) -> Dual:
    return Dual(func.overloadpacket(x.stacked, dim=list(range(1, x.dim() + 1)), **kwargs))


def _cat(func: Any, tensors: list[Tensor], dim: int = 0) -> Dual:
    k = num_tangents(*tensors)
    stacks = [dual.stacked for t in tensors if isinstance(dual := carrying_tangents(t, k), Dual)]
    return Dual(func(stacks, dim + 1 if dim >= 0 else dim))


def _index(func: Any, x: Tensor, indices: list[Tensor | None]) -> Dual:
    if not isinstance(x, Dual):
        raise NotImplementedError(f"{func} by a dual number (forward AD)")
    given = [place for place, index in enumerate(indices) if index is not None]
    if given and given[-1] - given[0] >= len(given):  # PyTorch would put what they pick before the tangents' axis
        raise NotImplementedError(f"{func} with a whole dimension between two indices (forward AD)")
    return Dual(func(x.stacked, [None, *indices]))


def _aligned(x: Dual, dim: int) -> Tensor:
    """The stack with room for `dim` dimensions, so that it broadcasts as its primal would."""
    missing = dim - x.dim()
    return x.stacked.view(x.stacked.shape[0], *(1,) * missing, *x.shape) if missing > 0 else x.stacked


def _promoted(a: Any, b: Any) -> tuple[Any, Any]:
    """Two operands, duals among them in the type that PyTorch gives their result."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.dtype == b.dtype:
        return a, b
    dtype = torch.result_type(*(v.stacked[0] if isinstance(v, Dual) else v for v in (a, b)))
    return tuple(Dual(v.stacked.to(dtype)) if isinstance(v, Dual) else v for v in (a, b))  # type: ignore[return-value]


# Sums and products.


def _add(func: Any, a: Any, b: Any, *, alpha: Any = 1) -> Dual:
    """A + alpha b (or a - alpha b): linear in both together."""
    a, b = _promoted(a, b)
    if isinstance(a, Dual) and isinstance(b, Dual):
        dim = max(a.dim(), b.dim())
        return Dual(func(_aligned(a, dim), _aligned(b, dim), alpha=alpha))
    shape = torch.broadcast_shapes(*(v.shape for v in (a, b) if isinstance(v, Tensor)))
    stack = new_stack(a if isinstance(a, Dual) else b, num_tangents(a, b), shape)
    if isinstance(a, Dual):
        torch.add(a.stacked[0], b, alpha=alpha, out=stack[0]) if func in _ADD else torch.sub(
            a.stacked[0], b, alpha=alpha, out=stack[0]
        )
        stack[1:] = _aligned(a, len(shape))[1:]
    else:
        stack[0] = func(a, b.stacked[0], alpha=alpha)
        torch.mul(_aligned(b, len(shape))[1:].expand_as(stack[1:]), alpha if func in _ADD else -alpha, out=stack[1:])
    return Dual(stack)


_ADD = (aten.add.Tensor, aten.add.Scalar)


def _add_in_place(func: Any, a: Tensor, b: Any, *, alpha: Any = 1) -> Tensor:
    if not isinstance(a, Dual):
        raise NotImplementedError(f"{func} adds a dual number to a plain tensor in place (forward AD)")
    if isinstance(b, Dual):
        func(a.stacked, _aligned(b, a.dim()), alpha=alpha)
    else:
        func(a.stacked[0], b, alpha=alpha)
    return a


def _mul(func: Any, a: Any, b: Any) -> Dual:
    """(a b)' = a' b + a b'."""
    a, b = _promoted(a, b)
    if isinstance(a, Dual) and isinstance(b, Dual):
        shape = torch.broadcast_shapes(a.shape, b.shape)
        first, second = _aligned(a, len(shape)), _aligned(b, len(shape))
        stack = new_stack(a, a.num_tangents, shape)
        torch.mul(first, second[0], out=stack)
        stack[1:].addcmul_(first[0].expand(shape), second[1:])
        return Dual(stack)
    dual, other = (a, b) if isinstance(a, Dual) else (b, a)
    return Dual(func(_aligned(dual, other.dim() if isinstance(other, Tensor) else 0), other))


def _mul_in_place(func: Any, a: Tensor, b: Any) -> Tensor:
    if not isinstance(a, Dual) or isinstance(b, Dual):
        raise NotImplementedError(f"{func} multiplies by a dual number in place (forward AD)")
    func(a.stacked, b)
    return a


def _div(func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    if isinstance(b, Dual) or kwargs:
        return by_jvp(func, (a, b), kwargs)
    return Dual(func(_aligned(a, b.dim() if isinstance(b, Tensor) else 0), b))


def _matmul(func: Any, a: Tensor, b: Tensor) -> Dual:
    """(A B)' = A' B + A B', for matrices and batches of them."""
    if not isinstance(b, Dual):
        assert isinstance(a, Dual)
        return Dual(torch.matmul(a.stacked, b))
    if not isinstance(a, Dual):
        return Dual(torch.matmul(a, b.stacked))
    stack = torch.matmul(a.stacked, b.stacked[0])
    stack[1:] += torch.matmul(a.stacked[0], b.stacked[1:])
    return Dual(stack)


def _addmm(func: Any, bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Dual:
    product = _matmul(func, a, b)
    return _add(aten.add.Tensor, product * alpha if alpha != 1 else product, bias * beta if beta != 1 else bias)


# Element-wise functions whose derivative PyTorch keeps as a backward kernel: f'(x) v in one call.


def _elementwise(backward: Callable[..., Tensor], of_output: bool = False) -> Rule:
    """The rule of y = f(x): `backward(v, x)`, or `backward(v, y)`, is f'(x) v. Kernels write where they are due."""
    kernel = isinstance(backward, torch._ops.OpOverloadPacket)

    def rule(func: Any, x: Dual, *args: Any, **kwargs: Any) -> Dual:
        stack = torch.empty_like(x.stacked)
        func.overloadpacket(x.stacked[0], *args, **kwargs, out=stack[0])
        at = stack[0] if of_output else x.stacked[0]
        for k in range(1, stack.shape[0]):
            if kernel:
                backward(x.stacked[k], at, *args, **kwargs, grad_input=stack[k])
            else:
                stack[k] = backward(x.stacked[k], at, *args, **kwargs)
        return Dual(stack)

    return rule


def _pow_backward(v: Tensor, x: Tensor, exponent: Any) -> Tensor:
    return 2 * x * v if exponent == 2 else v * (exponent * x.pow(exponent - 1))


# Losses: the last two operators of a classifier.


def _log_softmax(func: Any, x: Dual, dim: int, half_to_float: bool) -> Dual:
    """Y = x - log sum exp x,  y' = x' - sum(softmax(x) x')."""
    output = func(x.stacked[0], dim, half_to_float)
    stack = new_stack(output, x.num_tangents, x.shape)
    stack[0] = output
    tangents = x.stacked[1:].to(output.dtype)
    d = dim % x.dim()
    stack[1:] = tangents - (output.exp() * tangents).sum(d + 1, keepdim=True)
    return Dual(stack)


def _primal_only(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Comparisons, arguments of maxima, shapes, and detach: nothing of a tangent is left."""
    return func(*tree_map(lambda v: v.stacked[0] if isinstance(v, Dual) else v, args), **kwargs)


_ROWS: tuple[tuple[Rule, tuple[Any, ...]], ...] = (
    (_view, (aten.view.default, aten._unsafe_view.default, aten.reshape.default)),
    (_expand, (aten.expand.default,)),
    (
        _whole,
        (
            aten.neg.default,
            aten.clone.default,
            aten._to_copy.default,
            aten.alias.default,
            aten.contiguous.default,
            aten.mul.Scalar,
            aten.div.Scalar,
            aten.constant_pad_nd.default,
        ),
    ),
    (_one_dim, (aten.slice.Tensor, aten.select.int, aten.squeeze.dim, aten.unbind.int, aten.index_select.default)),
    (_split_rule, (aten.split.Tensor, aten.split_with_sizes.default)),
    (_unsqueeze, (aten.unsqueeze.default,)),
    (_transpose, (aten.transpose.int,)),
    (_t, (aten.t.default,)),
    (_permute, (aten.permute.default,)),
    (_reduce, (aten.sum.dim_IntList, aten.mean.dim)),
    (_reduce_all, (aten.sum.default, aten.mean.default)),
    (_cat, (aten.cat.default,)),
    (_index, (aten.index.Tensor,)),
    (_add, (aten.add.Tensor, aten.sub.Tensor)),
    (_add_in_place, (aten.add_.Tensor, aten.sub_.Tensor)),
    (_mul, (aten.mul.Tensor,)),
    (_mul_in_place, (aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor)),
    (_div, (aten.div.Tensor,)),
    (_matmul, (aten.mm.default, aten.bmm.default, aten.matmul.default)),
    (_addmm, (aten.addmm.default,)),
    (_elementwise(aten.gelu_backward), (aten.gelu.default,)),
    (_elementwise(aten.silu_backward), (aten.silu.default,)),
    (_elementwise(lambda v, x: aten.threshold_backward(v, x, 0)), (aten.relu.default,)),
    (_elementwise(aten.tanh_backward, of_output=True), (aten.tanh.default,)),
    (_elementwise(aten.sigmoid_backward, of_output=True), (aten.sigmoid.default,)),
    (_elementwise(lambda v, y: v * y, of_output=True), (aten.exp.default,)),
    (_elementwise(lambda v, y: v * (-0.5 * y * y * y), of_output=True), (aten.rsqrt.default,)),
    (_elementwise(_pow_backward), (aten.pow.Tensor_Scalar,)),
    (_log_softmax, (aten._log_softmax.default,)),
    (
        _primal_only,
        (
            aten.detach.default,
            aten.argmax.default,
            aten.eq.Scalar,
            aten.eq.Tensor,
            aten.ne.Scalar,
            aten.gt.Scalar,
            aten.lt.Scalar,
            aten.isnan.default,
            aten.isinf.default,
            aten.zeros_like.default,
            aten.ones_like.default,
            aten.empty_like.default,
            aten.new_zeros.default,
            aten.new_empty.default,
            aten.new_ones.default,
            aten.new_full.default,
        ),
    ),
)
RULES: dict[Any, Rule] = {func: rule for rule, functions in _ROWS for func in functions}
