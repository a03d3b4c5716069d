"""Questions whose answers a judge reads: LLaVA-Bench in the wild and MM-Vet.

The answers are written here, joined by id to what the judge compares them with, so that other ids are found before
anything is asked or paid for; the judging is `lapilli judge`'s, or the benchmark's own notebook's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapilli.base.atomic import atomic_write
from lapilli.base.errors import DataError
from lapilli.evaluate.pairing import by_id, must_match, unique
from lapilli.evaluate.question_files import llava_questions
from lapilli.evaluate.records import examples, field, read_json, read_records
from lapilli.evaluate.task import Question, Task

MMVET_PREFIX = "v1_"
"""What MM-Vet puts before a question's number."""


def read(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """LLaVA's questions, with the part `reference` (answers by question id) and `context` (captions by picture) in
    their records as `reference` and `context`.

    Raises DataError if reference answers and questions have other ids, or a picture has no context.
    """
    del task, options
    path = files["questions"]
    made = unique(llava_questions(path), path)
    if "reference" in files:
        known = by_id(files["reference"], "question_id")
        must_match([q.id for q in made], known, path, files["reference"])
        made = [_with(q, reference=field(known[q.id][1], "text", known[q.id][0])) for q in made]
    if "context" in files:
        captions = _captions(files["context"])
        lacking = [str(q.images[0].path) for q in made if str(q.images[0].path) not in captions]
        if lacking:
            raise DataError(f"{files['context']}: {examples(dict.fromkeys(lacking), 'picture', 'pictures')} not in it")
        made = [_with(q, context=captions[str(q.images[0].path)]) for q in made]
    return made


def _captions(path: Any) -> dict[str, str]:
    made: dict[str, str] = {}
    for where, record in read_records(path):
        caption = field(record, "caption", where, (str, list))
        made[field(record, "image", where)] = caption if isinstance(caption, str) else "\n".join(map(str, caption))
    return made


def read_mmvet(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """LLaVA's questions of MM-Vet, with MM-Vet's own answers and capabilities where the part `truth` is there.

    Raises DataError if the two do not hold the same questions.
    """
    del task, options
    path = files["questions"]
    made = unique(llava_questions(path), path)
    if "truth" not in files:
        return made
    known = read_json(files["truth"])
    if not isinstance(known, dict):
        raise DataError(f"{files['truth']}: must be a JSON object, {MMVET_PREFIX}0 and so on to records")
    must_match([MMVET_PREFIX + q.id for q in made], known, path, files["truth"])
    return [_with_truth(q, known[MMVET_PREFIX + q.id], f"{files['truth']}: {MMVET_PREFIX}{q.id}") for q in made]


def _with_truth(question: Question, record: Any, where: str) -> Question:
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be a JSON object, not {type(record).__name__}")
    made = _with(question, reference=field(record, "answer", where))
    return replace(made, groups={"capabilities": ", ".join(map(str, field(record, "capability", where, list)))})


def submit_mmvet(
    questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any], folder: Any
) -> list[Path]:
    """Write `mm-vet.json`, `v1_` and the question's number to the answer, as MM-Vet's notebook takes it."""
    del options
    path = Path(folder) / "mm-vet.json"
    atomic_write(path, json.dumps({MMVET_PREFIX + q.id: answers[q.id] for q in questions}, indent=2))
    return [path]


def _with(question: Question, **more: str) -> Question:
    return replace(question, record={**question.record, **more})
