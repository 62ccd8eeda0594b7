"""Metrics of answers by SQuAD's official rules, of classes, and of answers judged by MultiRC's.

SQuAD: both sides are compared in lower case, without punctuation and articles, and word by word. Of several golden
answers the best match counts. Where there is none, or none of it is left by those rules, no answer is right.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.metrics import f1_score

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def answer_words(text: str) -> list[str]:
    """The words of an answer that count."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(answer: str, golden: Sequence[str]) -> float:
    """1 if an answer has the same words as one of the golden ones, or there is none and it is empty; else 0."""
    return float(any(answer_words(answer) == right for right in _golden(golden)))


def token_f1(answer: str, golden: Sequence[str]) -> float:
    """The best F1, over the golden answers, of an answer's words: 2 shared / (its words + the golden one's)."""
    return max(_f1(answer_words(answer), right) for right in _golden(golden))


def _golden(golden: Sequence[str]) -> list[list[str]]:
    return [words for words in map(answer_words, golden) if words] or [[]]


def _f1(words: list[str], right: list[str]) -> float:
    if not words or not right:
        return float(words == right)
    return 2 * (Counter(words) & Counter(right)).total() / (len(words) + len(right))


def best_over_thresholds(
    scores: np.ndarray, answerable: np.ndarray, answered: np.ndarray, gaps: np.ndarray
) -> tuple[float, float]:
    """The best mean score that any null threshold gives, and that threshold, as SQuAD v2's official script finds them.

    A question counts as left unanswered where its gap exceeds the threshold. Equal gaps go together, as no threshold
    tells them apart; the script, which takes them one by one, may find more than can be had.

    Args:
        scores: (questions,) of the answers, whatever their gaps.
        answerable: whether the question has an answer; answered: whether the answer is not empty.
        gaps: null score less the answer's.
    """
    order = np.argsort(gaps, kind="stable")
    gains, gaps = np.where(answerable, scores, -1.0 * answered)[order], gaps[order]
    possible = np.append(gaps[1:] > gaps[:-1], True)
    totals = np.concatenate(([0.0], np.where(possible, np.cumsum(gains), -np.inf)))  # none answered, the first, ..
    best = int(totals.argmax())
    threshold = gaps[best - 1] if best else np.nextafter(gaps[0], -np.inf)
    return float(((~answerable).sum() + totals[best]) / len(scores)), float(threshold)


def question_scores(predictions: np.ndarray, labels: np.ndarray, questions: np.ndarray) -> dict[str, float]:
    """How well the answers of whole questions are judged, as MultiRC's official script has it (Khashabi et al. 2018).

    Args:
        predictions, labels: (answers,) 1 for a right answer, else 0.
        questions: (answers,) the number of the question each was given to.

    Returns:
        `exact_match_by_question`, the share with every answer judged right; `f1_by_question` (F1m), the harmonic mean
        of precision and recall, each the mean over questions, 1 in one that has nothing to be precise about or recall.
    """
    places = np.unique(questions, return_inverse=True)[1]
    wrong, found, given, golden = (
        np.bincount(places, weights=own) for own in (predictions != labels, predictions * labels, predictions, labels)
    )
    precision, recall = (
        float(np.divide(found, own, out=np.ones_like(found), where=own > 0).mean()) for own in (given, golden)
    )
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"exact_match_by_question": float((wrong == 0).mean()), "f1_by_question": f1}


def binary_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1; 0 where it is neither predicted nor there."""
    return float(f1_score(labels, predictions, zero_division=0))
