"""The files of VQAv2, VizWiz and TextVQA: questions, ten people's answers, and what their servers take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapilli.base.atomic import write_json
from lapilli.base.errors import DataError
from lapilli.data.sample import Image
from lapilli.evaluate.question_files import llava_questions, with_image
from lapilli.evaluate.records import checked, examples, field, read_json, read_records, refuse
from lapilli.evaluate.task import Question, Task
from lapilli.evaluate.vqa import normalise_llava

VQAV2_OPTIONS = frozenset({"suffix", "picture"})
VIZWIZ_OPTIONS = frozenset({"suffix"})
TEXTVQA_OPTIONS = frozenset({"ocr"})

_OCR_LINE = re.compile(r"^Reference OCR token:.*\n?", re.MULTILINE)


# ---- reading -------------------------------------------------------------------------------------------------------


def read_llava(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """Questions of one of LLaVA's files, without a truth."""
    del task, options
    return llava_questions(files["questions"])


def read_vqav2(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """Questions of the official questions file of VQAv2, and the answers of its annotations file if it is there.

    `picture` is the pattern of a picture's name from its number, `suffix` stands behind every question.
    """
    del task
    path, suffix = files["questions"], str(options.get("suffix", ""))
    pattern = str(options.get("picture", "{:012d}.jpg"))
    truths = _annotations(files["truth"]) if "truth" in files else None
    made: list[Question] = []
    lacking: list[str] = []
    for where, record in _members(path, "questions"):
        number = field(record, "question_id", where, int)
        truth = truths.get(number) if truths is not None else None
        if truths is not None and truth is None:
            lacking.append(f"{where}: question {number}")
        made.append(
            Question(
                id=str(number),
                text=with_image(field(record, "question", where) + suffix),
                images=(Image(path=pattern.format(field(record, "image_id", where, int))),),
                truth=truth and truth[0],
                groups=truth[1] if truth else {},
                record=record,
                where=where,
            )
        )
    checked(made, str(path))
    refuse(lacking, str(files.get("truth")), len(made))
    asked = {question.id for question in made}
    strange = [str(number) for number in truths or () if str(number) not in asked]
    if strange:
        named = examples(strange, "annotation", "annotations")
        raise DataError(f"{files['truth']}: {named} of no question in {path}; they are of different splits")
    return made


def read_vizwiz(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """Questions of an annotations file of VizWiz, a list with `image`, `question` and, but for test, `answers`."""
    del task
    path, suffix = files["questions"], str(options.get("suffix", ""))
    made = []
    for where, record in read_records(path):
        image = field(record, "image", where)
        made.append(
            Question(
                id=image,
                text=with_image(field(record, "question", where) + suffix),
                images=(Image(path=image),),
                truth=_answers(record, where) if "answers" in record else None,
                groups=_kinds(record),
                record={**record, "question_id": image},
                where=where,
            )
        )
    return checked(made, str(path))


def read_textvqa(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """LLaVA's questions of TextVQA, and the answers of its annotations, joined by picture and question.

    `ocr: false` leaves the line `Reference OCR token: ...` of the prompt out.
    """
    del task
    keep = bool(options.get("ocr", True))
    questions = llava_questions(files["questions"], None if keep else lambda text, _: _OCR_LINE.sub("", text))
    if "truth" not in files:
        return questions
    # Where a picture has the same question twice, the last one's answers count, as in the original.
    truths = {
        (str(field(record, "image_id", where, (str, int))), field(record, "question", where).lower()): record
        for where, record in _members(files["truth"], "data")
    }
    made: list[Question] = []
    lacking: list[str] = []
    for question in questions:
        asked = asked_in(str(question.record["text"]), question.where)
        record = truths.get((str(question.record["question_id"]), asked))
        if record is None:
            lacking.append(f'{question.where}: "{asked}" on this picture')
        else:
            made.append(replace(question, truth=_answers(record, question.where)))
    refuse(lacking, str(files["truth"]), len(questions))
    return made


def asked_in(prompt: str, where: str) -> str:
    """The question, in lower case, of a TextVQA prompt in one of the three forms that LLaVA knows.

    `OCR tokens: ... Question: Q Short answer:`; Q, the reference tokens' line before or behind it, and the instruction;
    Q and the instruction. Raises DataError for another form.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if found:
            return found[1].lower()
    elif len(lines) == 3 and "Reference OCR token: " in prompt:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise DataError(f"{where}: can't tell the question in the prompt {prompt!r:.120}; LLaVA's forms are known")


# ---- submissions ---------------------------------------------------------------------------------------------------


def submit_vqav2(
    questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any], folder: Any
) -> list[Path]:
    """VQAv2's results file: `question_id` and `answer`, normalised as LLaVA does.

    The server wants every question of test2015: those that were not asked get an empty answer.
    """
    made = {question.record["question_id"]: normalise_llava(answers.get(question.id, "")) for question in questions}
    listed = options.get("files", {}).get("all")
    if listed is not None:
        every = [field(record, "question_id", where, (str, int)) for where, record in read_records(listed)]
        lost = [str(name) for name in made.keys() - set(every)]
        if lost:
            raise DataError(f"{listed}: lacks {examples(lost, 'question', 'questions')} that was answered")
        made = {name: made.get(name, "") for name in every}
    path = Path(folder) / "vqav2.json"
    write_json(path, [{"question_id": name, "answer": text} for name, text in made.items()])
    return [path]


def submit_vizwiz(
    questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any], folder: Any
) -> list[Path]:
    """VizWiz's results file: `image` and `answer`, normalised as LLaVA does, for every question of the file in order.

    A question that was left without an answer gets an empty one.
    """
    made = {question.record["image"]: normalise_llava(answers[question.id]) for question in questions}
    listed = options.get("files", {}).get("questions")
    every = list(made) if listed is None else [field(r, "image", where) for where, r in read_records(listed)]
    path = Path(folder) / "vizwiz.json"
    write_json(path, [{"image": image, "answer": made.get(image, "")} for image in every])
    return [path]


# ---- records -------------------------------------------------------------------------------------------------------


def _members(path: Any, key: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a list that is a field of a JSON file, each with its place."""
    value = read_json(path)
    listed = value.get(key) if isinstance(value, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise DataError(f'{path}: must be a JSON object with a list "{key}" of objects')
    return [(f"{path}: {key}[{i}]", one) for i, one in enumerate(listed)]


def _annotations(path: Any) -> dict[int, tuple[tuple[str, ...], dict[str, str]]]:
    """Question number to everybody's answers and the question's groups."""
    made: dict[int, tuple[tuple[str, ...], dict[str, str]]] = {}
    for where, record in _members(path, "annotations"):
        number = field(record, "question_id", where, int)
        if number in made:
            raise DataError(f"{where}: a second annotation of question {number}")
        made[number] = _answers(record, where), _kinds(record)
    return made


def _answers(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    listed = field(record, "answers", where, list)
    found = [one.get("answer") if isinstance(one, dict) else one for one in listed]
    texts = tuple(text for text in found if isinstance(text, str))
    if not texts or len(texts) < len(found):
        raise DataError(f'{where}: "answers" must be texts, or objects with a text "answer"')
    return texts


def _kinds(record: Mapping[str, Any]) -> dict[str, str]:
    return {kind: record[kind] for kind in ("answer_type", "question_type") if isinstance(record.get(kind), str)}
