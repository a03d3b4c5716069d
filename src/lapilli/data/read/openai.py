"""OpenAI's messages as Samples: content is text, or a list of text and picture parts in the order they are read.

Pictures stand in the parts (`image_url` with a path or a `data:` address, or `image`), or in the record's `images`, of
which bare `{"type": "image"}` parts, or `<image>` in content that is text, take one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lapilli.base.errors import DataError, unknown
from lapilli.data.read import llava
from lapilli.data.read.fields import (
    ROLES,
    disagreement,
    in_place,
    picture,
    pictures_first,
    record_pictures,
    text_of,
    turn_weight,
    weight_of,
)
from lapilli.data.read.record import Placement, RawRecord, kind
from lapilli.data.sample import IMAGE_PLACEHOLDER, Image, Message, Part, Role, Sample, Text
from lapilli.data.template import check_turns

_ROLES: dict[str, Role] = {**ROLES, "developer": "system"}
_TEXTS = ("text", "input_text", "output_text")
_PICTURES = ("image_url", "input_image", "image")


def parse(record: RawRecord, placement: Placement = "keep") -> Sample:
    """One record with `messages` as a Sample. Raises DataError with file, record, field and what to do."""
    where, value = record.where, record.value
    turns = value["messages"]
    if not isinstance(turns, list) or not any(
        isinstance(t, dict) and isinstance(t.get("content"), list) for t in turns
    ):
        return llava.parse(record, placement)
    images = record_pictures(value, where)
    rest = iter(images)
    messages = [_message(turn, rest, len(images), f"{where}: messages turn {i}") for i, turn in enumerate(turns, 1)]
    left = sum(1 for _ in rest)
    if left:
        raise DataError(f"{where}: `images` names {len(images)} pictures, and no part takes the last {left}")
    check_turns(messages, where)
    name = value.get("id")
    if placement == "front":
        messages = pictures_first(messages)
    return Sample(str(record.number if name is None else name), tuple(messages), where)


def _message(turn: Any, rest: Iterator[Image], images: int, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: must be an object with `role` and `content`, not {kind(turn)}")
    role = text_of(turn.get("role"), where, "role")
    if role not in _ROLES:
        raise DataError(f"{where}: {unknown('role', role, _ROLES)}")
    content = turn.get("content")
    if isinstance(content, list):
        parts = tuple(_part(part, rest, f"{where}, part {i}") for i, part in enumerate(content, 1))
    else:
        text = text_of(content, where, "content")
        try:
            parts = in_place(text, rest)
        except StopIteration as error:
            raise disagreement(where, text.count(IMAGE_PLACEHOLDER), images) from error
    if _ROLES[role] == "system" and any(isinstance(p, Image) for p in parts):
        raise DataError(f"{where}: a system message can't hold a picture; move it to the first question")
    return Message(_ROLES[role], parts, turn_weight(turn, where))


def _part(part: Any, rest: Iterator[Image], where: str) -> Part:
    if isinstance(part, str):
        return Text(text_of(part, where, "text"))
    if not isinstance(part, dict):
        raise DataError(f"{where}: must be an object with `type`, not {kind(part)}")
    name = text_of(part.get("type"), where, "type")
    if name in _TEXTS:
        weight = part.get("weight")
        text = text_of(part.get("text"), where, "text")
        return Text(text, None if weight is None else weight_of(weight, where, "weight"))
    if name not in _PICTURES:
        raise DataError(f"{where}: {unknown('type', name, (*_TEXTS, *_PICTURES))}")
    for key in ("image_url", "image", "url", "path"):
        if part.get(key) is not None:
            return picture(part[key], where, f"`{key}`")
    taken = next(rest, None) if name == "image" else None
    if taken is None:
        raise DataError(f"{where}: names no picture, and the record's `images` has none left for it")
    return taken
