"""ANLS: how near an answer comes to one of the right ones, letter by letter; for text that is read off a picture.

Biten et al. 2019 (Scene Text Visual Question Answering); blanks and case as DocVQA's evaluation treats them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lapilli.base.errors import DataError
from lapilli.evaluate.own import mean_scores
from lapilli.evaluate.task import Question, Scores

OPTIONS = frozenset({"threshold"})
THRESHOLD = 0.5


def similarity(answer: str, truth: str, threshold: float = THRESHOLD) -> float:
    """1 less the edit distance as a share of the longer text, 0 to 1; 0 where that is below the threshold.

    Case does not count, nor how many blanks stand between words.
    """
    a, b = " ".join(answer.lower().split()), " ".join(truth.lower().split())
    longest = max(len(a), len(b))
    near = 1 - edit_distance(a, b) / longest if longest else 1.0
    return near if near >= threshold else 0.0


def edit_distance(a: str, b: str) -> int:
    """How many letters must be put in, taken out or replaced to make one text of the other (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]


def score(questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]) -> Scores:
    """The mean over questions of the best similarity to one of the right answers, in percent (`anls`)."""
    threshold = options.get("threshold", THRESHOLD)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise DataError(f"options.threshold must be a number from 0 to 1, not {threshold!r:.40}")
    items = {}
    for question in questions:
        truths = (question.truth,) if isinstance(question.truth, str) else question.truth
        if not truths:
            raise DataError(f"{question.where}: question {question.id} has no answer to compare with")
        items[question.id] = max(similarity(answers[question.id], truth, threshold) for truth in truths)
    return mean_scores(questions, items, dict(answers), name="anls")
