"""A column of labels as class numbers from 0, and the classes' names.

A label is known by its name, whatever type a file gives it: what a ClassLabel calls it, text as it stands, a number or
truth value as its digits. So files of one dataset may number their classes differently, or be of different formats.
"""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

from datasets import ClassLabel, Dataset

from spryfl.config import DataConfig
from spryfl.errors import DataError

Name = str | None
"""Of a row's label; None where it has none."""


def with_class_numbers(splits: Mapping[str, Dataset], config: DataConfig) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """Labels as numbers from 0, by train's classes: in a ClassLabel's order, in that of numbers, or alphabetical.

    Raises:
        DataError: a label that is no class, that is missing, or that train has not; a train split of one class.
    """
    column = config.label_column
    labels = {split: rows[column][:] for split, rows in splits.items()}
    given = {split: _names(labels[split], rows.features[column]) for split, rows in splits.items()}
    names = _class_names(labels["train"], splits["train"].features[column], given["train"], column)
    number = {name: index for index, name in enumerate(names)}
    numbered = {}
    for split, rows in splits.items():
        known = given[split]
        if not any(name in number for name in known) and not _is_text(labels["train"]):
            known = _by_number(labels[split], known, names)  # one of both has classes' names, the other numbers alone
        labelled = _labelled(known, config)
        wrong = [row for row in labelled if known[row] not in number]
        if wrong:
            raise DataError(_told_of_wrong(labels[split], split, known, wrong, names, column))
        numbered[split] = _relabelled(rows, column, [number.get(name or "", -1) for name in known], labelled)
    if len(set(numbered["train"][column][:])) < 2:
        raise DataError(f"data.label_column '{column}': all train rows have the same label; nothing can be learned")
    return numbered, names


def numbered_as(rows: Dataset, names: Sequence[str], config: DataConfig) -> Dataset:
    """A client's own rows with classes numbered as the server numbers them.

    Raises:
        DataError: a label the server does not know.
    """
    column = config.label_column
    number = {name: index for index, name in enumerate(names)}
    labels = rows[column][:]
    own = _names(labels, rows.features[column])
    labelled = _labelled(own, config)
    unknown = next((row for row in labelled if own[row] not in number), None)
    if unknown is not None:
        raise DataError(
            f"data.label_column '{column}': row {unknown} has {_shown_label(own[unknown], labels[unknown])}, "
            f"which is none of the server's: {_shown(names)}"
        )
    return _relabelled(rows, column, [number.get(name or "", -1) for name in own], labelled)


def _names(labels: Sequence[Any], feature: Any) -> list[Name]:
    own = feature.names if isinstance(feature, ClassLabel) else None
    return [_name(label, own) for label in labels]


def _name(label: Any, names: Sequence[str] | None) -> Name:
    if label is None or label in ("", -1) or (isinstance(label, float) and isnan(label)):
        return None
    if names is not None:
        return names[label] if 0 <= label < len(names) else str(label)
    if isinstance(label, float) and not label.is_integer():
        return str(label)
    return str(int(label)) if isinstance(label, int | float) else str(label)


def _by_number(labels: Sequence[Any], own: Sequence[Name], names: Sequence[str]) -> list[Name]:
    """Names of train's classes of those numbers; a label that is no such number keeps its own."""
    return [
        names[label] if isinstance(label, int) and 0 <= label < len(names) else name
        for label, name in zip(labels, own, strict=True)
    ]


def _is_text(labels: Sequence[Any]) -> bool:
    return any(isinstance(label, str) for label in labels)


def _labelled(names: Sequence[Name], config: DataConfig) -> Sequence[int]:
    """Numbers of the rows that are used: all, unless those without a label are dropped and that leaves any."""
    kept = [row for row, name in enumerate(names) if name is not None] if config.drop_unlabelled else []
    return range(len(names)) if len(kept) in (0, len(names)) else kept


def _relabelled(rows: Dataset, column: str, numbers: Sequence[int], labelled: Sequence[int]) -> Dataset:
    return rows.remove_columns(column).add_column(column, list(numbers)).select(labelled)


def _class_names(labels: Sequence[Any], feature: Any, given: Sequence[Name], column: str) -> tuple[str, ...]:
    """One a class, in the order of their numbers: those that the file gives, or what train's labels are."""
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    for row, label in enumerate(labels):
        if isinstance(label, list | dict):
            raise DataError(
                f"data.label_column '{column}': train row {row} holds a {type(label).__name__}, which is no class: "
                "choose a column of classes, or set task.kind = 'qa' if these are answers"
            )
        fits = isinstance(label, str | int) or (isinstance(label, float) and label.is_integer())
        if given[row] is not None and not fits:
            raise DataError(
                f"data.label_column '{column}': train row {row} has the label {label!r}, which is no class: classes "
                "are whole numbers from 0, or text"
            )
    found = sorted({name for name in given if name is not None})
    if not all(name.isdecimal() for name in found):
        return tuple(found)
    found.sort(key=int)
    if not found or _is_text(labels):
        return tuple(found)
    if found[0] != "0":
        raise DataError(
            f"data.label_column '{column}': train's labels begin at {found[0]}; number classes from 0, or name them "
            "by text"
        )
    if len(found) != int(found[-1]) + 1:
        raise DataError(
            f"data.label_column '{column}': train's labels are {_shown(found)}; number classes from 0 without gaps, or "
            "name them by text"
        )
    return tuple(found)


def _told_of_wrong(
    labels: Sequence[Any], split: str, known: Sequence[Name], wrong: Sequence[int], names: Sequence[str], column: str
) -> str:
    row, label = wrong[0], labels[wrong[0]]
    missing = known[row] is None
    remedy = "Drop or mend those rows"
    if missing:
        remedy += ", or set data.drop_unlabelled = true"
    if label == -1:
        remedy += " (if -1 is a class, number classes from 0)"
    if missing and split == "test" and len(wrong) == len(labels):  # as benchmarks that keep their answers have it
        remedy = "Its labels seem to be withheld: set data.test_split = 'validation'"
    kind = "no label" if missing else "a label that train has not"
    return (
        f"data.label_column '{column}': {len(wrong)} of {len(labels)} {split} rows have {kind}, first row {row} with "
        f"{label!r}; labels are {_shown(names)}. {remedy}"
    )


def _shown_label(name: Name, label: Any) -> str:
    return f"no label ({label!r})" if name is None else f"the label {label!r}"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
