"""A user's own questions: one JSON object per line, named fields, scored by comparing words or letters.

What the published benchmarks do in their own ways is here in its plain form: the answer is the expected one, it holds
the expected one, or it names the expected choice.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from lapilli.base.errors import DataError
from lapilli.data.sample import IMAGE_PLACEHOLDER, Image
from lapilli.evaluate.records import checked, field, read_records
from lapilli.evaluate.task import Question, Scores, Task

READ_OPTIONS = frozenset({"id", "text", "image", "answer", "choices", "groups", "suffix"})
EXACT_OPTIONS = frozenset({"ignore_case", "ignore_punctuation"})
CONTAINS_OPTIONS = frozenset({"ignore_case"})

LETTERS = string.ascii_uppercase


def read(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """Questions of a JSON-lines file or JSON list.

    The options `id`, `text`, `image`, `answer` and `choices` name the fields, by default `question_id`, `text`,
    `image`, `answer`, `choices`; a record may lack the last three. `image` is a path or a list of paths, `answer` a
    text or a list of texts that are all right (of choices also a letter or a number from 0), `groups` names fields to
    give accuracies for, `suffix` stands behind every question. Choices are listed behind the question as `A. ...`.
    """
    names = {key: str(options.get(key, default)) for key, default in _FIELDS.items()}
    suffix, groups = str(options.get("suffix", "")), _names(options.get("groups", ()), task)
    path = files["questions"]
    made = [_question(record, where, names, suffix, groups) for where, record in read_records(path)]
    return checked(made, str(path))


_FIELDS = {"id": "question_id", "text": "text", "image": "image", "answer": "answer", "choices": "choices"}


def _names(value: Any, task: Task) -> list[str]:
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise DataError(f"task {task.name}: options.groups must be a list of fields, not {value!r:.80}")
    return list(value)


def _question(
    record: dict[str, Any], where: str, names: Mapping[str, str], suffix: str, groups: Sequence[str]
) -> Question:
    name = field(record, names["id"], where, (str, int))
    text = field(record, names["text"], where)
    choices = _texts(record, names["choices"], where)
    images = tuple(Image(path=p) for p in _texts(record, names["image"], where))
    if images and IMAGE_PLACEHOLDER not in text:
        text = f"{IMAGE_PLACEHOLDER}\n" * len(images) + text
    if text.count(IMAGE_PLACEHOLDER) != len(images):
        raise DataError(
            f"{where}: {text.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} in the text, {len(images)} pictures; write "
            f"it once for each picture, or not at all"
        )
    if len(choices) > len(LETTERS):
        raise DataError(f"{where}: {len(choices)} choices; at most {len(LETTERS)} have a letter")
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    truth = _truth(record, names["answer"], where, choices)
    return Question(
        id=str(name),
        text="\n".join([text, *lines]) + suffix,
        images=images,
        truth=truth,
        choices=choices,
        groups={kind: str(field(record, kind, where, (str, int, float, bool))) for kind in groups},
        record={**record, "question_id": name},
        where=where,
    )


def _texts(record: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A text or a list of texts; empty if the field is not there or null."""
    value = record.get(key)
    if value is None:
        return ()
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise DataError(f'{where}: "{key}" must be a text or a list of texts, not {value!r:.80}')
    return tuple(listed)


def _truth(record: Mapping[str, Any], key: str, where: str, choices: Sequence[str]) -> Any:
    """The right answers, a tuple of texts; of a question with choices the right letter; None where there is none."""
    value = record.get(key)
    if value is None:
        return None
    if not choices:
        listed = value if isinstance(value, list) else [value]
        if not listed or any(isinstance(one, dict | list | bool) or one is None for one in listed):
            raise DataError(f'{where}: "{key}" must be a text or a list of texts, not {value!r:.80}')
        return tuple(str(one) for one in listed)
    letters = LETTERS[: len(choices)]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return letters[value]
    if isinstance(value, str) and value in choices:
        return letters[choices.index(value)]
    if isinstance(value, str) and len(value) == 1 and value in letters:
        return value
    raise DataError(
        f'{where}: "{key}" is {value!r:.80}; it must be one of the choices, a letter {letters[0]}-{letters[-1]}, or a '
        f"number from 0 to {len(choices) - 1}"
    )


# ---- scoring -------------------------------------------------------------------------------------------------------


def score_exact(questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]) -> Scores:
    """Right: the answer is one of the expected ones, blanks aside.

    By default case and punctuation at word ends are ignored; `ignore_case: false`, `ignore_punctuation: false`.
    """
    case, marks = bool(options.get("ignore_case", True)), bool(options.get("ignore_punctuation", True))
    plain = {q.id: _plain(answers[q.id], case, marks) for q in questions}
    right = {q.id: float(plain[q.id] in {_plain(t, case, marks) for t in _expected(q)}) for q in questions}
    return mean_scores(questions, right, plain)


def score_contains(questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]) -> Scores:
    """Right: one of the expected answers stands in the answer as whole words. By default case is ignored."""
    case = bool(options.get("ignore_case", True))
    right, read_as = {}, {}
    for question in questions:
        text = f" {_plain(answers[question.id], case, True)} "
        found = [t for t in _expected(question) if f" {_plain(t, case, True)} " in text]
        right[question.id], read_as[question.id] = float(bool(found)), found[0] if found else ""
    return mean_scores(questions, right, read_as)


def score_choice(questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]) -> Scores:
    """Right: the answer names the expected choice, by letter or by its text. What names none counts as wrong."""
    del options
    read_as = {q.id: read_choice(answers[q.id], q.choices) or "" for q in questions}
    right = {q.id: float(read_as[q.id] == _expected(q)[0]) for q in questions}
    lost = sum(not letter for letter in read_as.values())
    notes = (f"{lost} of {len(questions)} answers name no choice; they count as wrong",) if lost else ()
    return mean_scores(questions, right, read_as, notes)


_LETTER = re.compile(r"\(?([A-Z])\)?(?:[.):,]|$)")
_SAID = re.compile(r"\b(?:answer|option|choice)(?: is|:)? ?\(?([A-Z])\)?(?:\W|$)", re.IGNORECASE)


def read_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The letter that an answer names: `B`, `b`, `(B)`, `B. a cat`, `the answer is B`, or the choice's text."""
    text, letters = answer.strip(), LETTERS[: len(choices)]
    if len(text) == 1 and text.upper() in letters:
        return text.upper()
    same = [i for i, choice in enumerate(choices) if _plain(choice, True, True) == _plain(text, True, True)]
    if len(same) == 1:
        return letters[same[0]]
    found = [m[1].upper() for m in (_LETTER.match(text), *_SAID.finditer(text)) if m and m[1].upper() in letters]
    return found[0] if len(set(found)) == 1 else None


def mean_scores(
    questions: Sequence[Question],
    items: Mapping[str, float],
    parsed: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    name: str = "accuracy",
) -> Scores:
    """Scores whose headline is the mean of the items (each 0 to 1), in percent, with the mean of every group."""
    groups: dict[str, dict[str, dict[str, float]]] = {}
    counts: dict[str, dict[str, int]] = {}
    members: dict[tuple[str, str], list[float]] = {}
    for question in questions:
        for kind, group in question.groups.items():
            members.setdefault((kind, group), []).append(items[question.id])
    for (kind, group), values in sorted(members.items()):
        groups.setdefault(kind, {})[group] = {name: 100 * sum(values) / len(values)}
        counts.setdefault(kind, {})[group] = len(values)
    values = {name: 100 * sum(items.values()) / len(items)} if items else {}
    return Scores(values, dict(items), groups, counts, dict(parsed or {}), tuple(notes))


def _expected(question: Question) -> tuple[str, ...]:
    if question.truth is None:
        raise DataError(f"{question.where}: question {question.id} has no answer to compare with")
    return (question.truth,) if isinstance(question.truth, str) else question.truth


def _plain(text: str, ignore_case: bool, ignore_punctuation: bool) -> str:
    words = (text.casefold() if ignore_case else text).split()
    if ignore_punctuation:
        words = [word.strip(string.punctuation) or word for word in words]
    return " ".join(words)
