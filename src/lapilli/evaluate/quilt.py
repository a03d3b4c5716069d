"""Quilt-VQA, its part with and without red circles, and PVQA: open questions and yes-or-no ones on histopathology.

Open answers are compared word by word, yes or no is read from the answer. Protocol llava is Quilt-LLaVA's
quilt_eval.py, whose "exact match" is the share of the answer's words that the truth holds; official compares whole
answers, counts words as SQuAD does (Rajpurkar et al., 2016), and takes only an answer that says yes or no for one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lapilli.base.errors import DataError
from lapilli.evaluate.pairing import by_id, must_match, unique
from lapilli.evaluate.question_files import llava_questions
from lapilli.evaluate.records import field
from lapilli.evaluate.task import Question, Scores, Task
from lapilli.evaluate.vqa import normalise_official

READ_OPTIONS = frozenset({"closed_answer"})
SCORE_OPTIONS = frozenset({"parse"})

CLOSED = "CLOSED"
OPEN = ("OPEN", "other")
_YES_NO = ("yes", "no")
_WORD = re.compile(r"[a-z]+")

Measures = tuple[float, float, float, float]
"""Exact match, F1, precision, recall of an open answer, 0 to 1 each."""


def read(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """Questions of the file without answers, joined by id to the file with them (the part `truth`).

    `closed_answer` names the field with the answer of yes-or-no questions. With the part `anchor`, another model's
    answers, protocol llava cuts each answer to the length of that model's. Raises DataError for other ids, an unknown
    kind of question, or a yes-or-no question whose answer is neither.
    """
    del task
    path = files["questions"]
    made = unique(llava_questions(path), path)
    if "truth" not in files:
        return made
    known = by_id(files["truth"], "id")
    must_match([q.id for q in made], known, path, files["truth"])
    closed = str(options.get("closed_answer", "answer"))
    return with_anchors([_with_truth(q, *known[q.id], closed) for q in made], files)


def _with_truth(question: Question, where: str, record: Mapping[str, Any], closed: str) -> Question:
    kind = field(record, "answer_type", where)
    if kind not in (CLOSED, *OPEN):
        raise DataError(f'{where}: "answer_type" is "{kind}"; it must be {CLOSED} or {" or ".join(OPEN)}')
    truth = str(field(record, closed if kind == CLOSED else "answer", where, (str, int, float)))
    if kind == CLOSED and _spoken(truth) not in _YES_NO:
        raise DataError(f'{where}: the answer of a {CLOSED} question is "{truth:.80}"; it must be yes or no')
    return replace(question, truth=truth, groups={**question.groups, "answer_type": kind})


def with_anchors(questions: Sequence[Question], files: Mapping[str, Any]) -> list[Question]:
    """The questions with the part `anchor`'s answer in their records, where there is such a file."""
    if "anchor" not in files:
        return list(questions)
    from lapilli.evaluate.answers import join, read_answers

    joined = join(questions, read_answers(files["anchor"]))
    joined.check(str(files["anchor"]))
    must_match([q.id for q in questions], joined.answers, "the questions", files["anchor"])
    return [replace(q, record={**q.record, "anchor": joined.answers[q.id].text}) for q in questions]


def cut(question: Question, text: str, seen: Callable[[str], str] = str) -> str:
    """An answer as `seen`, as long as the anchor's is where there is one."""
    anchor = question.record.get("anchor")
    return seen(text) if anchor is None else seen(text)[: len(seen(anchor))]


def score(questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]) -> Scores:
    """Means over open questions of exact_match, f1, precision and recall, and yes_no_accuracy over the others.

    The headline is recall of open questions, what the paper's tables call open; its items are those questions alone.
    A value without a question of its kind is not a number.
    """
    llava = options.get("parse", "fixed") == "llava"
    texts = {q.id: cut(q, answers[q.id], normalise_quilt) if llava else answers[q.id] for q in questions}
    opened = {q.id: _llava(texts[q.id], q) if llava else _fixed(texts[q.id], q) for q in questions if _is_open(q)}
    closed = [q for q in questions if not _is_open(q)]
    said = {q.id: _yes_no_llava(texts[q.id]) if llava else _yes_no(texts[q.id]) for q in closed}
    hits = [said[q.id] == _spoken(q.truth) for q in closed]
    names = ("exact_match", "f1", "precision", "recall")
    values = {name: _percent([found[place] for found in opened.values()]) for place, name in enumerate(names)}
    values["yes_no_accuracy"] = _percent(hits)
    unread = sum(word is None for word in said.values())
    notes = (f"{unread} of {len(closed)} answers to yes-or-no questions say neither; they count as wrong",)
    parts = {"open": (len(opened), names), "yes or no": (len(closed), ("yes_no_accuracy",))}
    return Scores(
        values,
        items={name: found[3] for name, found in opened.items()},
        groups={
            "answer_type": {k: {name: values[name] for name in shown} for k, (count, shown) in parts.items() if count}
        },
        counts={"answer_type": {kind: count for kind, (count, _) in parts.items() if count}},
        parsed={q.id: said[q.id] or "" if q.id in said else texts[q.id] for q in questions},
        notes=notes if unread else (),
    )


def _is_open(question: Question) -> bool:
    return question.groups["answer_type"] != CLOSED


def _percent(shares: Sequence[float]) -> float:
    return 100 * sum(shares) / len(shares) if shares else math.nan


def normalise_quilt(text: str) -> str:
    """An answer as quilt_utils.py makes it comparable: as the VQA evaluation does, from lower case on."""
    return normalise_official(text.lower()).replace(",", "")


def _llava(text: str, question: Question) -> Measures:
    # The original normalises once before the cut and again in each measure.
    said = Counter(normalise_quilt(text).split())
    true = Counter(normalise_quilt(normalise_quilt(question.truth)).split())
    total = sum(said.values())
    if not total:
        return 0.0, 0.0, 0.0, 0.0
    exact = sum(word in said for word in true) / total
    # A word that both have counts as often as the answer says it, and is never lacking.
    both = sum(count for word, count in said.items() if word in true)
    lacking = sum(count for word, count in true.items() if word not in said)
    return exact, *_f1(both, total, both + lacking)


def _fixed(text: str, question: Question) -> Measures:
    said, true = normalise_official(text.lower()).split(), normalise_official(question.truth.lower()).split()
    both = sum((Counter(said) & Counter(true)).values())
    return float(said == true), *_f1(both, len(said), len(true))


def _f1(both: int, said: int, true: int) -> tuple[float, float, float]:
    if not both:
        return 0.0, 0.0, 0.0
    precision, recall = both / said, both / true
    return 2 * precision * recall / (precision + recall), precision, recall


def _spoken(truth: str) -> str:
    return normalise_quilt(truth)


def _yes_no_llava(text: str) -> str:
    words = text.replace(",", "").split(" ")
    return "no" if "not" in words or "no" in words else "yes"


def _yes_no(text: str) -> str | None:
    """`yes` or `no` if the answer begins with it, or says one of them and not the other."""
    words = _WORD.findall(text.lower())
    named = {word for word in words if word in _YES_NO}
    if words and words[0] in _YES_NO:
        return words[0]
    return named.pop() if len(named) == 1 else None
