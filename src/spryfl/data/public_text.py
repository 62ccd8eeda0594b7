"""Public text for the server to fit on, in the task's own form: rows with the task's text columns and random labels."""

from pathlib import Path

import numpy as np
from datasets import Dataset

from spryfl.config import DataConfig, GuideConfig
from spryfl.data.loading import READERS, quietly
from spryfl.errors import DataError, nearest


def load_public_text(guide: GuideConfig, data: DataConfig, num_labels: int, seed: int) -> Dataset:
    """Some rows of the public text, shuffled, with random labels: nothing of the task's own.

    Args:
        guide: names the file: Parquet, CSV or JSONL, a folder with a train file, or plain text, a text a line
            (for tasks with two columns, two lines a row).
        data: the task's columns.

    Raises:
        DataError: the file is missing, lacks a column, or is empty.
    """
    path = Path(guide.text or "").expanduser()
    columns = guide.text_columns or data.text_columns
    if len(columns) != len(data.text_columns):
        raise DataError(f"guide.text_columns: {len(columns)} columns, but the task has {len(data.text_columns)}")
    texts = _read(path, columns)
    count = min(len(column) for column in texts)
    generator = np.random.Generator(np.random.Philox(key=seed))
    chosen = generator.permutation(count)[: guide.num_texts]
    if len(chosen) == 0:
        raise DataError(f"guide.text = '{path}': no text in it")
    rows = {name: [column[i] for i in chosen] for name, column in zip(data.text_columns, texts, strict=True)}
    return Dataset.from_dict(rows | {data.label_column: generator.integers(0, num_labels, len(chosen)).tolist()})


def _read(path: Path, columns: tuple[str, ...]) -> list[list[str]]:
    if path.is_dir():
        path = next((file for file in sorted(path.iterdir()) if file.stem == "train"), path)
    if not path.is_file():
        raise DataError(f"guide.text = '{path}': no such file (looked in {Path.cwd()})")
    if path.suffix not in READERS:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [lines[number :: len(columns)] for number in range(len(columns))]
    with quietly():
        rows = READERS[path.suffix](str(path))
    for column in columns:
        if column not in rows.column_names:
            hint = nearest(column, rows.column_names)
            raise DataError(f"guide.text_columns: {path} has no column '{column}'.{hint} It has {rows.column_names}")
    kept = [row for row in zip(*(rows[column] for column in columns), strict=True) if all(row)]
    return [[str(row[i]) for row in kept] for i in range(len(columns))]
