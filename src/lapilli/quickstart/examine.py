# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportIndexIssue=false
"""The held-out examination: exact match, beside two numbers that say what it is worth.

The same model is asked the same questions about another exam's picture: whatever it still gets right, it knows without
seeing. And always giving the most frequent answer would get that answer's share.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lapilli.generate.assistant import Assistant
from lapilli.quickstart.records import Exam

BATCH = 32
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Result:
    """Answers in the order of the exams, with the right pictures and with wrong ones."""

    exams: tuple[Exam, ...]
    answers: tuple[str, ...]
    blind_answers: tuple[str, ...]

    def right(self, answers: Sequence[str]) -> list[bool]:
        return [answer == exam.answer for exam, answer in zip(self.exams, answers, strict=True)]

    @property
    def exact_match(self) -> float:
        return float(np.mean(self.right(self.answers)))

    @property
    def wrong_picture(self) -> float:
        return float(np.mean(self.right(self.blind_answers)))

    @property
    def most_frequent(self) -> tuple[str, float]:
        """The most frequent true answer, and its share."""
        answer, count = Counter(exam.answer for exam in self.exams).most_common(1)[0]
        return answer, count / len(self.exams)

    def by_kind(self) -> list[tuple[str, int, float, float]]:
        """Rows of (kind, questions, exact match, with the wrong picture), the most frequent kind first."""
        rows = defaultdict(list)
        for exam, seen, blind in zip(self.exams, self.right(self.answers), self.right(self.blind_answers), strict=True):
            rows[exam.kind].append((seen, blind))
        table = [(kind, len(r), *(float(m) for m in np.mean(r, axis=0))) for kind, r in rows.items()]
        return sorted(table, key=lambda row: (-row[1], row[0]))


def other_pictures(exams: Sequence[Exam], rng: np.random.Generator) -> list[tuple[str, ...]]:
    """For each exam the pictures of another one with as many; no exam keeps its own.

    With a single exam of some number of pictures there is no other one, and it keeps its own.
    """
    chosen: list[tuple[str, ...]] = [exam.images for exam in exams]
    for count in {len(exam.images) for exam in exams}:
        rows = rng.permutation([i for i, exam in enumerate(exams) if len(exam.images) == count])
        for row, other in zip(rows, np.roll(rows, 1), strict=True):
            chosen[row] = exams[other].images
    return chosen


def examine(assistant: Assistant, exams: Sequence[Exam], pictures: Path, seed: int) -> Result:
    """Ask every question twice, with its own pictures and with another's."""
    wrong = other_pictures(exams, np.random.default_rng(seed))
    asked = [(e.question, [pictures / name for name in e.images]) for e in exams]
    blind = [(e.question, [pictures / name for name in names]) for e, names in zip(exams, wrong, strict=True)]
    answers = assistant.generate_batch(asked + blind, max_new_tokens=ANSWER_TOKENS, batch_size=BATCH)
    return Result(tuple(exams), tuple(answers[: len(exams)]), tuple(answers[len(exams) :]))
