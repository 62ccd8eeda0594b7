"""Rebuild the built-in sentiment data from the source distribution of vaderSentiment 3.3.2.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python scripts/build_builtin_data.py vaderSentiment-3.3.2.tar.gz

Writes src/spryfl/data/builtin/sentiment-{train,test}.parquet. The result is deterministic.
"""

import hashlib
import html
import io
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SOURCE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "movie_reviews": "movieReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "product_reviews": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}
MIN_RATING = 0.5  # weaker ratings are too near neutral to carry a label
TEST_FRACTION = 0.2
SPLIT_SEED = 2014
TARGET = Path(__file__).parents[1] / "src/spryfl/data/builtin"


def read_member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(name))
        handle = tar.extractfile(member)
        assert handle is not None
        return handle.read()


def parse(raw: bytes, domain: str) -> list[dict[str, object]]:
    rows = []
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("cp1252")
    for line in text.split("\n"):
        if not line.strip():
            continue
        _, rating, sentence = line.rstrip("\r").split("\t", 2)
        sentence = " ".join(html.unescape(sentence).split())
        if abs(float(rating)) < MIN_RATING or not sentence:
            continue
        label = int(float(rating) > 0)
        rows.append({"text": sentence, "label": label, "rating": float(rating), "domain": domain})
    return rows


def without_duplicates(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows whose letters and digits differ: no test sentence may stand in train."""
    seen: set[str] = set()
    kept = []
    for row in rows:
        key = re.sub(r"[^a-z0-9]", "", str(row["text"]).lower())
        if key and key not in seen:
            seen.add(key)
            kept.append(row)
    return kept


def main(source: Path) -> None:
    content = source.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SOURCE_SHA256:
        sys.exit(f"{source}: sha256 {digest}, expected {SOURCE_SHA256}")
    archive = read_member(content, ARCHIVE)
    rows = without_duplicates(
        [row for domain, name in DOMAINS.items() for row in parse(read_member(archive, name), domain)]
    )
    order = np.random.Generator(np.random.Philox(SPLIT_SEED)).permutation(len(rows))
    num_test = int(len(rows) * TEST_FRACTION)
    schema = pa.schema(
        [("text", pa.string()), ("label", pa.int8()), ("rating", pa.float32()), ("domain", pa.string())],
        metadata={"classes": "negative,positive", "licence": "MIT, (c) 2016 C.J. Hutto"},
    )
    for split, chosen in {"test": order[:num_test], "train": order[num_test:]}.items():
        table = pa.Table.from_pylist([rows[i] for i in sorted(chosen)], schema=schema)
        pq.write_table(table, TARGET / f"sentiment-{split}.parquet", compression="zstd")
        print(split, table.num_rows, table.group_by(["domain", "label"]).aggregate([([], "count_all")]).to_pylist())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
