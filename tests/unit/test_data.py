"""Built-in and local data, and their mistakes."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets.exceptions import DatasetGenerationCastError
from transformers import AutoTokenizer

from spryfl.config import DataConfig
from spryfl.data.builtin import FOLDER
from spryfl.data.classification import tokenize
from spryfl.data.loading import load_own_rows, load_rows
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


def test_rows_to_validate_on_are_none_of_the_test_rows(tmp_path: Path) -> None:
    config = DataConfig(name=str(write(tmp_path, "data.jsonl", ROWS)), test_seed=3)
    unseen = {text for seed in range(4) for text in load_rows(config, seed).test["text"][:]}
    assert len(unseen) == 4  # the same whatever the run's seed
    validated = [load_rows(config.model_copy(update={"validation_fraction": 0.25}), seed) for seed in range(4)]
    for rows in validated:
        assert (len(rows.train), len(rows.test)) == (12, 4)
        assert not unseen & set(rows.train["text"][:] + rows.test["text"][:])
    assert validated[0].test["text"][:] != validated[1].test["text"][:]
    write(tmp_path / "split", "train.jsonl", ROWS)
    write(tmp_path / "split", "test.jsonl", [{"text": "unseen", "label": 0}] * 4)
    rows = load_rows(DataConfig(name=str(tmp_path / "split"), validation_fraction=0.25), 0)
    assert sorted(rows.train["text"][:] + rows.test["text"][:]) == sorted(row["text"] for row in ROWS)


def test_a_test_split_whose_labels_are_withheld(tmp_path: Path) -> None:
    write(tmp_path, "train.parquet", ROWS)
    write(tmp_path, "test.parquet", [{"text": "a", "label": -1}] * 3)
    with pytest.raises(DataError, match=r"3 of 3 test rows .* set data.test_split = 'validation'"):
        load_rows(DataConfig(name=str(tmp_path)), 0)


def test_clients_own_classes_by_name(tmp_path: Path) -> None:
    """A file that numbers its classes in another order than the server's, and one of plain text."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    Dataset.from_dict({"text": ["good", "bad"], "label": [0, 1]}, features).to_parquet(str(tmp_path / "own.parquet"))
    write(tmp_path, "own.jsonl", [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}])
    for ending in ("parquet", "jsonl"):
        rows = load_own_rows(DataConfig(name=str(tmp_path / f"own.{ending}")), ("neg", "pos"))
        assert rows.train["label"][:] == [1, 0]


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


def test_parts_cut_off_train_hold_whole_questions(tmp_path: Path) -> None:
    """What is asked in training is not asked in the test, nor in validation."""
    rows = [{"paragraph": f"p{i // 8}", "question": f"q{i // 4}", "answer": f"a{i}", "label": i % 2} for i in range(80)]
    columns = ("paragraph", "question", "answer")
    config = DataConfig(name=str(write(tmp_path, "data.parquet", rows)), text_columns=columns)
    for validation in (None, 0.2):
        found = load_rows(config.model_copy(update={"validation_fraction": validation}), 3)
        assert len(found.test) > 0
        assert len(found.test) % 4 == 0
        assert not set(found.train["question"][:]) & set(found.test["question"][:])


@pytest.mark.parametrize("texts", [1, 2, 3])
def test_truncated_rows_are_counted(tiny_model: Path, texts: int) -> None:
    """Not those that fit exactly, of one text, a pair, or a paragraph with a question and an answer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    columns = ("paragraph", "question", "answer")[:texts]
    rows = Dataset.from_dict(
        {"paragraph": ["good", "good film good film", "good film"]}
        | dict.fromkeys(columns[1:], ["film"] * 3)
        | {"label": [0] * 3}
    )
    whole = tokenize(rows, DataConfig(text_columns=columns, max_tokens=32), tokenizer)
    fits = [len(ids["input_ids"]) for ids in whole.encodings]
    assert fits[0] < fits[2] < fits[1]
    counts = [
        tokenize(rows, DataConfig(text_columns=columns, max_tokens=most), tokenizer).num_truncated
        for most in (fits[1], fits[1] - 1, fits[2], fits[2] - 1)
    ]
    assert counts == [0, 1, 1, 2]


def test_what_is_not_chosen_in_silence(tmp_path: Path) -> None:
    for name in ("train.csv", "valid.jsonl"):
        write(tmp_path, name, ROWS)
    config = DataConfig(name=str(tmp_path))
    assert len(load_rows(config, 0).train) == len(ROWS)  # valid.jsonl is what is tested on
    with pytest.raises(DataError, match=r"data\.subset = 'mnli': .* has none"):
        load_rows(config.model_copy(update={"subset": "mnli"}), 0)
    write(tmp_path, "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"both train\.csv and train\.jsonl in it: leave one"):
        load_rows(config, 0)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("Dataset scripts are no longer supported, but found a.py"),
            r"scripts are no longer supported.*: use a copy of it in Parquet",
        ),
        (
            DatasetGenerationCastError("All the data files must have the same columns"),
            r"on the hub, but cannot be read: All the data files must",
        ),
    ],
)
def test_a_hub_dataset_that_cannot_be_read(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match=message):
        load_rows(DataConfig(name="someone/something"), 0)


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*given: object) -> DatasetDict:
        asked.append(given)
        return DatasetDict(train=Dataset.from_list(ROWS), validation_matched=Dataset.from_list(ROWS[:6]))

    monkeypatch.setattr("datasets.load_dataset", load)
    rows = load_rows(DataConfig(name="some/glue", subset="mnli"), 0)
    assert asked == [("some/glue", "mnli")]
    assert (len(rows.train), len(rows.test), rows.num_labels) == (20, 6, 2)


def test_rows_without_a_label_may_be_dropped(tmp_path: Path) -> None:
    """As SNLI has them; a split of nothing else is one whose labels are withheld."""
    rows = [{"text": f"row {i}", "label": i % 3 - 1} for i in range(30)]
    config = DataConfig(name=str(write(tmp_path, "data.parquet", rows)))
    with pytest.raises(DataError, match=r"10 of 30 train rows have no label, .* or set data\.drop_unlabelled = true"):
        load_rows(config, 0)
    dropping = config.model_copy(update={"drop_unlabelled": True})
    found = load_rows(dropping, 0)
    assert len(found.train) + len(found.test) == 20
    assert set(found.train["label"][:]) == {0, 1}
    assert load_own_rows(dropping, ("0", "1")).train["text"][:2] == ["row 1", "row 2"]
    write(tmp_path, "train.parquet", rows)
    write(tmp_path, "test.parquet", [row | {"label": -1} for row in rows])
    with pytest.raises(DataError, match="labels seem to be withheld"):
        load_rows(dropping.model_copy(update={"name": str(tmp_path)}), 0)


def test_labels_may_be_text(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": ("yes", "no", "maybe")[i % 3]} for i in range(20)]
    loaded = load_rows(DataConfig(name=str(write(tmp_path, "data.csv", rows))), 0)
    assert loaded.label_names == ("maybe", "no", "yes")
    both = zip(loaded.train["text"], loaded.train["label"], strict=True)
    assert all(("maybe", "no", "yes")[label] == rows[int(text.split()[1])]["label"] for text, label in both)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_words_for_nothing_are_words(tmp_path: Path, ending: str) -> None:
    """Of a file of plain text only an empty cell is no value."""
    rows: list[dict[str, object]] = [
        {"text": ("N/A", "null")[i % 2], "label": ("None", "NA")[i % 2]} for i in range(20)
    ]
    path = write(tmp_path, f"data.{ending}", [*rows, {"text": "unlabelled", "label": ""}])
    loaded = load_rows(DataConfig(name=str(path), drop_unlabelled=True), 0)
    assert loaded.label_names == ("NA", "None")
    assert len(loaded.train) + len(loaded.test) == 20
    assert set(zip(loaded.train["text"][:], loaded.train["label"][:], strict=True)) == {("N/A", 1), ("null", 0)}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"text_columns": ("txt",)}, "no column 'txt'. Did you mean 'text'"),
        (ROWS, {"label_column": "lable"}, "data.label_column: split train has no column 'lable'"),
        ([*ROWS, {"text": "a", "label": -1}], {}, "1 of 21 train rows have no label, first row 20 with -1"),
        ([*ROWS, {"text": "a", "label": None}], {}, "1 of 21 train rows have no label, first row 20 with None"),
        ([{"text": "a", "label": 0}] * 20, {}, "same label"),
        (
            [{"text": "a", "label": 1 + i % 2} for i in range(20)],
            {},
            "train's labels begin at 1; number",
        ),
        ([{"text": "a", "label": ["x"]}] * 20, {}, "train row 0 holds a list, which is no class: choose a column of"),
        ([{"text": "a", "label": {"text": ["x"]}}] * 20, {}, "set task.kind = 'qa' if these are answers"),
        ([{"text": "a", "label": 0.5}] * 20, {}, "train row 0 has the label 0.5, which is no class"),
        ([{"text": None, "label": 0}, *ROWS], {}, "train row 0, column 'text' holds None, not text"),
        ([*ROWS, {"text": None, "label": 0}], {}, "train row 20, column 'text' holds None, not text"),
        (ROWS[:2], {}, "too few"),
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


def test_data_that_may_not_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(DataError, match=r"data\.name = '.*': it cannot be looked at: Permission denied"):
        load_rows(DataConfig(name=str(tmp_path)), 0)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_rows(DataConfig(name=str(tmp_path / "data.parquet")), 0)
    for name in ("data.csv", "data.jsonl"):
        (tmp_path / name).write_bytes(b"")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    for name in ("data.csv", "data.jsonl", "none.parquet"):
        with pytest.raises(DataError, match=f"{name}: no rows in it"):
            load_rows(DataConfig(name=str(tmp_path / name)), 0)
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
