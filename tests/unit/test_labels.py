"""Labels of any type as class numbers, and what cannot be one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from spryfl.config import DataConfig
from spryfl.data.labels import numbered_as, with_class_numbers
from spryfl.data.loading import load_rows
from spryfl.errors import DataError

CONFIG = DataConfig()


def rows(labels: list[Any], names: list[str] | None = None) -> Dataset:
    texts = {"text": [f"row {row}" for row in range(len(labels))]}
    if names is None:
        return Dataset.from_dict(texts | {"label": labels})
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict(texts | {"label": labels}, features)


def numbers(train: Dataset, test: Dataset, config: DataConfig = CONFIG) -> tuple[list[int], list[int]]:
    found, _ = with_class_numbers({"train": train, "test": test}, config)
    return found["train"]["label"][:], found["test"]["label"][:]


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (rows(["b", "a", "b"]), rows(["a", "b"]), ([1, 0, 1], [0, 1])),
        (rows([0, 1, 2], ["a", "b", "c"]), rows([0, 1], ["a", "c"]), ([0, 1, 2], [0, 2])),  # classes go by name
        (rows([0, 1], ["b", "a"]), rows(["a", "b"]), ([0, 1], [1, 0])),
        (rows([0, 1], ["b", "a"]), rows([1, 0]), ([0, 1], [1, 0])),  # no names: the numbers are meant
        (rows([0, 1]), rows([1, 0], ["b", "a"]), ([0, 1], [1, 0])),
        (rows(["0", "1"]), rows([1, 0]), ([0, 1], [1, 0])),
        (rows([True, False]), rows([1, 0]), ([1, 0], [1, 0])),
        (rows([1.0, 0.0]), rows([1, 0]), ([1, 0], [1, 0])),
        (rows([str(number) for number in range(12)]), rows(["2", "11"]), (list(range(12)), [2, 11])),
    ],
)
def test_labels_go_by_their_names(train: Dataset, test: Dataset, expected: tuple[list[int], list[int]]) -> None:
    assert numbers(train, test) == expected


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (rows([0, 4, 4]), rows([0]), "train's labels are 0, 4; number classes from 0 without gaps"),
        (rows(["a", "b"]), rows([0, 1]), "2 of 2 test rows have a label that train has not, first row 0 with 0"),
        (rows(["a", "b"]), rows([0], ["c"]), "1 of 1 test rows have a label that train has not"),
        (rows([0, 1]), rows([2, 0]), "1 of 2 test rows have a label that train has not, first row 0 with 2"),
        (rows([-1, 1, 0]), rows([0]), r"no label, first row 0 with -1.* \(if -1 is a class, number classes from 0\)"),
        (rows(["a", "", "b"]), rows(["a"]), "1 of 3 train rows have no label, first row 1 with ''"),
        (rows([0.0, math.nan, 1.0]), rows([0]), "1 of 3 train rows have no label, first row 1 with nan"),
        (rows([None, None]), rows([0]), "2 of 2 train rows have no label"),
    ],
)
def test_labels_that_are_none(train: Dataset, test: Dataset, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        numbers(train, test)
    assert "withheld" not in str(caught.value)


def test_an_empty_cell_among_a_csvs_numbers_is_no_label(tmp_path: Path) -> None:
    """Which makes them all floats to its reader."""
    path = tmp_path / "data.csv"
    path.write_text("text,label\n" + "".join(f"row {i},{i % 2 if i else ''}\n" for i in range(21)))
    with pytest.raises(DataError, match=r"1 of 21 train rows have no label, first row 0 .*drop_unlabelled = true"):
        load_rows(DataConfig(name=str(path)), 0)
    found = load_rows(DataConfig(name=str(path), drop_unlabelled=True), 0)
    assert found.label_names == ("0", "1")
    assert [int(text.split()[1]) % 2 for text in found.train["text"]] == found.train["label"][:]
    assert len(found.train) + len(found.test) == 20


def test_a_clients_own_labels_go_by_the_servers_names() -> None:
    own = numbered_as(rows([True, False, True]), ("0", "1"), CONFIG)
    assert own["label"][:] == [1, 0, 1]
    with pytest.raises(DataError, match=r"row 1 has no label \(None\), which is none of the server's: None, a"):
        numbered_as(rows(["a", None]), ("None", "a"), CONFIG)
    with pytest.raises(DataError, match=r"row 0 has the label 0, which is none of the server's: neg, pos"):
        numbered_as(rows([0, 1]), ("neg", "pos"), CONFIG)  # its numbers may be of another order


def test_the_label_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"row {i}", "label": "ab"[i % 2]}) for i in range(20)))
    with pytest.raises(DataError, match=r"text_columns holds data\.label_column 'label'"):
        load_rows(DataConfig(name=str(path), text_columns=("text", "label")), 0)
