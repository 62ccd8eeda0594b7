"""Datasets shipped with the project: real text, its licence and attribution beside it."""

from dataclasses import dataclass
from pathlib import Path

from spryfl.errors import DataError, lookup_error

PREFIX = "builtin:"
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class BuiltinDataset:
    """Rows of the shipped Parquet files; `domain` None takes all of them."""

    domain: str | None
    summary: str

    @property
    def files(self) -> dict[str, Path]:
        return {split: FOLDER / f"sentiment-{split}.parquet" for split in ("train", "test")}


BUILTIN_DATASETS = {
    "movie_reviews": BuiltinDataset("movie_reviews", "10,070 movie-review snippets, negative or positive"),
    "product_reviews": BuiltinDataset("product_reviews", "2,966 sentences of product reviews, negative or positive"),
    "tweets": BuiltinDataset("tweets", "3,278 tweets, negative or positive"),
    "editorials": BuiltinDataset("editorials", "2,928 sentences of editorials, negative or positive"),
    "sentiment_by_domain": BuiltinDataset(
        None, "19,242 sentences from movie reviews, tweets, product reviews and editorials; column domain"
    ),
}


def find_dataset(name: str) -> BuiltinDataset:
    """The built-in dataset of a name, with or without the prefix `builtin:`."""
    key = name.removeprefix(PREFIX)
    if key not in BUILTIN_DATASETS:
        raise DataError(lookup_error("built-in dataset", key, BUILTIN_DATASETS))
    return BUILTIN_DATASETS[key]
