"""Two files that must speak of the same questions: paired by id, never by their order.

Whatever is in one and not in the other is an error with counts and first examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lapilli.base.errors import DataError
from lapilli.data.sample import IMAGE_PLACEHOLDER, Image
from lapilli.evaluate.records import examples, field, read_records
from lapilli.evaluate.task import Question

Record = tuple[str, dict[str, Any]]
"""Where a record stands, and the record."""


def by_id(path: str | Path, key: str) -> dict[str, Record]:
    """Every record of a file under its id as text. Raises DataError if an id occurs twice."""
    records = read_records(path)
    names = [str(field(record, key, where, (str, int))) for where, record in records]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path}: {examples(twice, 'id', 'ids')} on more than one record")
    return dict(zip(names, records, strict=True))


def must_match(asked: Iterable[str], known: Iterable[str], questions: str | Path, others: str | Path) -> None:
    """Raise DataError unless both files hold the same ids."""
    asked, known = list(asked), list(known)
    lacking, strange = _without(asked, set(known)), _without(known, set(asked))
    wrong: list[str] = []
    if lacking:
        wrong.append(f"{examples(lacking, 'question', 'questions')} of {questions} without a record in {others}")
    if strange:
        wrong.append(f"{examples(strange, 'record', 'records')} of {others} without a question in {questions}")
    if wrong:
        raise DataError("; ".join(wrong) + "; are these files of the same split and version?")


def picture_question(
    record: Mapping[str, Any], where: str, *, image: str | None, text: str, name: str = "question_id", suffix: str = ""
) -> Question:
    """A question as the original asks it: `<image>` and a line break before the text, whose own `<image>` is dropped.

    `suffix` stands on a line of its own behind it. The record keeps the prompt that the original logs.
    """
    text = text.replace(IMAGE_PLACEHOLDER, "").strip()
    asked = f"{text}\n{suffix}" if suffix else text
    if image is not None:
        asked = f"{IMAGE_PLACEHOLDER}\n{asked}"
    number = field(record, name, where, (str, int))
    return Question(
        id=str(number),
        text=asked,
        images=() if image is None else (Image(path=image),),
        record={**record, "question_id": number},
        where=where,
    )


def _without(names: Iterable[str], others: set[str]) -> list[str]:
    return [name for name in names if name not in others]


def unique(questions: Sequence[Question], path: str | Path) -> list[Question]:
    """The questions, once it is known that no id of their file occurs twice. Raises DataError."""
    names = Counter(str(question.record["question_id"]) for question in questions)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise DataError(f"{path}: {examples(twice, 'id', 'ids')} on more than one question")
    return list(questions)
