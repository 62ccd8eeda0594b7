"""The works of `spry bench memory`: an explicit table."""

from dataclasses import dataclass
from typing import Any, Literal

Precision = Literal["float32", "bfloat16", "nf4", "int8"]
Units = Literal["all", "one"]


@dataclass(frozen=True)
class Case:
    """One estimator on a work.

    Attributes:
        k: tangents, or directions.
        units: all of them and the head, or one and the head: Spry's assignment where the cohort is at least
            as large as the number of units. Its figures are means over units spread evenly over the layers.
    """

    estimator: str
    k: int = 1
    units: Units = "all"


@dataclass(frozen=True)
class Work:
    """A model and a batch on which cases are measured, each in a process of its own.

    Attributes:
        shape: of `models.shapes`.
        layers: instead of the shape's own.
        cases: in the order they are measured.
        repeats: rounds over the cases; the seconds are medians over rounds, so that a noisy neighbour slows all
            cases alike.
        timed_apart: whether a step is timed after the metered one: the meter looks at every operation, which takes a
            pass in many small chunks up to a tenth of its time.
    """

    name: str
    shape: str
    precision: Precision
    streamed: bool
    batch: int
    tokens: int
    cases: tuple[Case, ...]
    repeats: int = 1
    timed_apart: bool = False
    layers: int | None = None

    def row(self, case: Case) -> dict[str, Any]:
        """The fields of a row that say what is measured."""
        return {
            "work": self.name,
            "model": self.shape,
            "estimator": case.estimator,
            "precision": self.precision,
            "streamed": self.streamed,
            "batch": self.batch,
            "tokens": self.tokens,
            "k": case.k,
            "units": case.units,
        }


EVERY = tuple(
    Case(name)
    for name in (
        "inference",
        "forward",
        "func_jvp",
        "zeroth_order",
        "backprop",
        "backprop_checkpointed",
        "backprop_budgeted",
    )
)
SPRY = (Case("forward", k=8), Case("forward", units="one"))

WORKS: dict[str, Work] = {
    work.name: work
    for work in (
        Work("bert-large", "bert-large", "float32", False, 8, 512, (*EVERY, *SPRY), timed_apart=True),
        Work(
            "bert-large-6-layers",
            "bert-large",
            "float32",
            False,
            8,
            512,
            (*EVERY, *SPRY),
            repeats=3,
            timed_apart=True,
            layers=6,
        ),
        Work("llama2-7b", "llama2-7b", "nf4", False, 8, 64, EVERY),
        Work("llama2-7b-streamed", "llama2-7b", "nf4", True, 8, 64, EVERY),
        Work("opt-13b-streamed", "opt-13b", "nf4", True, 4, 64, EVERY),
        Work("opt-13b", "opt-13b", "nf4", False, 4, 384, EVERY),
        Work("llama2-7b-long", "llama2-7b", "nf4", False, 8, 384, EVERY),
    )
}

GROWTH_SHAPE = "bert-narrow"
GROWTH_LAYERS = (6, 12, 24, 48)
GROWTH_TOKENS = (128, 256, 512, 1024, 2048)
GROWTH_BATCH = 2
GROWTH_CASES = (Case("forward"), Case("backprop_checkpointed"))
