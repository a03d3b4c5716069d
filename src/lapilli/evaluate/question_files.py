"""LLaVA's question files: a JSON object per line with `question_id`, `image` and `text`, prompt suffix included.

They come in LLaVA's eval.zip, one for each benchmark, and ids occur in them more than once where a benchmark has none
of its own (TextVQA, MME): such questions are told apart by a number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lapilli.data.sample import IMAGE_PLACEHOLDER, Image
from lapilli.evaluate.records import checked, field, read_records
from lapilli.evaluate.task import Question

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""What LLaVA-1.5 puts behind a question for a short answer."""


def llava_questions(path: str | Path, text: Callable[[str, str], str] | None = None) -> list[Question]:
    """The questions of one of LLaVA's files, as its model_vqa_loader.py asks them; `category` becomes a group.

    `text(text, where)` may change what is asked. Raises DataError for a record that lacks a field.
    """
    records = read_records(path)
    raw = [field(record, "question_id", where, (str, int)) for where, record in records]
    names = distinct([str(name) for name in raw])
    made = []
    for name, (where, record) in zip(names, records, strict=True):
        asked = field(record, "text", where)
        made.append(
            Question(
                id=name,
                text=with_image(asked if text is None else text(asked, where)),
                images=(Image(path=field(record, "image", where)),),
                groups=category_of(record),
                record=record,
                where=where,
            )
        )
    return checked(made, str(path))


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with `#1`, `#2`, ... behind those that occur more than once."""
    counts, seen = Counter(names), Counter[str]()
    made = []
    for name in names:
        seen[name] += 1
        made.append(f"{name}#{seen[name]}" if counts[name] > 1 else name)
    return made


def with_image(text: str) -> str:
    """A question's text with its picture in front of it, on a line of its own."""
    return f"{IMAGE_PLACEHOLDER}\n{text}"


def category_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The group by `category`, if the record has one other than LLaVA's filler `default`."""
    category = record.get("category")
    return {"category": category} if isinstance(category, str) and category != "default" else {}
