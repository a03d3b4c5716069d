"""Records without turns as Samples: a picture and its caption, a question and its answer, or a list of such pairs.

What WebDataset shards and datasets of captions and visual questions hold. A caption answers its picture alone; a
question's pictures stand before it, a line break after each, unless its text says where with `<image>`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lapilli.base.errors import DataError
from lapilli.data.read.fields import disagreement, in_place, picture, pictures_first, record_pictures, text_of
from lapilli.data.read.record import Placement, RawRecord, kind
from lapilli.data.sample import IMAGE_PLACEHOLDER, Image, Message, Part, Sample, Text
from lapilli.data.template import check_turns

CAPTIONS = ("caption", "text", "txt")
PATHS = ("image_url", "image_path")
"""Columns of captions that name the picture where the record has no `image`."""
PAIRS = (("question", "answer"), ("prompt", "completion"), ("user", "assistant"))


def fits(value: dict[str, Any]) -> bool:
    """Whether a record has the fields of this format."""
    if isinstance(value.get("texts"), list) or any(value.get(q) is not None and a in value for q, a in PAIRS):
        return True
    pictures = any(value.get(key) is not None for key in ("image", "images", *PATHS))
    return pictures and any(value.get(key) is not None for key in CAPTIONS)


def parse(record: RawRecord, placement: Placement = "keep") -> Sample:
    """One record as a Sample. Raises DataError with file, record, field and what to do."""
    where, value = record.where, record.value
    images = record_pictures(value, where)
    path = next((key for key in PATHS if value.get(key) is not None), None)
    if not images and path is not None:
        images = [picture(value[path], where, f"`{path}`")]
    if isinstance(value.get("texts"), list):
        pairs = [_pair(one, f"{where}: texts {i}") for i, one in enumerate(value["texts"], 1)]
    elif any(value.get(q) is not None and a in value for q, a in PAIRS):
        pairs = [_pair(value, where)]
    else:
        key = next(key for key in CAPTIONS if value.get(key) is not None)
        pairs = [("", text_of(value[key], where, key).strip())]
    placeholders = sum(text.count(IMAGE_PLACEHOLDER) for pair in pairs for text in pair)
    if placeholders and placeholders != len(images):
        raise disagreement(where, placeholders, len(images))
    rest = iter(images)
    messages = []
    for question, answer in pairs:
        asked = in_place(question, rest) if placeholders else _asked(question, rest)
        messages += [Message("user", asked), Message("assistant", in_place(answer, rest))]
    check_turns(messages, where)
    if placement == "front":
        messages = pictures_first(messages)
    name = value.get("id")
    return Sample(str(record.number if name is None else name), tuple(messages), where)


def _asked(question: str, images: Iterator[Image]) -> tuple[Part, ...]:
    """All pictures that are left, then the question."""
    given = list(images)
    if not question:
        return tuple(given)
    lead: list[Part] = [part for one in given for part in (one, Text("\n"))]
    return (*lead, Text(question))


def _pair(value: Any, where: str) -> tuple[str, str]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be an object with a question and its answer, not {kind(value)}")
    for question, answer in PAIRS:
        if value.get(question) is not None:
            return text_of(value[question], where, question), text_of(value.get(answer), where, answer)
    names = " or ".join(f"`{q}` and `{a}`" for q, a in PAIRS)
    raise DataError(f"{where}: needs {names}")
