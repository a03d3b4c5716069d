"""ScienceQA: school questions with and without pictures, several choices each (Lu et al., 2022).

The original's parsing and numbers, and a fixed reading of the same answers. With GPT-4's answers beside the model's,
the two numbers of LLaVA's paper too (`scienceqa_gpt4`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lapilli.base.errors import DataError, RecipeError
from lapilli.evaluate import choices, scienceqa_gpt4
from lapilli.evaluate.own import mean_scores
from lapilli.evaluate.pairing import by_id, must_match, picture_question
from lapilli.evaluate.records import checked, field
from lapilli.evaluate.scienceqa_forms import Problem, prompt_and_answer, read_problems
from lapilli.evaluate.task import Question, Scores, Task

log = logging.getLogger(__name__)

READ_OPTIONS = frozenset({"split", "prompt_format", "suffix", "pictures"})
SCORE_OPTIONS = frozenset({"parse"})

LETTERS = "ABCDE"
_DIGITS = re.compile(r"\d+")


def read(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """Questions of `problems.json` and `pid_splits.json`.

    The prompts come from the file `questions` (as the original's conversion writes it) or, without it, are made in the
    form `prompt_format`. Options: `split`; `suffix`, on a line behind every prompt; `pictures: all | only`. Raises
    DataError if the two files are not of the same split.
    """
    problems = read_problems(files["problems"], files["splits"], str(options.get("split", "test")))
    suffix = str(options.get("suffix", ""))
    if "questions" in files:
        made = _written(problems, files["questions"], files["problems"], suffix)
    else:
        style = str(options.get("prompt_format", "CQM-A"))
        log.info("%s: no file of questions; prompts are made in the form %s", task.name, style)
        made = [_question(p, p.image, prompt_and_answer(p, style)[0], suffix) for p in problems]
    pictures = options.get("pictures", "all")
    if pictures not in ("all", "only"):
        raise RecipeError(f'task {task.name}: options.pictures: "{pictures}" must be "all" or "only"')
    if pictures == "only":
        made = [question for question in made if question.images]
    return scienceqa_gpt4.attach(checked(made, str(files["problems"])), files)


def _written(problems: Sequence[Problem], path: Any, source: Any, suffix: str) -> list[Question]:
    """Questions of a file `[{id, image?, conversations}]`, in the order of the problems."""
    records = by_id(path, "id")
    must_match([p.id for p in problems], records, source, path)
    made: list[Question] = []
    for problem in problems:
        where, record = records[problem.id]
        turns = field(record, "conversations", where, list)
        if not turns or not isinstance(turns[0], dict):
            raise DataError(f'{where}: "conversations" must begin with the question, {{"from": "human", "value": ...}}')
        image = field(record, "image", where) if "image" in record else None
        made.append(replace(_question(problem, image, field(turns[0], "value", where), suffix), where=where))
    return made


def _question(problem: Problem, image: str | None, text: str, suffix: str) -> Question:
    made = picture_question({"id": problem.id}, problem.where, image=image, text=text, name="id", suffix=suffix)
    # The original's answers say by `<image>` in the prompt which questions have a picture.
    record = {"question_id": problem.id, "prompt": made.text, "choices": list(problem.choices)}
    groups = dict(_groups(problem, image is not None))
    return replace(made, truth=problem.answer, choices=problem.choices, groups=groups, record=record)


def _groups(problem: Problem, picture: bool) -> Iterable[tuple[str, str]]:
    """The groups of ScienceQA's own tables: subject, grades, and what the question comes with."""
    if isinstance(problem.record.get("subject"), str):
        yield "subject", problem.record["subject"]
    grade = _DIGITS.search(str(problem.record.get("grade", "")))
    if grade:
        yield "grades", "1-6" if int(grade[0]) <= 6 else "7-12"
    yield "picture", "with picture" if picture else "without picture"
    yield "hint", "with hint" if problem.hint.strip() else "without hint"


def score(questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]) -> Scores:
    """Accuracy over all questions, and `image_accuracy` over those with a picture.

    `parse: llava` is the original's rule, which counts a question without an answer as wrong; `parse: fixed` reads
    every form that names one choice.
    """
    llava = options.get("parse", "fixed") == "llava"
    # The original knows questions with pictures by its log, and so leaves those without an answer out of their number.
    counts_missing = llava and options.get("pictures", "all") == "all"
    missing: Sequence[Question] = options.get("missing", ()) if counts_missing else ()
    counted = [*questions, *missing]
    letters: dict[str, str | None] = {
        q.id: choices.scienceqa(answers[q.id]) if llava else choices.fixed(answers[q.id], q.choices) for q in questions
    }
    letters |= {q.id: None for q in missing}
    # A letter beyond the question's choices is no answer; the original gives it the index -1.
    right = {q.id: float(letters[q.id] == q.truth) for q in counted}
    notes = [*choices.unread_note(questions, letters, llava)]
    if missing:
        notes.append(f"{choices.LLAVA}{len(missing)} without an answer count as wrong all the same")
    made = mean_scores(counted, right, {name: letter or "" for name, letter in letters.items()})
    values = dict(made.values)
    pictured = [right[q.id] for q in questions if q.images]
    if pictured:
        values["image_accuracy"] = 100 * sum(pictured) / len(pictured)
    more, more_notes = scienceqa_gpt4.values(questions, answers, llava)
    return replace(made, values={**values, **more}, notes=(*notes, *more_notes))
