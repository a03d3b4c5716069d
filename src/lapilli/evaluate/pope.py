"""POPE: is there such a thing in the picture? Yes or no, asked about things that are random, popular or likely there.

A model that says yes to everything is right half of the time, which is why F1 and the share of yes are reported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lapilli.base.errors import DataError
from lapilli.evaluate.question_files import SHORT_ANSWER, llava_questions
from lapilli.evaluate.records import field, read_records, refuse
from lapilli.evaluate.task import Question, Scores, Task

_NO = frozenset({"No", "not", "no"})
_LABELS = ("yes", "no")


def read(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """LLaVA's questions; their labels from the records themselves, or from POPE's files, one for each category.

    The numbers in POPE's files start anew in each, so labels are joined by category, picture and question. Raises
    DataError for a question without a label.
    """
    del task, options
    questions = llava_questions(files["questions"])
    labels = _labels(Path(files["truth"])) if "truth" in files else None
    made = [_with_label(question, labels) for question in questions]
    lacking = [question for question in made if labels is not None and question.truth is None]
    refuse([_sought(question) for question in lacking], str(files.get("truth")), len(made))
    return made


def read_answer(answer: str) -> str:
    """`no` if the first sentence has the word No, no or not, else `yes`, as POPE and LLaVA read it.

    Words are what blanks part, commas aside; NO, Nope and an empty answer are a yes.
    """
    words = answer.split(".", maxsplit=1)[0].replace(",", "").split(" ")
    return "no" if _NO.intersection(words) else "yes"


def score(questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]) -> Scores:
    """Accuracy, precision, recall, F1 and share of yes for each category, and the means over categories.

    A share of nothing (no yes said, no yes true) counts as 0, and is noted; the original stops there.
    """
    del options
    said = {question.id: read_answer(answers[question.id]) for question in questions}
    category = [question.groups.get("category", "all") for question in questions]
    names = sorted(set(category))
    member = np.array([names.index(name) for name in category])
    yes = np.array([said[question.id] == "yes" for question in questions])
    true = np.array([question.truth == "yes" for question in questions])
    parts = {name: measures(yes[member == i], true[member == i]) for i, name in enumerate(names)}

    def mean_f1(indices: np.ndarray) -> float:
        where, drawn, wanted = member[indices], yes[indices], true[indices]
        f1 = [measures(drawn[where == i], wanted[where == i])["f1"] for i in range(len(names)) if (where == i).any()]
        return float(np.mean(f1))

    empty = [name for i, name in enumerate(names) if not (yes & true)[member == i].any()]
    return Scores(
        values={key: float(np.mean([part[key] for part in parts.values()])) for key in parts[names[0]]},
        items={question.id: float(said[question.id] == question.truth) for question in questions},
        groups={"category": parts},
        counts={"category": {name: category.count(name) for name in names}},
        parsed=said,
        notes=(f"no right yes in {', '.join(empty)}: F1 counts as 0 there",) if empty else (),
        again=mean_f1,
    )


def measures(yes: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """The five measures, in percent, from what was said and what is true, each (n,) of bool."""
    hits = int((yes & true).sum())
    precision, recall = _share(hits, int(yes.sum())), _share(hits, int(true.sum()))
    return {
        "f1": 100 * _share(2 * precision * recall, precision + recall),
        "accuracy": 100 * float((yes == true).mean()),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "yes_ratio": 100 * float(yes.mean()),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _labels(folder: Path) -> dict[tuple[str, str, str], list[str]]:
    """Category, picture and question to its labels; several only where a question stands there more than once."""
    paths = sorted(folder.glob("coco_pope_*.json"))
    if not paths:
        raise DataError(f"{folder}: no coco_pope_<category>.json in it")
    made: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for path in paths:
        category = path.stem.removeprefix("coco_pope_")
        for where, record in read_records(path):
            key = category, field(record, "image", where), _bare(field(record, "text", where))
            made[key].append(_label(field(record, "label", where), where))
    return made


def _with_label(question: Question, labels: dict[tuple[str, str, str], list[str]] | None) -> Question:
    record = question.record
    if isinstance(record.get("label"), str):
        return replace(question, truth=_label(record["label"], question.where))
    if labels is None:
        return question
    category = question.groups.get("category", "")
    found = labels.get((category, record["image"], _bare(record["text"])))
    if not found:
        return question
    return replace(question, truth=found.pop(0) if len(found) > 1 else found[0])


def _sought(question: Question) -> str:
    category, record = question.groups.get("category", ""), question.record
    asked = f'"{_bare(record["text"])}" on {record["image"]}'
    return f"{question.where}: coco_pope_{category}.json has no label of {asked}"


def _bare(text: str) -> str:
    return text.removesuffix(SHORT_ANSWER).strip()


def _label(text: str, where: str) -> str:
    if text not in _LABELS:
        raise DataError(f'{where}: "label" must be yes or no, not {text!r:.40}')
    return text
