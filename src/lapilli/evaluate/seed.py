"""SEED-Bench: choices about pictures and video frames, an accuracy for each type of question (Li et al., 2023).

LLaVA asks for the letter and compares the whole answer with it; the fixed reading finds the letter in other forms too.
SEED-Bench's own metric, which ranks the choices by their likelihood, is another one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapilli.base.atomic import atomic_write
from lapilli.base.errors import DataError
from lapilli.evaluate import choices
from lapilli.evaluate.own import mean_scores
from lapilli.evaluate.pairing import must_match, unique
from lapilli.evaluate.question_files import llava_questions
from lapilli.evaluate.records import examples, field, read_json
from lapilli.evaluate.task import Question, Scores, Task

SCORE_OPTIONS = frozenset({"parse"})

_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
_LETTERS = "ABCD"


def read(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """LLaVA's questions, joined by id to the right answers of SEED-Bench.json where that is there, in its order.

    Raises DataError if the two files do not hold the same questions, or a record lacks a field.
    """
    del task, options
    path = files["questions"]
    questions = unique(llava_questions(path), path)
    if "truth" not in files:
        return questions
    kinds, records = _annotation(Path(files["truth"]))
    by_id = {question.id: question for question in questions}
    must_match(by_id, records, path, files["truth"])
    source = files["truth"]
    return [_with_truth(by_id[name], record, kinds, f"{source}: question {name}") for name, record in records.items()]


def _annotation(path: Path) -> tuple[dict[Any, str], dict[str, dict[str, Any]]]:
    """Names of the types of questions by number, and the records by id."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: must be a JSON object with question_type and questions")
    kinds = {number: name for name, number in field(value, "question_type", str(path), dict).items()}
    records: dict[str, dict[str, Any]] = {}
    twice: list[str] = []
    for number, record in enumerate(field(value, "questions", str(path), list), 1):
        if not isinstance(record, dict):
            raise DataError(f"{path}: question {number}: must be a JSON object, not {type(record).__name__}")
        name = str(field(record, "question_id", f"{path}: question {number}", (str, int)))
        if name in records:
            twice.append(name)
        records[name] = record
    if twice:
        raise DataError(f"{path}: {examples(twice, 'id', 'ids')} on more than one question")
    return kinds, records


def _with_truth(question: Question, record: Mapping[str, Any], kinds: Mapping[Any, str], where: str) -> Question:
    answer, number = field(record, "answer", where), field(record, "question_type_id", where, int)
    if answer not in _LETTERS or len(answer) != 1:
        raise DataError(f'{where}: "answer" is {answer!r:.80}; it must be one of {", ".join(_LETTERS)}')
    if number not in kinds:
        raise DataError(f'{where}: "question_type_id" is {number}; question_type knows {", ".join(map(str, kinds))}')
    return replace(
        question,
        truth=answer,
        choices=tuple(str(record[key]) for key in _CHOICES if key in record),
        groups={"type": kinds[number], "data": field(record, "data_type", where)},
        record={**question.record, "submitted_id": record["question_id"]},
    )


def score(questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]) -> Scores:
    """Accuracy over all questions, over pictures and over videos, and for every type.

    `parse: llava`: the answer is the right letter and nothing else, not even a blank; a question without an answer is
    wrong. `parse: fixed` reads every form that names one choice.
    """
    llava = options.get("parse", "fixed") == "llava"
    missing: Sequence[Question] = options.get("missing", ()) if llava else ()
    counted = [*questions, *missing]
    letters: dict[str, str | None] = {
        q.id: answers[q.id] if llava else choices.fixed(answers[q.id], q.choices) for q in questions
    }
    letters |= {q.id: None for q in missing}
    right = {q.id: float(letters[q.id] == q.truth) for q in counted}
    made = mean_scores(counted, right, {name: letter or "" for name, letter in letters.items()})
    values = dict(made.values)
    for kind, named in made.groups.get("data", {}).items():
        values[f"{kind}_accuracy"] = named["accuracy"]
    if not llava:
        return replace(made, values=values, notes=choices.unread_note(questions, letters, llava))
    notes = []
    other = sum(text not in tuple(_LETTERS) for text in answers.values())
    if other:
        notes.append(
            f"{other} of {len(questions)} answers are not a bare letter; they count as wrong, as in the original"
        )
    if missing:
        notes.append(f"{choices.LLAVA}{len(missing)} without an answer count as wrong all the same")
    lacking = {q.groups["type"] for q in missing}
    none = [n for n, v in made.groups.get("type", {}).items() if v["accuracy"] == 0 and n not in lacking]
    if none:
        named = examples(none, "type", "types")
        notes.append(f"{choices.LLAVA}the original stops with an error here: {named} without a right answer")
    return replace(made, values=values, notes=tuple(notes))


def submit(
    questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any], folder: Any
) -> list[Path]:
    """Write `seed_bench.jsonl`, `{question_id, prediction}` per line, as the leaderboard's notebook takes it."""
    del options
    path = Path(folder) / "seed_bench.jsonl"
    lines = (
        {
            "question_id": question.record.get("submitted_id", question.record["question_id"]),
            "prediction": answers[question.id],
        }
        for question in questions
    )
    atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines))
    return [path]
