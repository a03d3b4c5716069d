"""MME: two yes-or-no questions about each picture, in fourteen subjects; points for answers and for pairs of them.

A subject's score is its accuracy plus its accuracy+ (both questions of a picture right), 200 at most; perception is
the sum over ten subjects, cognition over four.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lapilli.base.errors import DataError
from lapilli.evaluate.question_files import llava_questions
from lapilli.evaluate.records import examples, refuse
from lapilli.evaluate.task import Question, Scores, Task

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBJECTS = (*PERCEPTION, *COGNITION)

_ASIDE = re.compile(r"Answer the question using a single word or phrase\.|Please answer yes or no\.")


def read(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """LLaVA's questions, with the answers that lie beside MME's pictures: a text file for each, question TAB answer.

    Joined by subject, picture and question, what the prompts add aside. Raises DataError for a question without an
    answer, or a picture without two questions.
    """
    del task, options
    made = [_of_subject(question) for question in llava_questions(files["questions"])]
    pairs = Counter(picture(question) for question in made)
    odd = [name for name, count in pairs.items() if count != 2]
    if odd:
        raise DataError(f"{files['questions']}: {examples(odd, 'picture', 'pictures')} without two questions")
    if "truth" not in files:
        return made
    root = Path(files["truth"])
    known: dict[Path, dict[str, str]] = {}
    made = [_with_truth(question, root, known) for question in made]
    lacking = [f'{q.where}: "{_bare(str(q.record["text"]))}" on {picture(q)}' for q in made if q.truth is None]
    refuse(lacking, str(root), len(made))
    return made


def read_answer(answer: str) -> str:
    """`yes`, `no` or `other`: what stands in the first four letters, as MME's calculation.py reads it."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def picture(question: Question) -> str:
    """The picture that a question belongs to: its subject and file name."""
    return str(question.record["question_id"])


def score(questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]) -> Scores:
    """Points: perception, cognition and their sum; accuracy, accuracy+ and their sum for each subject, in percent.

    Accuracy+ is over pictures; one whose second question has no answer is not counted as right.
    """
    del options
    said = {question.id: read_answer(answers[question.id]) for question in questions}
    items = {question.id: float(said[question.id] == question.truth) for question in questions}
    pairs: dict[str, list[Question]] = {}
    for question in questions:
        pairs.setdefault(picture(question), []).append(question)
    named = [asked[0].groups["category"] for asked in pairs.values()]
    subject = np.array([SUBJECTS.index(name) for name in named])
    asked = np.array([len(both) for both in pairs.values()], dtype=np.float64)
    right = np.array([sum(items[question.id] for question in both) for both in pairs.values()])

    every = _points(subject, asked, right)
    groups = {
        name: {"accuracy": float(every[0, i]), "accuracy_plus": float(every[1, i]), "score": float(every[:, i].sum())}
        for i, name in enumerate(SUBJECTS)
        if name in named
    }
    other, absent = list(said.values()).count("other"), [name for name in SUBJECTS if name not in named]
    notes = [f"{other} of {len(questions)} answers are neither yes nor no; they count as wrong"] if other else []
    if absent:
        notes.append(f"no questions of {', '.join(absent)}: the sums are over the others")
    return Scores(
        values=_sums(every),
        items=items,
        groups={"category": groups},
        counts={"category": dict(Counter(question.groups["category"] for question in questions))},
        parsed=said,
        notes=tuple(notes),
        again=lambda drawn: _sums(_points(subject[drawn], asked[drawn], right[drawn]))["perception"],
        order=tuple(both[0].id for both in pairs.values()),
    )


def _points(subject: np.ndarray, asked: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(2, 14): accuracy and accuracy+ of each subject in percent, NaN without questions; pictures' numbers are (n,)."""
    size = len(SUBJECTS)
    totals = np.bincount(subject, asked, size), np.bincount(subject, minlength=size)
    correct = np.bincount(subject, right, size), np.bincount(subject, right == 2, size)
    with np.errstate(invalid="ignore"):
        return 100 * np.stack(correct) / np.stack(totals)


def _sums(points: np.ndarray) -> dict[str, float]:
    """The sums over the subjects that have questions; NaN over none."""
    scores = points.sum(axis=0)
    made = {}
    for name, part in (("perception", scores[: len(PERCEPTION)]), ("cognition", scores[len(PERCEPTION) :])):
        made[name] = float(np.nansum(part)) if np.isfinite(part).any() else float("nan")
    return {**made, "total": float(np.nansum(list(made.values())))}


def _of_subject(question: Question) -> Question:
    subject = picture(question).partition("/")[0]
    if subject not in SUBJECTS:
        raise DataError(
            f'{question.where}: question_id "{picture(question)}" must begin with a subject: {", ".join(SUBJECTS)}'
        )
    return replace(question, groups={"category": subject})


def _with_truth(question: Question, root: Path, known: dict[Path, dict[str, str]]) -> Question:
    folder = root / question.groups["category"]
    if (folder / "questions_answers_YN").is_dir():
        folder = folder / "questions_answers_YN"
    path = folder / f"{Path(picture(question)).name.partition('.')[0]}.txt"
    if path not in known:
        known[path] = _answers(path)
    return replace(question, truth=known[path].get(_bare(str(question.record["text"]))))


def _answers(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); MME's answers lie beside its pictures") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    made: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        asked, tab, answer = line.strip().rpartition("\t")
        if line.strip() and (not tab or answer.lower() not in ("yes", "no")):
            raise DataError(f"{path}: line {number}: must be a question, a tab, and Yes or No")
        made[_bare(asked)] = answer.lower()
    return made


def _bare(text: str) -> str:
    return " ".join(_ASIDE.sub(" ", text).split())
