"""Which modules of a model forward mode can pass through: all problems at once, each with its remedy.

The model is run once on a few tokens with a tangent on its embeddings. A module that raises is recorded and
replaced by its primal with a zero tangent, so the pass goes on and finds the others. Values do not matter,
so a model without its weights serves (`models.skeleton.skeleton`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from spryfl.errors import UnsupportedModuleError
from spryfl.forward_mode.dual import make_dual, num_tangents, split
from spryfl.forward_mode.next_token import head_rows
from spryfl.forward_mode.patching import Forward, patched_forwards

BATCH, TOKENS = 2, 8

CAUGHT = (RuntimeError, NotImplementedError, UnsupportedModuleError)
REMEDIES: tuple[tuple[str, str], ...] = (
    ("no method here", "Forward mode and backprop run the same attention, so neither can"),
    ("scaled_dot_product", "Its attention bypasses transformers' attention interface: ask its authors to use it"),
    ("flash", "Its attention bypasses transformers' attention interface: ask its authors to use it"),
    ("tensor subclass", "It computes outside PyTorch (NumPy, a kernel of its own): replace it by plain PyTorch"),
    ("forward AD", "Replace this operation by one with a forward derivative, or train with fedavg or fedyogi"),
)
DEFAULT_REMEDY = "Train this model with a backprop method such as fedyogi, or replace the module"
DROPPED = "no tangent comes out though one goes in (detach, .data, or a conversion through integers or NumPy)"


@dataclass(frozen=True)
class Problem:
    """A module that forward mode cannot pass through.

    Attributes:
        module: its path in the model.
        kind: its class.
    """

    module: str
    kind: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class SupportReport:
    """Every unsupported module of a model; none if all are supported."""

    num_modules: int
    problems: tuple[Problem, ...]


class _NoWayOnError(Exception):
    """A module fails without tangents too, so what lies above it cannot be asked."""


def check_support(model: nn.Module) -> SupportReport:
    """Find every module of a transformers model that a tangent cannot pass through.

    Args:
        model: with input embeddings and token ids as input; left as it was found.
    """
    problems: dict[str, Problem] = {}
    ids = torch.ones(BATCH, TOKENS, dtype=torch.long, device=next(model.parameters()).device)
    mask = torch.ones_like(ids)
    mask[0, TOKENS // 2 :] = 0  # padding, so that masked code runs too
    paths = {module: path for path, module in model.named_modules() if path}
    guarded = patched_forwards(
        list(paths), lambda module, forward: _recording(paths[module], module, forward, problems)
    )
    # One row of a head tells what all of a vocabulary would.
    with torch.no_grad(), head_rows(model, ids[0, :1]), guarded, _tangent_on_embeddings(model):
        try:
            output = model(input_ids=ids, attention_mask=mask)
        except _NoWayOnError:
            pass
        except (*CAUGHT, TypeError, ValueError) as error:
            problems.setdefault("", _problem("", model, error))
        else:
            if not problems and num_tangents(output[0]) == 0:
                problems[""] = Problem("(whole model)", type(model).__name__, DROPPED, DEFAULT_REMEDY)
    return SupportReport(len(paths), tuple(problems.values()))


def require_support(model: nn.Module, name: str) -> None:
    """Raise UnsupportedModuleError, naming every unsupported module of a model and its remedy."""
    problems = check_support(model).problems
    if problems:
        listed = "; ".join(f"{p.module} ({p.kind}): {p.reason}. {p.remedy}" for p in problems)
        raise UnsupportedModuleError(f"{name}: {len(problems)} modules are not supported in forward mode: {listed}")


def _recording(path: str, module: nn.Module, forward: Forward, problems: dict[str, Problem]) -> Forward:
    """Let a module record its failure instead of raising; the innermost one that fails is named."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        before = len(problems)
        try:
            output = forward(*args, **kwargs)
        except CAUGHT as error:
            problems[path] = _problem(path, module, error)
            plain_args, plain_kwargs = tree_map(_primal, (args, kwargs))
            try:
                plain = forward(*plain_args, **plain_kwargs)
            except CAUGHT as again:  # the modules around it are not to blame
                raise _NoWayOnError from again
            return tree_map(_with_zero_tangent, plain)
        # A rotary embedding takes the hidden state for its device and dtype only, so a module of no
        # parameters that drops the tangent is fine unless all of its input's users lose it.
        if len(problems) == before and _carries(args) and not _carries(output) and _owns_weights(module):
            problems[path] = Problem(path, type(module).__name__, DROPPED, DEFAULT_REMEDY)
            return tree_map(_with_zero_tangent, output)
        return output

    return guarded


@contextmanager
def _tangent_on_embeddings(model: nn.Module) -> Iterator[None]:
    """Give the input embeddings' output a tangent, so that one reaches every module above."""

    def add(module: nn.Module, args: Any, output: Tensor) -> Any:
        return _with_zero_tangent(output)

    handle = model.get_input_embeddings().register_forward_hook(add)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


def _problem(path: str, module: nn.Module, error: Exception) -> Problem:
    text = " ".join(str(error).split())
    remedy = next((remedy for sign, remedy in REMEDIES if sign.lower() in text.lower()), DEFAULT_REMEDY)
    return Problem(path or "(whole model)", type(module).__name__, text.split(". ")[0][:200], remedy)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _carries(tree: Any) -> bool:
    return num_tangents(*tree_leaves(tree)) > 0


def _owns_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _primal(value: Any) -> Any:
    return split(value)[0] if isinstance(value, Tensor) else value


def _with_zero_tangent(value: Any) -> Any:
    if not _is_float(value):
        return value
    primal = split(value)[0]
    return make_dual(primal, torch.zeros_like(primal).unsqueeze(0))
