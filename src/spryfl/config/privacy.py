"""Differential privacy: whose, and how much noise."""

from typing import Literal

from pydantic import Field, model_validator

from spryfl.config.part import Fraction, Part, PositiveFloat

NOT_OF_EXAMPLES: dict[str, str] = {
    "backprop": "its gradient is made of more than slopes",
    "guided": "its directions are guessed from the examples",
    "bottleneck": "its gradient is made of the examples' hidden states too",
    "auto": "it may choose backprop or guided tangents",
}
"""Estimators whose gradients noised slopes do not make private, and why."""


class PrivacyConfig(Part):
    """What is kept private, and by how much noise. docs/privacy.md says against whom."""

    level: Literal["none", "client", "example"] = Field(
        "none", description="client: the server adds noise to what it aggregates; example: clients to their slopes"
    )
    clip: PositiveFloat | None = Field(
        None, description="bound (L2) on a client's change, or on the slopes of one example at one step"
    )
    noise_multiplier: PositiveFloat | None = Field(None, description="standard deviation of the noise, in clips")
    delta: Fraction = Field(1e-5, description="at which epsilon is told: well below 1 / clients, or 1 / examples")

    @model_validator(mode="after")
    def _has_what_its_level_needs(self) -> "PrivacyConfig":
        given = {"clip": self.clip, "noise_multiplier": self.noise_multiplier}
        for name, value in given.items():
            if self.level == "none" and value is not None:
                raise ValueError(f"{name} belongs to level = 'client' or 'example': set level, or leave it out")
            if self.level != "none" and value is None:
                raise ValueError(f"level = '{self.level}' needs {name}, such as {name} = 1.0")
        return self

    @property
    def strength(self) -> tuple[float, float]:
        """Clip and noise multiplier, of a level that has them."""
        assert self.clip is not None
        assert self.noise_multiplier is not None
        return self.clip, self.noise_multiplier
