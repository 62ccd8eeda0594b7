"""SQuAD's official metric by cases worked out by hand, and the F1 of two classes."""

import numpy as np
import pytest

from spryfl.data.metrics import binary_f1, exact_match, token_f1


@pytest.mark.parametrize(
    ("answer", "golden", "exact", "f1"),
    [
        ("Normandy", ["Normandy"], 1, 1),
        ("the Normans!", ["Normans"], 1, 1),  # case, articles and punctuation count for nothing
        ("An apple  a day", ["apple day"], 1, 1),
        ("U.S.", ["US"], 1, 1),  # punctuation goes, nothing comes in its place
        ("well known", ["well-known"], 0, 0),
        ("in the 10th century", ["10th and 11th centuries"], 0, 2 * 1 / (3 + 4)),
        ("dog dog", ["dog"], 0, 2 * 1 / (2 + 1)),  # a word counts as often as both have it
        ("France", ["Normandy", "France"], 1, 1),  # the best of several
        ("northern France", ["Normandy", "in France"], 0, 2 * 1 / (2 + 2)),
        ("", [], 1, 1),
        ("France", [], 0, 0),
        ("", ["France"], 0, 0),
        ("the", [], 1, 1),  # nothing is left of it
        ("", ["the"], 1, 1),  # nothing is left of the only golden answer: as if there were none
        ("", ["the", "France"], 0, 0),
    ],
)
def test_official_rules(answer: str, golden: list[str], exact: int, f1: float) -> None:
    assert exact_match(answer, golden) == exact
    assert token_f1(answer, golden) == pytest.approx(f1)


def test_binary_f1() -> None:
    labels = np.array([1, 1, 1, 0, 0, 0])
    assert binary_f1(np.array([1, 1, 0, 1, 0, 0]), labels) == pytest.approx(2 / 3)  # precision and recall 2/3
    assert binary_f1(np.array([1, 0, 0, 0, 0, 0]), labels) == pytest.approx(0.5)  # 1 and 1/3
    assert binary_f1(np.zeros(6, dtype=int), labels) == 0
