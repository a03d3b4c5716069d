"""ScienceQA with GPT-4 beside the model, the two numbers of LLaVA's paper.

Complement (eval_science_qa_gpt4.py): where GPT-4 names no answer, the model's stands. Judge
(eval_science_qa_gpt4_requery.py): GPT-4 was asked again with both answers before it; where it names none, the model's
stands. Where the original draws a letter at random, without a seed, the draw here depends on the question alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lapilli.base.errors import DataError
from lapilli.evaluate import choices
from lapilli.evaluate.own import LETTERS
from lapilli.evaluate.records import examples, read_json
from lapilli.evaluate.task import Question

GPT4, REQUERY = "gpt4", "requery"
"""Parts of the task's files, both optional: GPT-4's answers `{"outputs": {id: text}}`, and those of the second asking
as an answers file."""


def attach(questions: Sequence[Question], files: Mapping[str, Any]) -> list[Question]:
    """The questions with GPT-4's answers in their records, where there are files of them.

    Raises DataError for other ids, or a second asking without the first or with questions that lack it.
    """
    if GPT4 not in files:
        if REQUERY in files:
            raise DataError(
                f"{files[REQUERY]}: GPT-4's second answers need its first; name them with --files gpt4=FILE"
            )
        return list(questions)
    ids = {question.id for question in questions}
    first = _outputs(files[GPT4])
    second = _second(files[REQUERY]) if REQUERY in files else None
    for path, given in ((files[GPT4], first), (files.get(REQUERY), second or {})):
        if given and not ids & set(given):
            raise DataError(f"{path}: {examples(given, 'answer', 'answers')}, none to a question of this task")
    lacking = [name for name in ids if name not in first]
    if second is not None and lacking:
        raise DataError(f"{files[GPT4]}: {examples(sorted(lacking), 'question', 'questions')} without an answer")
    made: list[Question] = []
    for question in questions:
        more = {GPT4: first.get(question.id)}
        if second is not None:
            more[REQUERY] = second.get(question.id, "")
        made.append(replace(question, record={**question.record, **more}))
    return made


def _outputs(path: Any) -> dict[str, str]:
    value = read_json(path)
    given = value.get("outputs") if isinstance(value, dict) else None
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        raise DataError(f'{path}: must be a JSON object with "outputs", id to text')
    return given


def _second(path: Any) -> dict[str, str]:
    from lapilli.evaluate.answers import read_answers

    return {line.question_id: line.text for line in read_answers(path)}


@dataclass(frozen=True, slots=True)
class _Reading:
    """One answer: whether it names a letter, and whether it counts as right."""

    stated: bool
    right: bool
    drawn: bool = False


def _read(question: Question, text: str, role: str, llava: bool) -> _Reading:
    letter = choices.stated(text) if llava else choices.fixed(text, question.choices)
    valid = letter in LETTERS[: len(question.choices)] if letter else False
    if valid or not llava:
        return _Reading(letter is not None, letter == question.truth)
    drawn = random.Random(f"{role} {question.id}").choice(LETTERS[: len(question.choices)])
    return _Reading(letter is not None, drawn == question.truth, drawn=True)


def values(
    questions: Sequence[Question], answers: Mapping[str, str], llava: bool
) -> tuple[dict[str, float], list[str]]:
    """The complement's and the judge's values in percent, with notes; nothing if no question has GPT-4's answer."""
    both = [question for question in questions if question.record.get(GPT4) is not None]
    if not both:
        return {}, []
    ours = {q.id: _read(q, answers[q.id], "ours", llava) for q in both}
    gpt4 = {q.id: _read(q, q.record[GPT4], GPT4, llava) for q in both}
    complement = [ours[q.id] if not gpt4[q.id].stated else gpt4[q.id] for q in both]
    made = {
        "gpt4_complement": _percent(reading.right for reading in complement),
        "gpt4_complement_upper": _percent(
            reading.right or ours[q.id].right for q, reading in zip(both, complement, strict=True)
        ),
        "gpt4_no_answer": _percent(not reading.stated for reading in gpt4.values()),
    }
    drawn = [*ours.values(), *gpt4.values()]
    if all(REQUERY in q.record for q in both):
        again = {q.id: _read(q, q.record[REQUERY], REQUERY, llava) for q in both}
        drawn += [reading for reading in again.values() if reading.stated]
        judged = [again[q.id] if again[q.id].stated else ours[q.id] for q in both]
        made |= {
            "gpt4_ours": _percent(ours[q.id].right for q in both),
            "gpt4_alone": _percent(gpt4[q.id].right for q in both),
            "gpt4_judge": _percent(reading.right for reading in judged),
            "gpt4_judge_upper": _percent(gpt4[q.id].right or ours[q.id].right for q in both),
        }
    notes = []
    if len(both) < len(questions):
        notes.append(f"GPT-4's values: {len(questions) - len(both)} questions without an answer of GPT-4 are left out")
    count = sum(reading.drawn for reading in drawn)
    if count:
        notes.append(f"GPT-4's values: {count} letters are drawn by chance where none is named, as in the original")
    return made, notes


def _percent(hits: Any) -> float:
    listed = [bool(hit) for hit in hits]
    return 100 * sum(listed) / len(listed)
