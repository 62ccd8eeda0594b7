"""Public text for the server to fit on, in the task's own form: rows with the task's text columns and random labels."""

from pathlib import Path

import numpy as np
from datasets import Dataset

from spryfl.config import DataConfig, GuideConfig
from spryfl.data.loading import load_splits, quietly
from spryfl.errors import DataError, nearest


def load_public_text(guide: GuideConfig, data: DataConfig, num_labels: int, seed: int) -> Dataset:
    """Some rows of the public text, shuffled, with random labels where there are classes: nothing of the task's own.

    Args:
        guide: names the text: any dataset by name, of which the train split is read, or a file of plain text, a text
            a line (for tasks with two columns, two lines a row).
        data: the task's columns.

    Raises:
        DataError: the text is missing, lacks a column, or is empty.
    """
    name, columns = guide.text or "", guide.text_columns or data.text_columns
    if len(columns) != len(data.text_columns):
        raise DataError(f"guide.text_columns: {len(columns)} columns, but the task has {len(data.text_columns)}")
    texts = _lines(Path(name).expanduser(), len(columns)) if name.endswith(".txt") else _columns(name, columns)
    count = min(len(column) for column in texts)
    generator = np.random.Generator(np.random.Philox(key=seed))
    chosen = generator.permutation(count)[: guide.num_texts]
    if len(chosen) == 0:
        raise DataError(f"guide.text = '{name}': no text in it")
    rows = {own: [column[i] for i in chosen] for own, column in zip(data.text_columns, texts, strict=True)}
    if num_labels:
        rows |= {data.label_column: generator.integers(0, num_labels, len(chosen)).tolist()}
    return Dataset.from_dict(rows)


def _lines(path: Path, num_columns: int) -> list[list[str]]:
    if not path.is_file():
        raise DataError(f"guide.text = '{path}': no such file (looked in {Path.cwd()})")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"guide.text = '{path}': byte {error.start} is not UTF-8: save the file as UTF-8") from None
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return [lines[number::num_columns] for number in range(num_columns)]


def _columns(name: str, columns: tuple[str, ...]) -> list[list[str]]:
    with quietly():
        try:
            splits = load_splits(DataConfig(name=name, text_columns=columns))
        except DataError as error:
            told = str(error).replace("data.name", "guide.text").replace("known endings: ", "known endings: .txt, ")
            raise DataError(told) from error
    rows = splits.get("train", next(iter(splits.values())))
    for column in columns:
        if column not in rows.column_names:
            hint = nearest(column, rows.column_names)
            raise DataError(f"guide.text_columns: {name} has no column '{column}'.{hint} It has {rows.column_names}")
    kept = [row for row in zip(*(rows[column] for column in columns), strict=True) if all(row)]
    return [[str(row[i]) for row in kept] for i in range(len(columns))]
