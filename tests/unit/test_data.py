"""Built-in and local data, and their mistakes."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spryfl.config import DataConfig
from spryfl.data.builtin import FOLDER
from spryfl.data.loading import load_rows
from spryfl.errors import DataError

ROWS = [{"text": f"row {i}", "label": i % 2} for i in range(20)]


def write(folder: Path, name: str, rows: list[dict[str, object]]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv", "jsonl"])
def test_local_files(tmp_path: Path, ending: str) -> None:
    rows = load_rows(DataConfig(name=str(write(tmp_path, f"data.{ending}", ROWS)), test_fraction=0.25), seed=0)
    assert (len(rows.train), len(rows.test), rows.num_labels) == (15, 5, 2)
    assert not set(rows.train["text"][:]) & set(rows.test["text"][:])
    again = load_rows(DataConfig(name=str(tmp_path / f"data.{ending}"), test_fraction=0.25), seed=0)
    assert again.test["text"][:] == rows.test["text"][:]


def test_a_folder_with_splits(tmp_path: Path) -> None:
    write(tmp_path, "train.parquet", ROWS)
    write(tmp_path, "validation.parquet", ROWS[:4])
    write(tmp_path, "test.parquet", ROWS[:6])
    assert len(load_rows(DataConfig(name=str(tmp_path)), 0).test) == 6
    assert len(load_rows(DataConfig(name=str(tmp_path), test_split="validation"), 0).test) == 4
    with pytest.raises(DataError, match="Did you mean 'validation'"):
        load_rows(DataConfig(name=str(tmp_path), test_split="validatoin"), 0)


def test_a_part_of_train_may_stand_for_the_test_split(tmp_path: Path) -> None:
    write(tmp_path, "train.parquet", ROWS)
    write(tmp_path, "test.parquet", [{"text": "unseen", "label": 0}] * 4)
    rows = load_rows(DataConfig(name=str(tmp_path), test_split="train", test_fraction=0.2), 0)
    assert sorted(rows.train["text"][:] + rows.test["text"][:]) == sorted(row["text"] for row in ROWS)
    assert len(rows.test) == len(ROWS) // 5


def test_a_part_of_the_test_split_holds_whole_questions(tmp_path: Path) -> None:
    """Of rows of three texts, those alike in the first two: all or none."""
    rows = [{"paragraph": f"p{i // 8}", "question": f"q{i // 4}", "answer": f"a{i}", "label": i % 2} for i in range(80)]
    for split in ("train", "test"):
        write(tmp_path, f"{split}.parquet", rows)
    columns = ("paragraph", "question", "answer")
    three = DataConfig(name=str(tmp_path), text_columns=columns, max_train_examples=10, max_test_examples=10)
    found = load_rows(three, 0)
    questions = found.test["question"][:]
    assert (len(questions), len(set(questions))) == (8, 2)
    assert questions != load_rows(three, 1).test["question"][:]
    assert len(set(found.train["question"][:])) > 3  # nothing is asked of train's
    pair = three.model_copy(update={"text_columns": columns[:2]})
    assert len(load_rows(pair, 0).test) == 10
    with pytest.raises(DataError, match="max_test_examples = 3: fewer rows than one value of paragraph, question has"):
        load_rows(three.model_copy(update={"max_test_examples": 3}), 0)


def test_labels_may_be_text(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": ("yes", "no", "maybe")[i % 3]} for i in range(20)]
    loaded = load_rows(DataConfig(name=str(write(tmp_path, "data.csv", rows))), 0)
    assert loaded.label_names == ("maybe", "no", "yes")
    assert set(loaded.train["label"][:]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"text_columns": ("txt",)}, "no column 'txt'. Did you mean 'text'"),
        (ROWS, {"label_column": "lable"}, "data.label_column: split train has no column 'lable'"),
        ([*ROWS, {"text": "a", "label": -1}], {}, "1 of 17 train rows have a label out of range, first row"),
        ([{"text": "a", "label": 1}] * 20, {}, "same label"),
        ([{"text": "a", "label": 0.5}] * 20, {}, "out of range"),
        ([{"text": None, "label": 0}, *ROWS], {}, "holds None, not text"),
        (ROWS[:1], {}, "too few"),
    ],
)
def test_mistakes_in_data(tmp_path: Path, rows: list[dict[str, object]], options: dict, message: str) -> None:
    path = write(tmp_path, "data.parquet", rows)
    with pytest.raises(DataError) as caught:
        load_rows(DataConfig(name=str(path), **options), seed=1)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:movie_review", "Did you mean 'movie_reviews'"),
        ("./nowhere", "no such file or folder"),
        ("data.csv", "no such file or folder"),
        ("someone/something", "the hub cannot be reached"),
    ],
)
def test_data_that_is_not_there(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=message):
        load_rows(DataConfig(name=name), 0)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_rows(DataConfig(name=str(tmp_path / "data.parquet")), 0)
    (tmp_path / "data.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match="not Parquet, CSV or JSONL"):
        load_rows(DataConfig(name=str(tmp_path / "data.xlsx")), 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files"):
        load_rows(DataConfig(name=str(tmp_path / "empty")), 0)


def test_builtin_data_is_what_its_readme_says() -> None:
    movies = load_rows(DataConfig(name="builtin:movie_reviews"), 0)
    assert (len(movies.train), len(movies.test)) == (8024, 2046)
    everything = load_rows(DataConfig(name="builtin:sentiment_by_domain"), 0)
    assert (len(everything.train), len(everything.test)) == (15394, 3848)
    assert set(everything.train["domain"][:]) == {"movie_reviews", "tweets", "product_reviews", "editorials"}
    for rows in (everything.train, everything.test):
        rating, label = np.array(rows["rating"][:]), np.array(rows["label"][:])
        assert (np.abs(rating) >= 0.5).all()
        assert ((rating > 0) == (label == 1)).all()
    assert not set(everything.train["text"][:]) & set(everything.test["text"][:])
    assert "MIT" in (FOLDER / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("name", "columns", "labels"),
    [("sst2", ("sentence",), 2), ("ag_news", ("text",), 4), ("snli", ("premise", "hypothesis"), 3)],
)
def test_shared_datasets(shared_data: Path, name: str, columns: tuple[str, ...], labels: int) -> None:
    rows = load_rows(DataConfig(name=str(shared_data / name), text_columns=columns, max_train_examples=500), 0)
    assert rows.num_labels == labels
    assert len(rows.train) == 500
