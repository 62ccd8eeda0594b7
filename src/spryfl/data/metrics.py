"""Metrics of answers by SQuAD's official rules, and of classes.

Both sides are compared in lower case, without punctuation and articles, and word by word. Of several golden answers
the best match counts. Where there is none, or none of it is left by those rules, no answer is right.
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


def binary_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1; 0 where it is neither predicted nor there."""
    return float(f1_score(labels, predictions, zero_division=0))
