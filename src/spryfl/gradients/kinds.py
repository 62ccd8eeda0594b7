"""How directions are drawn and shared, by name: what a configuration may say, without importing torch."""

from typing import Literal

Distribution = Literal["gaussian", "rademacher", "orthogonal", "coordinate"]
TangentsPer = Literal["step", "unit", "tensor"]
SlopesPer = Literal["none", "step", "unit", "tensor"]
