"""The text, the task it is put to, and how clients share it."""

import string
from typing import Literal

from pydantic import Field, model_validator

from spryfl.config.part import Fraction, Part, Positive, PositiveFloat, Source


class DataConfig(Part):
    """The text and its labels."""

    name: Source = Field("builtin:movie_reviews", description="builtin:NAME, a hub id, a local file or folder")
    subset: str | None = Field(None, description="the hub dataset's configuration, such as 'mnli' of glue")
    text_columns: tuple[str, ...] = Field(
        ("text",), min_length=1, description="what is read, in order; classification: one, a pair, or three"
    )
    label_column: str = Field("label", description="what is predicted: a class, or qa's answers")
    test_split: str | None = Field(
        None, description="split evaluated on; test, else validation, by default; train cuts a part off that"
    )
    test_fraction: Fraction = Field(0.2, description="cut off train where there is no test split, or where it is train")
    test_seed: int | None = Field(
        None, ge=0, lt=2**32, description="of the test rows where they are cut off train; the run's own by default"
    )
    validation_fraction: Fraction | None = Field(
        None,
        description="cut off train by the run's seed and evaluated on in place of the test rows, which stay unseen",
    )
    drop_unlabelled: bool = Field(
        False, description="leave out rows whose label is missing or -1, as SNLI's that annotators disagreed on"
    )
    max_tokens: Positive = Field(64, description="longer texts are truncated")
    max_train_examples: Positive | None = Field(None, description="so many, drawn from the seed; all by default")
    max_test_examples: Positive | None = Field(None, description="so many, drawn from the seed; all by default")


TaskKind = Literal["classification", "prompted", "qa", "language_model"]
TASK_KINDS: dict[TaskKind, str] = {
    "classification": "a classification head, trained with the adapter, on any model",
    "prompted": "a decoder's next token after a prompt, compared among one label word a class; no head is trained",
    "qa": "where in a context a question's answer stands, or that it does not; a head for both ends is trained",
    "language_model": "a decoder writes a text, or its template's last column after the rest; no head is trained",
}
WITH_CLASSES: frozenset[TaskKind] = frozenset({"classification", "prompted"})
"""Tasks whose rows have a class each."""
_OF_KINDS: dict[str, tuple[TaskKind, ...]] = {
    "template": ("prompted", "language_model"),
    "label_words": ("prompted",),
    "stride": ("qa",),
    "max_answer_tokens": ("qa",),
    "null_threshold": ("qa",),
}


class TaskConfig(Part):
    """What a model is made to tell of a text."""

    kind: TaskKind = Field("classification", description="see: spry list tasks")
    template: str | None = Field(
        None,
        description="prompted: the prompt, such as 'Review: {text}\\nSentiment:'; language_model: prompt and answer, "
        "such as '{instruction}\\n\\n{response}', of which the last column is learnt; by default the text",
    )
    label_words: tuple[str, ...] | None = Field(
        None, description="prompted: one a class, in the order of the class numbers, such as [' negative', ' positive']"
    )
    stride: int | None = Field(
        None, ge=0, description="qa: tokens that neighbouring windows share; a quarter of data.max_tokens by default"
    )
    max_answer_tokens: Positive = Field(30, description="qa: longer answers are never given")
    null_threshold: float = Field(
        0.0, allow_inf_nan=False, description="qa: no answer is given where the null score exceeds the best by more"
    )

    @model_validator(mode="after")
    def _fields_belong_to_their_kind(self) -> "TaskConfig":
        for name, kinds in _OF_KINDS.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} belongs to kind = {' or '.join(map(repr, kinds))}, not '{self.kind}': set it, or leave "
                    f"{name} out"
                )
        if self.kind == "prompted" and (self.template is None or self.label_words is None):
            raise ValueError(
                "kind = 'prompted' needs a template and label_words, such as template = 'Review: {text}\\nSentiment:' "
                "and label_words = [' negative', ' positive']"
            )
        return self

    @property
    def pieces(self) -> tuple[tuple[str, str | None], ...]:
        """The template in order: literal text, and the column that follows it, None after the last piece.

        Raises:
            ValueError: it is no template.
        """
        found = []
        for literal, column, spec, conversion in string.Formatter().parse(self.template or ""):
            if spec or conversion:
                raise ValueError(f"'{{{column}}}' is given a format: write the column alone")
            found.append((literal, column))
        return tuple(found)

    @property
    def written_column(self) -> str | None:
        """The column a language model learns to write, its template's last; None where it has no template."""
        return self.pieces[-1][1] if self.template else None


class PartitionConfig(Part):
    """How training examples are shared among clients."""

    kind: Literal["dirichlet", "quantity", "iid", "column", "own"] = Field(
        "dirichlet",
        description="unequal labels, unequal sizes, neither, one client for each value of a column; own: every client "
        "brings its own data, over Flower",
    )
    num_clients: Positive = Field(100, description="kind column: the column decides")
    alpha: PositiveFloat = Field(
        1.0, description="dirichlet, quantity: the Dirichlet distribution's concentration; smaller is more unequal"
    )
    min_examples: Positive = Field(2, description="every client holds at least this many, held-out ones included")
    column: str | None = Field(None, description="kind column: one client for each value")

    @model_validator(mode="after")
    def _column_belongs_to_its_kind(self) -> "PartitionConfig":
        if (self.kind == "column") != (self.column is not None):
            raise ValueError("kind = 'column' and column = NAME go together: give both or neither")
        return self
