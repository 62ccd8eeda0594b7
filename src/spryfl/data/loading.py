"""A name -> train and test rows: built-in, local Parquet, CSV or JSONL, or a hub dataset."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, DatasetDict
from datasets.utils.logging import (
    CRITICAL,
    disable_progress_bar,
    enable_progress_bar,
    get_verbosity,
    is_progress_bar_enabled,
    set_verbosity,
)
from pyarrow.parquet import read_metadata

from spryfl.config import WITH_CLASSES, DataConfig, TaskConfig
from spryfl.data.builtin import PREFIX, find_dataset
from spryfl.data.checks import check_columns
from spryfl.data.examples import numbered
from spryfl.data.labels import numbered_as, with_class_numbers
from spryfl.errors import DataError, nearest

# The readers, not load_dataset("csv", ..): that one tells the hub's servers that a file was loaded.
_from_text = partial(Dataset.from_csv, keep_default_na=False, na_values=[""])  # "None" and "N/A" are words
READERS: dict[str, Callable[..., Dataset]] = {
    ".parquet": Dataset.from_parquet,
    ".csv": _from_text,
    ".tsv": partial(_from_text, sep="\t"),
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
}
CLASSIFICATION = TaskConfig()
TEST_SPLITS = ("test", "validation", "valid", "val", "validation_matched", "dev")


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
        names: tuple[str, ...] = ()
        used = _used_splits(load_splits(config), config)
        for split, rows in used.items():  # before any row is cut off, so that rows are named as they stand there
            check_columns(rows, split, config, task)
        if task.kind in WITH_CLASSES:
            used, names = with_class_numbers(used, config)
        # An official score of whole questions needs all answers to each: rows of three texts come by the first two.
        whole = config.text_columns[:2] if task.kind == "classification" and len(config.text_columns) == 3 else ()
        train, test = _train_and_test(used, config, seed, whole)
        train = _at_most(train, config.max_train_examples, seed)
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
    train = numbered_as(train, label_names, config)
    return Rows(train, train.select([]), tuple(label_names))


def load_splits(config: DataConfig) -> Mapping[str, Dataset]:
    """The splits of a dataset by name, unchecked: built-in, a file or folder, or from the hub."""
    path = Path(config.name).expanduser()
    if config.subset is not None and (config.name.startswith(PREFIX) or path.exists()):
        raise DataError(f"data.subset = '{config.subset}': '{config.name}' has none, as hub datasets may: leave it out")
    if config.name.startswith(PREFIX):
        builtin = find_dataset(config.name)
        splits = _read_files(builtin.files, config)
        if builtin.domain is None:
            return splits
        return {
            split: rows.filter(lambda d: d == builtin.domain, input_columns="domain") for split, rows in splits.items()
        }
    try:
        found = files_of(path)
    except OSError as error:
        raise DataError(f"data.name = '{config.name}': it cannot be looked at: {error.strerror or error}") from error
    if path.is_file():
        return _read_files({"train": path}, config)
    if path.is_dir():
        files = {file.stem: file for file in found}
        twice = [file.name for file in found if file != files[file.stem]]
        if twice:
            raise DataError(
                f"data.name = '{config.name}': both {twice[0]} and {files[Path(twice[0]).stem].name} in it: leave one"
            )
        if "train" not in files:
            raise DataError(
                f"data.name = '{config.name}': no train.parquet, train.csv or train.jsonl in it; "
                f"found {sorted(files) or 'no data files'}"
            )
        return _read_files(files, config)
    if config.name.startswith((".", "/", "~")) or path.suffix in READERS or config.name.count("/") > 1:
        raise DataError(f"data.name = '{config.name}': no such file or folder (looked in {Path.cwd()})")
    return _from_hub(config)


def files_of(path: Path) -> list[Path]:
    """The files that local data is read from: itself, or a folder's with an ending that we read, but for hidden ones.

    Raises:
        OSError: it cannot be looked at.
    """
    if path.is_dir():
        return [file for file in sorted(path.iterdir()) if file.suffix in READERS and not file.name.startswith(".")]
    return [path] if path.is_file() else []


def _read_files(files: Mapping[str, Path], config: DataConfig) -> dict[str, Dataset]:
    result = {}
    for split, path in files.items():
        reader = READERS.get(path.suffix)
        if reader is None:
            raise DataError(f"{path}: not Parquet, CSV or JSONL; known endings: {', '.join(READERS)}")
        try:
            if path.stat().st_size == 0 or (path.suffix == ".parquet" and read_metadata(path).num_rows == 0):
                raise StopIteration
            result[split] = reader(str(path))
        except StopIteration:  # the JSON reader's of a file without a line
            raise DataError(f"{path}: no rows in it: leave it out, or fill it") from None
        except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
            if "corresponds to no data" in str(error):
                raise DataError(f"{path}: no rows in it: leave it out, or fill it") from error
            cause = error.__cause__ or error
            raise DataError(
                f"{path}: cannot be read as {path.suffix[1:]}: {' '.join(str(cause).split())[:200]}: mend it, or write "
                "it anew, in UTF-8"
            ) from error
    return result


def _from_hub(config: DataConfig) -> Mapping[str, Dataset]:
    try:
        loaded = datasets.load_dataset(config.name, config.subset)
    except RuntimeError as error:  # datasets' for what it runs no more
        raise DataError(
            f"data.name = '{config.name}': {' '.join(str(error).split())[:200]}: use a copy of it in Parquet"
        ) from error
    except (datasets.exceptions.DatasetBuildError, datasets.exceptions.SplitsVerificationError) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"data.name = '{config.name}': it is on the hub, but cannot be read: {' '.join(str(cause).split())[:200]}"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.name = '{config.name}': no local file, and not on the hub or the hub cannot be reached: "
            f"check the name, give a local file, or use builtin:movie_reviews ({' '.join(str(error).split())[:120]})"
        ) from error
    assert isinstance(loaded, DatasetDict)
    return {str(split): rows for split, rows in loaded.items()}


def _used_splits(splits: Mapping[str, Dataset], config: DataConfig) -> dict[str, Dataset]:
    """train, and the split to test on after it, unless that is cut off train."""
    if "train" not in splits:
        raise DataError(f"data.name = '{config.name}': no split named train; it has {sorted(splits)}")
    if config.test_split is not None and config.test_split not in splits:
        known = sorted(splits)
        raise DataError(
            f"data.test_split = '{config.test_split}': no such split.{nearest(config.test_split, known)} It has {known}"
        )
    test_split = config.test_split or next((name for name in TEST_SPLITS if name in splits), "train")
    return {name: splits[name] for name in dict.fromkeys(("train", test_split))}


def _train_and_test(
    splits: Mapping[str, Dataset], config: DataConfig, seed: int, together: Sequence[str]
) -> tuple[Dataset, Dataset]:
    """Rows to train on, and those that are evaluated: of a split of their own, or cut off train."""
    train, *others = splits.values()
    if others:
        test = others[0]
    else:
        test_seed = seed if config.test_seed is None else config.test_seed
        train, test = _cut(train, config.test_fraction, test_seed, config, together)
    if config.validation_fraction is not None:
        return _cut(train, config.validation_fraction, seed, config, together)
    return train, test


def _cut(
    rows: Dataset, fraction: float, seed: int, config: DataConfig, together: Sequence[str]
) -> tuple[Dataset, Dataset]:
    """The rest, and a part of some rows drawn from the seed; both in order, rows alike in `together` on one side."""
    count = int(len(rows) * fraction)
    chosen = _drawn(rows, count, seed, together) if 0 < count < len(rows) else np.empty(0, dtype=np.int64)
    if len(chosen) == 0:
        raise DataError(f"data.name = '{config.name}': {len(rows)} rows are too few to cut {fraction:.0%} of them off")
    return rows.select(np.setdiff1d(np.arange(len(rows)), chosen)), rows.select(chosen)


def _at_most(rows: Dataset, limit: int | None, seed: int, together: Sequence[str] = ()) -> Dataset:
    """Some rows drawn from the seed, in order; those alike in the columns `together` all or none."""
    if limit is None or limit >= len(rows):
        return rows
    chosen = _drawn(rows, limit, seed, together)
    if len(chosen) == 0:
        raise DataError(
            f"data.max_test_examples = {limit}: fewer rows than one value of {', '.join(together)} has, which are "
            "scored together: raise it"
        )
    return rows.select(chosen)


def _drawn(rows: Dataset, count: int, seed: int, together: Sequence[str]) -> np.ndarray:
    """Numbers of at most `count` rows, fewer than there are, in order; those alike in `together` all or none."""
    if not together:
        return np.sort(_permutation(len(rows), seed)[:count])
    groups = numbered(zip(*(rows[column] for column in together), strict=True))
    order = np.argsort(_permutation(groups.max() + 1, seed)[groups], kind="stable")
    chosen = order[:count]
    return np.sort(chosen[groups[chosen] != groups[order[count]]])  # without the group that the count cuts


def _permutation(count: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed)).permutation(count)


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars, as the run has its own, and no lines about a file that we tell of ourselves."""
    shown, verbosity = is_progress_bar_enabled(), get_verbosity()
    disable_progress_bar()
    set_verbosity(CRITICAL)
    try:
        yield
    finally:
        set_verbosity(verbosity)
        if shown:
            enable_progress_bar()
