"""Q-Bench, in English and Chinese: choices about how a picture looks, sharpness, light, noise (Wu et al., 2023).

The prompt is LLaVA's. LLaVA has no scorer; the answer is read by its letter or its choice's text, where Q-Bench's own
evaluation lets a language model compare it with the right one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lapilli.base.atomic import atomic_write
from lapilli.base.errors import DataError
from lapilli.data.sample import IMAGE_PLACEHOLDER, Image
from lapilli.evaluate.own import LETTERS
from lapilli.evaluate.question_files import distinct
from lapilli.evaluate.records import checked, field, read_records
from lapilli.evaluate.task import Question, Task

READ_OPTIONS = frozenset({"lead"})

MAX_CHOICES = 4
_GROUPS = ("type", "concern")


def read(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """Questions of `[{img_path, question, candidates, correct_ans?}]`; their ids are their pictures.

    `lead` stands between the question and its choices, one on a line, each line ended. Raises DataError for a record
    that lacks a field, or a right answer that is none of the choices.
    """
    del task
    path, lead = files["questions"], str(options.get("lead", "\n"))
    records = read_records(path)
    names = distinct([field(record, "img_path", where) for where, record in records])
    made = [_question(name, record, where, lead) for name, (where, record) in zip(names, records, strict=True)]
    return checked(made, str(path))


def _question(name: str, record: Mapping[str, Any], where: str, lead: str) -> Question:
    choices = field(record, "candidates", where, list)
    if not all(isinstance(choice, str) for choice in choices) or not 0 < len(choices) <= MAX_CHOICES:
        raise DataError(f'{where}: "candidates" must be 1 to {MAX_CHOICES} texts, not {choices!r:.80}')
    truth = None
    if record.get("correct_ans"):
        answer = field(record, "correct_ans", where)
        if choices.count(answer) != 1:
            raise DataError(f'{where}: "correct_ans" is "{answer:.80}"; it must be one of {", ".join(choices)}')
        truth = LETTERS[choices.index(answer)]
    asked = field(record, "question", where)
    lines = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=False))
    image = record["img_path"]
    return Question(
        id=name,
        text=f"{IMAGE_PLACEHOLDER}\n{asked}{lead}{lines}",
        images=(Image(path=image),),
        truth=truth,
        choices=tuple(choices),
        groups={kind: str(record[kind]) for kind in _GROUPS if record.get(kind) is not None},
        # The original's answers are its records, told apart by picture and question.
        record={**record, "question_id": image, "prompt": asked},
        where=where,
    )


def submit(
    questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any], folder: Any
) -> list[Path]:
    """Write `qbench.jsonl`, each record with its `response`, a line each; the original writes no line ends."""
    del options
    path = Path(folder) / "qbench.jsonl"
    added = ("question_id", "prompt")
    lines = (
        {**{key: value for key, value in q.record.items() if key not in added}, "response": answers[q.id]}
        for q in questions
    )
    atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return [path]
