"""What each task's rows must hold; the first that does not is named, with the remedy."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from spryfl.config import DataConfig, TaskConfig, TaskKind
from spryfl.errors import DataError, nearest


def check_columns(rows: Dataset, split: str, config: DataConfig, task: TaskConfig) -> None:
    """Raise DataError if a split is empty, lacks a column of the task's, or holds what cannot be read."""
    if len(rows) == 0:
        raise DataError(f"data.name = '{config.name}': split {split} has no rows: fill it, or leave it out")
    labels = [] if task.kind == "language_model" else [config.label_column]
    for column in (*config.text_columns, *labels):
        if column not in rows.column_names:
            key = "label_column" if column in labels else "text_columns"
            raise DataError(
                f"data.{key}: split {split} has no column '{column}'.{nearest(column, rows.column_names)} "
                f"It has {rows.column_names}"
            )
    if config.label_column in config.text_columns and labels:
        raise DataError(
            f"data.text_columns holds data.label_column '{config.label_column}': it would be read and predicted; take "
            "it out"
        )
    for column in config.text_columns:
        # Read by column, so that a number or a null among the texts is named by its row.
        for index, value in enumerate(rows[column]):
            if not isinstance(value, str):
                raise DataError(
                    f"data.text_columns: {split} row {index}, column '{column}' holds {value!r}, not text: "
                    "mend or drop the row"
                )
    if task.kind in CHECKS:
        CHECKS[task.kind](rows, split, config, task)


def _check_prompts(rows: Dataset, split: str, config: DataConfig, task: TaskConfig) -> None:
    """A prompt is not empty."""
    if any(literal.strip() for literal, _ in task.pieces):
        return
    for index, texts in enumerate(zip(*(rows[column] for column in config.text_columns), strict=True)):
        if not "".join(texts).strip():
            raise DataError(f"{split} row {index}: its prompt is empty: drop the row, or give task.template words")


def _check_written(rows: Dataset, split: str, config: DataConfig, task: TaskConfig) -> None:
    """The text to be written is not empty."""
    column = task.written_column or config.text_columns[0]
    for index, text in enumerate(rows[column]):
        if not text.strip():
            raise DataError(
                f"{split} row {index}, column '{column}' is empty, so there is nothing to learn: drop the row"
            )


def _check_answers(rows: Dataset, split: str, config: DataConfig, task: TaskConfig) -> None:
    """SQuAD's answers: {text: [..], answer_start: [..]}, each where it says in the context, both empty for none."""
    column, context_column = config.label_column, config.text_columns[1]
    for index, (answers, context) in enumerate(zip(rows[column], rows[context_column], strict=True)):
        if isinstance(answers, str):
            raise DataError(
                f"data.label_column: {split} row {index}, column '{column}' holds text, {answers[:40]!r}, not a table "
                "of answers, which CSV has no room for: write the rows as JSONL or Parquet"
            )
        texts, starts = _lists(answers)
        if texts is None or starts is None or len(texts) != len(starts):
            raise DataError(
                f"data.label_column: {split} row {index}, column '{column}' holds {str(answers)[:80]}, not "
                "{text: [..], answer_start: [..]}, as many texts as whole numbers (no answer: none of both)"
            )
        if not context.strip():
            raise DataError(f"{split} row {index}, column '{context_column}' is empty: drop the row")
        for text, start in zip(texts, starts, strict=True):
            if not text.strip():
                raise DataError(
                    f"{split} row {index}: an answer is empty: mend it, or leave it out (no answers mean that there is "
                    "none)"
                )
            if start < 0 or context[start : start + len(text)] != text:
                found = context[max(start, 0) : max(start, 0) + len(text)]
                raise DataError(
                    f"{split} row {index}: the answer {text[:40]!r} is not at character {start} of its context, where "
                    f"{found[:40]!r} stands: mend answer_start, or drop the row"
                )


def _lists(answers: Any) -> tuple[list[Any] | None, list[Any] | None]:
    if not isinstance(answers, dict):
        return None, None
    texts, starts = answers.get("text"), answers.get("answer_start")
    right = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    right = right and isinstance(starts, list) and all(isinstance(start, int) for start in starts)
    return (texts, starts) if right else (None, None)


CHECKS: dict[TaskKind, Callable[[Dataset, str, DataConfig, TaskConfig], None]] = {
    "prompted": _check_prompts,
    "language_model": _check_written,
    "qa": _check_answers,
}
