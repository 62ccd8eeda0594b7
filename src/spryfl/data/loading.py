"""A name -> train and test rows: built-in, local Parquet, CSV or JSONL, or a hub dataset."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from spryfl.config import WITH_CLASSES, DataConfig, TaskConfig
from spryfl.data.builtin import PREFIX, find_dataset
from spryfl.data.checks import check_columns
from spryfl.data.examples import numbered
from spryfl.errors import DataError, nearest

# The readers, not load_dataset("csv", ..): that one tells the hub's servers that a file was loaded.
READERS: dict[str, Callable[..., Dataset]] = {
    ".parquet": Dataset.from_parquet,
    ".csv": Dataset.from_csv,
    ".tsv": partial(Dataset.from_csv, sep="\t"),
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
}
CLASSIFICATION = TaskConfig()
TEST_SPLITS = ("test", "validation", "validation_matched", "dev")


@dataclass(frozen=True)
class Rows:
    """Train and test rows, checked.

    Attributes:
        train, test: with the configured text columns; where there are classes, `label_column` holds their numbers.
        label_names: one a class; none where the task has no classes.
    """

    train: Dataset
    test: Dataset
    label_names: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int:
        """Classes."""
        return len(self.label_names)

    def classes(self, column: str) -> np.ndarray:
        """(train rows,) class numbers; all zero where there are no classes."""
        return np.asarray(self.train[column][:]) if self.label_names else np.zeros(len(self.train), dtype=np.int64)


def load_rows(config: DataConfig, seed: int, task: TaskConfig = CLASSIFICATION) -> Rows:
    """Load a dataset and check that it can be trained on.

    Args:
        seed: of the test split, where one must be cut, and of any subsampling.
        task: says what its rows must hold.

    Raises:
        DataError: missing files, columns or splits; labels that are not class numbers; answers outside their context.
    """
    with quietly():
        splits = load_splits(config)
        train, test = _train_and_test(splits, config, seed)
        for split, rows in (("train", train), ("test", test)):
            check_columns(rows, split, config, task)
        names: tuple[str, ...] = ()
        if task.kind in WITH_CLASSES:
            train, test, names = _with_class_numbers(train, test, config)
        train = _at_most(train, config.max_train_examples, seed)
        # An official score of whole questions needs all answers to each: rows of three texts come by the first two.
        whole = config.text_columns[:2] if task.kind == "classification" and len(config.text_columns) == 3 else ()
        test = _at_most(test, config.max_test_examples, seed, whole)
    return Rows(train, test, names)


def load_own_rows(config: DataConfig, label_names: Sequence[str], task: TaskConfig = CLASSIFICATION) -> Rows:
    """A client's own data, all of it to train on, with classes numbered as the server numbers them.

    Raises:
        DataError: missing files or columns, or a label the server does not know.
    """
    with quietly():
        splits = load_splits(config)
        if "train" not in splits:
            raise DataError(f"data = '{config.name}': no split named train; it has {sorted(splits)}")
        train = splits["train"]
        check_columns(train, "train", config, task)
    if task.kind not in WITH_CLASSES:
        return Rows(train, train.select([]))
    number = {name: index for index, name in enumerate(label_names)}
    labels = [number.get(str(label), -1) for label in train[config.label_column][:]]
    if -1 in labels:
        row = labels.index(-1)
        raise DataError(
            f"data.label_column '{config.label_column}': row {row} has the label {train[config.label_column][row]!r}, "
            f"which is none of the server's: {', '.join(label_names)}"
        )
    train = train.remove_columns(config.label_column).add_column(config.label_column, labels)
    return Rows(train, train.select([]), tuple(label_names))


def load_splits(config: DataConfig) -> Mapping[str, Dataset]:
    """The splits of a dataset by name, unchecked: built-in, a file or folder, or from the hub."""
    if config.name.startswith(PREFIX):
        builtin = find_dataset(config.name)
        splits = _read_files(builtin.files, config)
        if builtin.domain is None:
            return splits
        return {
            split: rows.filter(lambda d: d == builtin.domain, input_columns="domain") for split, rows in splits.items()
        }
    path = Path(config.name).expanduser()
    if path.is_file():
        return _read_files({"train": path}, config)
    if path.is_dir():
        files = {f.stem: f for f in sorted(path.iterdir()) if f.suffix in READERS}
        if "train" not in files:
            raise DataError(
                f"data.name = '{config.name}': no train.parquet, train.csv or train.jsonl in it; "
                f"found {sorted(files) or 'no data files'}"
            )
        return _read_files(files, config)
    if config.name.startswith((".", "/", "~")) or path.suffix in READERS or config.name.count("/") > 1:
        raise DataError(f"data.name = '{config.name}': no such file or folder (looked in {Path.cwd()})")
    return _from_hub(config)


def _read_files(files: Mapping[str, Path], config: DataConfig) -> dict[str, Dataset]:
    result = {}
    for split, path in files.items():
        reader = READERS.get(path.suffix)
        if reader is None:
            raise DataError(f"{path}: not Parquet, CSV or JSONL; known endings: {', '.join(READERS)}")
        try:
            result[split] = reader(str(path))
        except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
            if "corresponds to no data" in str(error):
                raise DataError(f"{path}: no rows in it: leave it out, or fill it") from error
            cause = error.__cause__ or error
            raise DataError(
                f"{path}: cannot be read as {path.suffix[1:]}: {' '.join(str(cause).split())[:200]}"
            ) from error
    return result


def _from_hub(config: DataConfig) -> Mapping[str, Dataset]:
    try:
        loaded = datasets.load_dataset(config.name, config.subset)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise DataError(
            f"data.name = '{config.name}': no local file, and not on the hub or the hub cannot be reached: "
            f"check the name, give a local file, or use builtin:movie_reviews ({' '.join(str(error).split())[:120]})"
        ) from error
    assert isinstance(loaded, DatasetDict)
    return {str(split): rows for split, rows in loaded.items()}


def _train_and_test(splits: Mapping[str, Dataset], config: DataConfig, seed: int) -> tuple[Dataset, Dataset]:
    if "train" not in splits:
        raise DataError(f"data.name = '{config.name}': no split named train; it has {sorted(splits)}")
    if config.test_split is not None and config.test_split not in splits:
        known = sorted(splits)
        raise DataError(
            f"data.test_split = '{config.test_split}': no such split.{nearest(config.test_split, known)} It has {known}"
        )
    train = splits["train"]
    test_split = config.test_split or next((name for name in TEST_SPLITS if name in splits), None)
    if test_split not in (None, "train"):
        return train, splits[test_split]
    num_test = int(len(train) * config.test_fraction)
    if not 0 < num_test < len(train):
        raise DataError(f"data.name = '{config.name}': {len(train)} rows are too few to cut a test split from")
    order = _permutation(len(train), seed)
    return train.select(np.sort(order[num_test:])), train.select(np.sort(order[:num_test]))


def _with_class_numbers(train: Dataset, test: Dataset, config: DataConfig) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    """Labels as numbers from 0; text labels are numbered in alphabetical order."""
    column = config.label_column
    feature = train.features[column]
    train_labels, test_labels = train[column][:], test[column][:]
    if any(isinstance(label, str) for label in train_labels):
        names = tuple(sorted({str(label) for label in train_labels}))
        number = {name: index for index, name in enumerate(names)}
        numbered = [[number.get(label, -1) for label in labels] for labels in (train_labels, test_labels)]
    else:
        names = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
        numbered = [train_labels, test_labels]
        if not names and all(isinstance(label, int) for label in train_labels):
            names = tuple(str(index) for index in range(max(train_labels) + 1))
    for split, labels, given in (("train", numbered[0], train_labels), ("test", numbered[1], test_labels)):
        wrong = [i for i, label in enumerate(labels) if not isinstance(label, int) or not 0 <= label < len(names)]
        if wrong:
            raise DataError(
                f"data.label_column '{column}': {len(wrong)} of {len(labels)} {split} rows have a label out of range, "
                f"first row {wrong[0]} with {given[wrong[0]]!r}; labels are 0 to {max(len(names) - 1, 0)} or text seen "
                "in train. Drop or mend those rows"
            )
    if len(set(numbered[0])) < 2:
        raise DataError(f"data.label_column '{column}': all train rows have the same label; nothing can be learned")
    return (
        train.remove_columns(column).add_column(column, numbered[0]),
        test.remove_columns(column).add_column(column, numbered[1]),
        names,
    )


def _at_most(rows: Dataset, limit: int | None, seed: int, together: Sequence[str] = ()) -> Dataset:
    """Some rows drawn from the seed, in order; those alike in the columns `together` all or none."""
    if limit is None or limit >= len(rows):
        return rows
    if not together:
        return rows.select(np.sort(_permutation(len(rows), seed)[:limit]))
    groups = numbered(zip(*(rows[column] for column in together), strict=True))
    order = np.argsort(_permutation(groups.max() + 1, seed)[groups], kind="stable")
    chosen = order[:limit]
    chosen = chosen[groups[chosen] != groups[order[limit]]]  # the group that the limit cuts
    if len(chosen) == 0:
        raise DataError(
            f"data.max_test_examples = {limit}: fewer rows than one value of {', '.join(together)} has, which are "
            "scored together: raise it"
        )
    return rows.select(np.sort(chosen))


def _permutation(count: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed)).permutation(count)


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars: the run has its own."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()
