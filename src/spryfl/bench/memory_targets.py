"""What the memory bench had to reach: an explicit table, each target held against what was measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from spryfl.bench.works import Case

Row = dict[str, Any]
ACTIVATIONS, RESIDENT, SECONDS = "activation_peak_bytes", "resident_peak_bytes", "cpu_seconds_per_step"
INFERENCE, FORWARD, CHECKPOINTED = Case("inference"), Case("forward"), Case("backprop_checkpointed")
ONE_UNIT, EIGHT = Case("forward", units="one"), Case("forward", k=8)
GB = 1e9


@dataclass(frozen=True)
class Target:
    """A figure of the bench and what it must be at most.

    Attributes:
        what: is measured.
        at_most: the target, in `unit`.
        unit: empty for a ratio.
        of: the figure from the bench's rows; a KeyError where a row is missing.
    """

    what: str
    at_most: float
    unit: str
    of: Callable[["Measured"], float]

    def line(self, measured: "Measured") -> str | None:
        """Of the table; None where it was not measured."""
        try:
            value = self.of(measured)
        except KeyError:
            return None
        missed = "" if value <= self.at_most else "**missed**: "
        return f"| {self.what} | {self._text(self.at_most)} | {missed}{self._text(value)} |"

    def _text(self, value: float) -> str:
        return f"{100 * value:.3g} %" if self.unit == "%" else f"{value:.3g} {self.unit}".rstrip()


class Measured:
    """The rows of a bench, by what was asked."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def figure(self, work: str, case: Case, key: str) -> float:
        """One case's figure; KeyError if it was not measured."""
        wanted = (work, case.estimator, case.k, case.units)
        for row in self._rows:
            if (row["work"], row.get("estimator"), row.get("k"), row.get("units")) == wanted and key in row:
                return float(row[key])
        raise KeyError(wanted)

    def error(self, precision: str, against: str) -> float:
        """Relative error of forward-mode slopes in a precision against another."""
        for row in self._rows:
            if (row.get("estimator"), row.get("precision"), row.get("against")) == ("forward", precision, against):
                return float(row["relative_error"])
        raise KeyError(precision)

    def ratio(self, work: str, case: Case, basis: Case, key: str) -> float:
        """A case's figure in those of another."""
        return self.figure(work, case, key) / self.figure(work, basis, key)


def _resident(work: str) -> Callable[[Measured], float]:
    return lambda m: m.figure(work, FORWARD, RESIDENT) / GB


def _times(work: str, case: Case, basis: Case, passes: int = 1) -> Callable[[Measured], float]:
    return lambda m: m.ratio(work, case, basis, SECONDS) / passes


TARGETS = (
    Target(
        "BERT-large, forward mode's activations, in stock inference's",
        1.5,
        "",
        lambda m: m.ratio("bert-large", FORWARD, INFERENCE, ACTIVATIONS),
    ),
    Target(
        "the same, in checkpointed backprop's",
        0.2,
        "",
        lambda m: m.ratio("bert-large", FORWARD, CHECKPOINTED, ACTIVATIONS),
    ),
    Target("Llama2-7B NF4, 8 x 64 tokens, resident", 4.8, "GB", _resident("llama2-7b")),
    Target("OPT-13B NF4, 4 x 384 tokens, resident", 9.0, "GB", _resident("opt-13b")),
    Target("Llama2-7B NF4, streamed, resident", 1.5, "GB", _resident("llama2-7b-streamed")),
    Target("OPT-13B NF4, streamed, resident", 2.0, "GB", _resident("opt-13b-streamed")),
    *(
        target
        for layers, work in ((24, "bert-large"), (6, "bert-large-6-layers"))
        for target in (
            Target(
                f"BERT-large, {layers} layers: time of forward mode, in inferences",
                2.2,
                "",
                _times(work, FORWARD, INFERENCE),
            ),
            Target("the same, the average assignment of one unit", 1.7, "", _times(work, ONE_UNIT, INFERENCE)),
            Target("the same, K = 8 in one pass, of eight passes", 0.6, "%", _times(work, EIGHT, FORWARD, 8)),
        )
    ),
    Target("slopes in bf16, relative error to fp32's", 0.02, "%", lambda m: m.error("bfloat16", "float32")),
    Target(
        "slopes with NF4 weights in bf16, to the same weights' in fp32",
        0.02,
        "%",
        lambda m: m.error("nf4, computed in bfloat16", "nf4, computed in float32"),
    ),
    Target(
        "the same, to unquantized weights' (another model)",
        0.02,
        "%",
        lambda m: m.error("nf4, computed in bfloat16", "float32"),
    ),
)


def targets_table(rows: Sequence[Row]) -> str:
    """Every target beside what was measured; nothing where nothing of them was."""
    measured = Measured(rows)
    lines = [line for target in TARGETS if (line := target.line(measured)) is not None]
    return "\n".join(["| | must be at most | is |", "| --- | ---: | ---: |", *lines, ""]) if lines else ""
