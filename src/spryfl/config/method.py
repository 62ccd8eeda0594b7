"""The federated method, and what its estimator is given."""

from typing import Literal

from pydantic import Field, model_validator

from spryfl.config.part import Part, Positive, PositiveFloat, Size, Source
from spryfl.errors import nearest
from spryfl.federated.method import METHODS, Estimator, Upload
from spryfl.gradients.kinds import Distribution, SlopesPer, TangentsPer

NOT_OF_SLOPES: dict[str, str] = {
    "backprop": "directions are not drawn from a seed",
    "guided": "directions are not drawn from a seed",
    "bottleneck": "gradient takes the client's hidden states too",
    "auto": "directions may be guessed ones, or none at all",
}
"""Estimators that no server can follow from slopes, and why."""


class MethodConfig(Part):
    """The federated method and its estimator's settings."""

    name: str = Field("spry", description="see: spry list methods")
    estimator: Estimator | Literal["auto"] | None = Field(
        None,
        description="how clients estimate gradients, the method's own by default; auto: what goes furthest in a second "
        "of what fits each client",
    )
    num_tangents: Positive | None = Field(
        None, description="K: directions a step, the method's own by default; unused by backprop and guided tangents"
    )
    distribution: Distribution = Field(
        "gaussian", description="of directions; orthogonal and coordinate ones give the exact gradient at K = d"
    )
    tangents_per: TangentsPer = Field("step", description="K directions for all parameters, or for each unit or tensor")
    shrinkage: bool = Field(False, description="scale the estimate to the least squared error; no matter to Adam")
    exact_head: bool = Field(
        False, description="give the head its exact gradient, at no further pass; backprop and guided always do"
    )
    chunk: Size | None = Field(None, description="bound on a pass's temporaries, 32MiB by default; changes no result")
    step_size: PositiveFloat | None = Field(
        None, description="h of the zeroth-order difference, the method's own by default"
    )
    num_candidates: Positive | None = Field(
        None,
        description="directions drawn for each that is used, those nearest to the last global update; the method's own "
        "by default, 1 uses all",
    )
    variance_threshold: PositiveFloat | None = Field(
        None, description="of methods that wait for agreement, fwdllm: (difference of two half means)^2 / 2, averaged"
    )
    checkpointing: Literal["none", "per_layer", "budgeted"] = Field("none", description="of backprop")
    budget: Size | None = Field(None, description="budgeted: bytes of layer inputs kept, such as '64MiB' or '1.5GB'")
    head: Literal["every", "cycle"] = Field("every", description="the head goes to every client, or takes its turn")
    deal: Literal["unit", "layer"] = Field(
        "unit", description="what split methods give one client together: an adapted module, or all of a layer's"
    )
    rotate: bool = Field(True, description="start the cycle one unit further each round")
    upload: Upload | None = Field(None, description="what travels up; the method's own by default")

    @model_validator(mode="after")
    def _known(self) -> "MethodConfig":
        if self.name not in METHODS:
            raise ValueError(f"unknown method '{self.name}'.{nearest(self.name, METHODS)} See: spry list methods")
        return self

    @model_validator(mode="after")
    def _upload_can_be_made(self) -> "MethodConfig":
        if (self.upload or METHODS[self.name].upload) == "slopes" and self.own_estimator in NOT_OF_SLOPES:
            raise ValueError(
                f"upload = 'slopes': nothing can be rebuilt from them with estimator '{self.own_estimator}', whose "
                f"{NOT_OF_SLOPES[self.own_estimator]}; set upload = '{self._whole_upload}' or another method"
            )
        if self.upload in ("values", "gradients") and self.upload != self._whole_upload:
            steps = "local steps" if self._whole_upload == "values" else "no step of their own"
            raise ValueError(
                f"upload = '{self.upload}': clients of method '{self.name}' take {steps}, so what they have to send is "
                f"'{self._whole_upload}': leave upload out"
            )
        if (self.upload or METHODS[self.name].upload) == "slopes" and self.exact_head:
            raise ValueError(
                f"exact_head: the head's gradient cannot be rebuilt from slopes; set upload = '{self._whole_upload}'"
            )
        return self

    @model_validator(mode="after")
    def _directions_can_be_drawn(self) -> "MethodConfig":
        if self.own_estimator == "bottleneck" and (self.distribution in ("orthogonal", "coordinate") or self.shrinkage):
            raise ValueError(
                "estimator = 'bottleneck' draws independent directions for every example, unscaled: leave shrinkage "
                "out, and set distribution = 'gaussian' or 'rademacher'"
            )
        if self.own_num_candidates > 1:
            if self.own_estimator not in ("forward", "zeroth_order"):
                raise ValueError(
                    f"num_candidates = {self.own_num_candidates}: estimator '{self.own_estimator}' takes no drawn "
                    "directions that could be chosen among: set num_candidates = 1, or estimator = 'zeroth_order'"
                )
            if self.distribution in ("orthogonal", "coordinate"):
                raise ValueError(
                    f"num_candidates = {self.own_num_candidates}: directions chosen one by one are not "
                    f"{self.distribution}: set num_candidates = 1, or distribution = 'gaussian'"
                )
        return self

    @model_validator(mode="after")
    def _settings_belong_to_their_method(self) -> "MethodConfig":
        if self.variance_threshold is not None and METHODS[self.name].pacing == "none":
            raise ValueError(
                f"variance_threshold: method '{self.name}' takes every round as it comes: leave it out, or choose "
                "'fwdllm' or 'fwdllm_plus'"
            )
        if self.estimator == "auto" and self.checkpointing != "none":
            raise ValueError(f"checkpointing = '{self.checkpointing}': estimator = 'auto' chooses it; leave it out")
        if self.checkpointing == "budgeted" and self.budget is None:
            raise ValueError("checkpointing = 'budgeted' needs a budget, such as budget = '64MiB'")
        if self.budget is not None and self.checkpointing != "budgeted":
            raise ValueError(f"budget belongs to checkpointing = 'budgeted', not '{self.checkpointing}': leave it out")
        return self

    @property
    def own_estimator(self) -> Estimator | Literal["auto"]:
        """The estimator asked for, or the method's own."""
        return self.estimator or METHODS[self.name].estimator

    @property
    def _whole_upload(self) -> Upload:
        """What the method's clients have to send where it is not slopes."""
        return "values" if METHODS[self.name].pace == "epoch" else "gradients"

    @property
    def own_num_tangents(self) -> int:
        """K: what was asked for, or the method's own; so with the following."""
        return self.num_tangents or METHODS[self.name].num_tangents

    @property
    def own_step_size(self) -> float:
        return self.step_size or METHODS[self.name].step_size

    @property
    def own_num_candidates(self) -> int:
        return self.num_candidates or METHODS[self.name].num_candidates

    @property
    def own_variance_threshold(self) -> float | None:
        return self.variance_threshold or METHODS[self.name].variance_threshold


class GuideConfig(Part):
    """Guided tangents: where their directions come from, and how the server keeps backward maps."""

    guess: Literal["identity", "maps"] = Field("identity", description="what the layers between count as")
    horizon: int = Field(0, ge=0, description="layers, from the top, that are back-propagated through exactly")
    slopes: SlopesPer | None = Field(
        None,
        description="one slope a step, a unit or a tensor; none takes the guess as it is, for a pass less; unit by "
        "default, none where every client trains all units",
    )
    explore: bool = Field(False, description="add a random tangent orthogonal to the guess: unbiased, noisier")
    momentum: bool = Field(False, description="take the slope along the server's momentum too")
    maps: Source | None = Field(None, description="backward maps written by spry fit-maps")
    text: Source | None = Field(None, description="public text: the server fits maps on it, and anew when they drift")
    text_columns: tuple[str, ...] | None = Field(None, description="in the public text; data.text_columns by default")
    num_texts: Positive = Field(512, description="of the public text, that maps are fitted on")
    rank: Positive = Field(32, description="directions of the last hidden state's gradient that maps carry, at most")
    across: bool = Field(True, description="model the gradient on other tokens than the one the loss sits on")
    ridge: PositiveFloat = Field(1e-3, description="penalty of the maps' least squares, in mean squares of their input")
    trust: float = Field(
        0.0, ge=0, description="units below maps take steps scaled by this power of their map's cosine; 0: full steps"
    )
    check_every: Positive = Field(5, description="rounds after which the server measures the maps' cosine again")
    refit_below: float = Field(0.9, ge=0, le=1, description="refit when it falls below this part of the first one")

    @model_validator(mode="after")
    def _maps_have_a_source(self) -> "GuideConfig":
        if self.guess == "maps" and self.maps is None and self.text is None:
            raise ValueError("guess = 'maps' needs maps (a file written by spry fit-maps) or text (to fit them on)")
        if self.trust > 0 and self.guess != "maps":
            raise ValueError(f"trust = {self.trust:g} goes by the cosines of maps: set guess = 'maps', or leave it out")
        if self.guess != "maps" and (self.maps is not None or self.text is not None):
            raise ValueError(f"maps and text belong to guess = 'maps', not '{self.guess}': set that, or leave them out")
        return self
