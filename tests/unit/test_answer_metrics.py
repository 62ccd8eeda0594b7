"""SQuAD's and MultiRC's official metrics by cases worked out by hand and by other means; the F1 of two classes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_score, recall_score
from torchmetrics.functional.text import squad

from spryfl.data.metrics import best_over_thresholds, binary_f1, exact_match, question_scores, token_f1


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


WORDS = st.lists(st.sampled_from(["The", "a", "an", "Norman", "normans", "U.S.", "10th-century", "!", "é"]), max_size=5)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_answers_score_as_another_implementation_has_it(answer: list[str], golden: list[list[str]]) -> None:
    """TorchMetrics' of the official script; its first version knows no question without an answer."""
    texts = [" ".join(words) for words in golden if token_f1(" ".join(words), []) == 0]  # some word is left of them
    if not texts:
        return
    theirs = squad(
        [{"prediction_text": " ".join(answer), "id": "0"}],
        [{"answers": {"answer_start": [0] * len(texts), "text": texts}, "id": "0"}],
    )
    assert 100 * exact_match(" ".join(answer), texts) == pytest.approx(float(theirs["exact_match"]))
    assert 100 * token_f1(" ".join(answer), texts) == pytest.approx(float(theirs["f1"]), abs=1e-4)


def test_binary_f1() -> None:
    labels = np.array([1, 1, 1, 0, 0, 0])
    assert binary_f1(np.array([1, 1, 0, 1, 0, 0]), labels) == pytest.approx(2 / 3)  # precision and recall 2/3
    assert binary_f1(np.array([1, 0, 0, 0, 0, 0]), labels) == pytest.approx(0.5)  # 1 and 1/3
    assert binary_f1(np.zeros(6, dtype=int), labels) == 0


def test_best_threshold_by_hand() -> None:
    """Gaps in order: an answer of score 0.5, an unanswerable one, a right answer, an unanswerable one."""
    gaps = np.array([3.0, -2.0, 0.0, 1.0])
    answerable = np.array([False, True, False, True])
    scores = np.array([0.0, 0.5, 0.0, 1.0])
    answered = np.full(4, True)
    # Answered: none 2, one 2.5, two 1.5, three 2.5, all 1.5; of the best the first.
    assert best_over_thresholds(scores, answerable, answered, gaps) == (2.5 / 4, -2.0)
    alike = np.full(4, 0.0)  # all or none: 1.5 or 2
    best, threshold = best_over_thresholds(scores, answerable, answered, alike)
    assert best == 2 / 4
    assert -1e-9 < threshold < 0


QUESTION = st.tuples(st.booleans(), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]), st.integers(-3, 3))


@given(st.lists(QUESTION, min_size=1, max_size=9))
def test_best_threshold_is_the_best_of_all(questions: list[tuple[bool, bool, float, int]]) -> None:
    """Against every threshold that tells questions apart; the one found gives what it is said to give."""
    answerable, answered, scores, gaps = (np.array(column) for column in zip(*questions, strict=True))
    scores = scores * answered

    def mean(threshold: float) -> float:
        told = np.where(answerable, scores, ~answered)
        return float(np.where(gaps > threshold, ~answerable, told).mean())

    best, threshold = best_over_thresholds(scores, answerable, answered, gaps.astype(float))
    assert best == pytest.approx(max(map(mean, range(-4, 4))))
    assert mean(threshold) == pytest.approx(best)


def test_whole_questions_by_hand() -> None:
    """One all right; one with a false alarm; one with nothing right in it, and nothing found."""
    labels = np.array([1, 0, 1, 0, 0, 0])
    predictions = np.array([1, 0, 1, 1, 0, 0])
    questions = np.array([7, 7, 2, 2, 5, 5])
    found = question_scores(predictions, labels, questions)
    precision, recall = (1 + 1 / 2 + 1) / 3, 1.0
    assert found == pytest.approx(
        {"exact_match_by_question": 2 / 3, "f1_by_question": 2 * precision / (precision + recall)}
    )
    assert question_scores(1 - labels, labels, np.zeros(6, dtype=int)) == {
        "exact_match_by_question": 0,
        "f1_by_question": 0,
    }


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=20))
def test_whole_questions_against_scikit_learn(rows: list[tuple[int, int, int]]) -> None:
    questions, predictions, labels = (np.array(column) for column in zip(*rows, strict=True))
    each = [questions == number for number in np.unique(questions)]
    precision, recall = (
        np.mean([score(labels[own], predictions[own], zero_division=1) for own in each])
        for score in (precision_score, recall_score)
    )
    found = question_scores(predictions, labels, questions)
    assert found["exact_match_by_question"] == pytest.approx(
        np.mean([(predictions[own] == labels[own]).all() for own in each])
    )
    if precision + recall > 0:
        assert found["f1_by_question"] == pytest.approx(2 * precision * recall / (precision + recall))
