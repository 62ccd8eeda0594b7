"""The text, the task it is put to, and how clients share it."""

import string
from typing import Literal

from pydantic import Field, model_validator

from spryfl.config.part import Fraction, Part, Positive, PositiveFloat


class DataConfig(Part):
    """The text and its labels."""

    name: str = Field("builtin:movie_reviews", description="builtin:NAME, a hub id, a local file or folder")
    subset: str | None = Field(None, description="the hub dataset's configuration, such as 'mnli' of glue")
    text_columns: tuple[str, ...] = Field(("text",), min_length=1, max_length=2, description="one, or two for pairs")
    label_column: str = "label"
    test_split: str | None = Field(
        None, description="split evaluated on; test, else validation, by default; train cuts a part off that"
    )
    test_fraction: Fraction = Field(0.2, description="cut off train where there is no test split, or where it is train")
    max_tokens: Positive = Field(64, description="longer texts are truncated")
    max_train_examples: Positive | None = None
    max_test_examples: Positive | None = None


TaskKind = Literal["classification", "prompted"]
TASK_KINDS: dict[TaskKind, str] = {
    "classification": "a classification head, trained with the adapter, on any model",
    "prompted": "a decoder's next token after a prompt, compared among one label word a class; no head is trained",
}


class TaskConfig(Part):
    """How a model is made to tell the classes apart."""

    kind: TaskKind = "classification"
    template: str | None = Field(None, description="prompted: the prompt, such as 'Review: {text}\\nSentiment:'")
    label_words: tuple[str, ...] | None = Field(
        None, description="prompted: one a class, in the order of the class numbers, such as [' negative', ' positive']"
    )

    @model_validator(mode="after")
    def _prompt_belongs_to_its_kind(self) -> "TaskConfig":
        given = [name for name in ("template", "label_words") if getattr(self, name) is not None]
        if self.kind != "prompted" and given:
            raise ValueError(f"{' and '.join(given)} belong to kind = 'prompted': set it, or leave them out")
        if self.kind == "prompted" and len(given) < 2:
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
