"""Which questions a report shows, and how each model's answer to them is judged.

A page has room for some of a benchmark's thousands: an equal part each for questions that models answer differently,
wrongly and rightly, spread over groups and over the whole file. The choice is the same every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lapilli.data.sample import Image
from lapilli.evaluate.report.gather import Entry, Gathered, shown_truth
from lapilli.evaluate.task import Question

VERDICTS = ("right", "partly", "wrong", "unscored", "missing")
"""Of one answer: worth all, some or nothing; not scored; not given."""
STRATA = ("differ", "wrong", "partly", "right", "unscored", "missing")
"""Of one question: `differ` where models are not of one verdict."""


@dataclass(frozen=True)
class Reply:
    """One model's answer to one question."""

    model: str
    text: str | None
    verdict: str
    scores: dict[str, float]
    """Protocol to score, 0 to 1."""
    parsed: dict[str, str]
    """Protocol to the answer as it was read."""
    finish: str | None
    reason: str | None
    """Why there is no answer."""
    said: str | None = None
    """What the judge said of it, where a judge scored."""


@dataclass(frozen=True)
class Case:
    """One question with every model's answer."""

    task: str
    id: str
    text: str
    expected: str
    choices: tuple[str, ...]
    groups: dict[str, str]
    images: tuple[Image, ...]
    replies: tuple[Reply, ...]
    stratum: str


@dataclass(frozen=True)
class Chosen:
    """A task's cases, and how many of each kind there were to choose from."""

    cases: tuple[Case, ...]
    shown: dict[str, int]
    found: dict[str, int]


def choose(task: Gathered, limit: int) -> Chosen:
    """At most `limit` questions of a task: those that have a score; where none has, those that have an answer."""
    cases = [_case(task, task.questions[name], rounds) for name, rounds in _asked(task).items()]
    strata = {name: [case for case in cases if case.stratum == name] for name in STRATA}
    found = {name: len(own) for name, own in strata.items() if own}
    room = _share([len(strata[name]) for name in found], limit)
    taken: list[Case] = []
    for name, count in zip(found, room, strict=True):
        own = sorted(strata[name], key=lambda case: next(iter(case.groups.values()), ""))  # stable: file order within
        taken += [own[i * len(own) // count] for i in range(count)]
    return Chosen(tuple(taken), dict(zip(found, room, strict=True)), found)


def _asked(task: Gathered) -> dict[str, list[Question]]:
    """Questions that stand for themselves, with those that count as part of them.

    Where a question is asked in several rounds (MMBench's rotations), one has the score and the others belong to it.
    """
    scored = {
        name
        for entry in task.entries
        for items in entry.items.values()
        for name, item in items.items()
        if item.score is not None
    }
    missing = {name for entry in task.entries for name in entry.missing}
    answered = {name for entry in task.entries for name in entry.answers}
    known = (scored or answered) | missing
    made = {name: [] for name in task.questions if name in known}
    first = {str(task.questions[name].record.get("question_id", name)): name for name in reversed(made)}
    for name, question in task.questions.items():
        round_id = question.record.get("answer_fields", {}).get("round_id")
        whole = None if round_id is None else first.get(str(question.record.get("question_id", name)))
        if name not in made and whole is not None:
            made[whole].append(question)
    return made


def _case(task: Gathered, question: Question, rounds: Sequence[Question]) -> Case:
    replies = tuple(_reply(entry, question, rounds) for entry in task.entries)
    verdicts = {reply.verdict for reply in replies}
    return Case(
        task=task.name,
        id=question.id,
        text=question.text,
        expected=shown_truth(question),
        choices=question.choices,
        groups=dict(question.groups),
        images=question.images,
        replies=replies,
        stratum=verdicts.pop() if len(verdicts) == 1 else "differ",
    )


def _reply(entry: Entry, question: Question, rounds: Sequence[Question]) -> Reply:
    line = entry.answers.get(question.id)
    found = {p: items[question.id] for p, items in entry.items.items() if question.id in items}
    scores = {protocol: float(item.score) for protocol, item in found.items() if item.score is not None}
    more = [
        f"\nasked again: {entry.answers[other.id].text} (expected: {shown_truth(other)})"
        for other in rounds
        if other.id in entry.answers
    ]
    return Reply(
        model=entry.model,
        text=None if line is None else line.text + "".join(more),
        verdict=_verdict(next(iter(scores.values()), None), line is not None),
        scores=scores,
        parsed={protocol: item.parsed for protocol, item in found.items() if item.parsed is not None},
        finish=None if line is None else line.metadata.get("finish"),
        said=next((item.said for item in found.values() if item.said), None),
        reason=None if line is not None else entry.missing.get(question.id, "not asked, or its answers are not there"),
    )


def _verdict(score: float | None, answered: bool) -> str:
    if score is None:
        return "unscored" if answered else "missing"
    return "right" if score >= 0.999 else "wrong" if score <= 0.001 else "partly"


def _share(sizes: Sequence[int], limit: int) -> list[int]:
    """So many of each: equal parts of the limit, and what one does not need goes to the others."""
    room = [0] * len(sizes)
    left = limit
    while left and any(taken < size for taken, size in zip(room, sizes, strict=True)):
        for i, size in enumerate(sizes):
            if left and room[i] < size:
                room[i] += 1
                left -= 1
    return room
