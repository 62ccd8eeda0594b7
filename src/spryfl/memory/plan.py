"""What a step is predicted to take, and which way to train fits a budget. Pure arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PassCost:
    """Activation peak and operations of a pass over a model of `depth` layers; linear in the depth from there on.

    Attributes:
        peak_bytes, flops: at `depth`.
        layer_bytes, layer_flops: what one more layer adds.
    """

    depth: int
    peak_bytes: int
    flops: int
    layer_bytes: int = 0
    layer_flops: int = 0

    @classmethod
    def through(cls, found: Mapping[int, tuple[int, int]]) -> "PassCost":
        """From (peak bytes, flops) at two consecutive depths, or at the model's own alone."""
        (depth, (peak, flops)), *others = sorted(found.items())
        if not others:
            return cls(depth, peak, flops, 0, flops // depth)
        ((_, (next_peak, next_flops)),) = others
        return cls(depth, peak, flops, max(0, next_peak - peak), next_flops - flops)

    def peak_at(self, depth: int) -> int:
        return self.peak_bytes + (depth - self.depth) * self.layer_bytes

    def flops_at(self, depth: int) -> int:
        return self.flops + (depth - self.depth) * self.layer_flops
