"""What our operators of duals save over PyTorch's own forward derivatives, module by module.

    python benchmarks/operators.py

Prints microseconds of the primal alone, of PyTorch's dual, and of ours, medians of alternating runs.
"""

import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

from spryfl.forward_mode.dual import make_dual
from spryfl.forward_mode.operators import use_lean_operators

REPEATS = 100


def microseconds(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - started) * 1e6)
    return {name: median(values) for name, values in taken.items()}


def main() -> None:
    print("| module | dtype | primal | PyTorch's dual | ours | ours / PyTorch's |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for dtype in (torch.float32, torch.bfloat16):
        for module, width in ((nn.Linear(384, 1536), 384), (nn.LayerNorm(384), 384)):
            plain = module.to(dtype)
            lean = copy.deepcopy(plain)
            use_lean_operators(lean)
            x = torch.randn(8, 50, width, dtype=dtype)
            with torch.no_grad(), forward_ad.dual_level():
                tangent = torch.randn_like(x)
                theirs, ours = forward_ad.make_dual(x, tangent), make_dual(x, tangent.unsqueeze(0))
                calls = {"primal": partial(plain, x), "torch": partial(plain, theirs), "ours": partial(lean, ours)}
                taken = microseconds(calls)
            print(
                f"| {type(module).__name__} | {str(dtype)[6:]} | {taken['primal']:.0f} | {taken['torch']:.0f} | "
                f"{taken['ours']:.0f} | {taken['ours'] / taken['torch']:.2f} |"
            )


if __name__ == "__main__":
    main()
