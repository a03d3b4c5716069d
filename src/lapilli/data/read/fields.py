"""Fields that several formats share: text, pictures, weights, and where pictures stand in a turn."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lapilli.base.errors import DataError
from lapilli.data.read.record import kind, printable
from lapilli.data.sample import IMAGE_PLACEHOLDER, Image, Message, Part, Role, Text

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,20}://|data:")
_DATA = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}


def text_of(value: Any, where: str, field: str) -> str:
    """A field that must be text. Raises DataError for another kind, and for half characters that no file can hold."""
    if not isinstance(value, str):
        raise DataError(f"{where}: `{field}` must be text, not {kind(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: `{field}` holds half of a character ({value[error.start]!r} at {error.start}); "
                "write the whole character"
            ) from error
    return value


def picture(value: Any, where: str, field: str) -> Image:
    """A picture as a path, a `data:` address, bytes, or an object with one of these; DataError names `field`."""
    if isinstance(value, dict):
        for key in ("bytes", "url", "path"):
            if value.get(key) is not None:
                return picture(value[key], where, f"{field} {key}")
    if isinstance(value, bytes) and value:
        return Image(data=value)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {field} must be a path, not {'empty' if value in ('', b'') else kind(value)}")
    address = _ADDRESS.match(value)
    if address is None:
        return Image(text_of(value, where, "path"))
    if address[0] == "file://":
        return Image(text_of(value[7:], where, "path"))
    if _DATA.match(value):
        try:
            return Image(data=base64.b64decode(re.sub(r"\s", "", value[value.index(",") + 1 :]), validate=True))
        except (binascii.Error, ValueError) as error:
            raise DataError(f"{where}: {field} is a data: address that is not base64 ({error})") from error
    shown = printable(value[:60]) + ("..." if len(value) > 60 else "")
    raise DataError(
        f'{where}: {field} is the address "{shown}"; fetch the picture first and name its path '
        "(only paths, file:// and data:...;base64 are read)"
    )


def record_pictures(value: dict[str, Any], where: str) -> list[Image]:
    """The pictures that a record names for itself in `image` or `images`. Raises DataError."""
    if value.get("image") is not None and value.get("images") is not None:
        raise DataError(f"{where}: has both `image` and `images`; keep one")
    field = "images" if value.get("images") is not None else "image"
    given = value.get(field)
    if given is None:
        return []
    if isinstance(given, str | dict | bytes):
        given = [given]
    if not isinstance(given, list):
        raise DataError(f"{where}: `{field}` must be a path or a list of paths, not {kind(given)}")
    return [picture(one, where, f"`{field}` {i}") for i, one in enumerate(given, 1)]


def weight_of(value: Any, where: str, field: str) -> float:
    """A weight in the loss. Raises DataError unless it is a number from 0."""
    if isinstance(value, bool | int | float) and math.isfinite(value) and value >= 0:
        return float(value)
    raise DataError(f"{where}: `{field}` must be a number from 0 (not trained), not {value!r}")


def turn_weight(turn: dict[str, Any], where: str) -> float:
    """A turn's own weight, 0 or 1. Raises DataError."""
    weight = 1 if turn.get("weight") is None else turn["weight"]
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{where}: `weight` must be 0 (not trained) or 1, not {weight!r}")
    return float(weight)


def in_place(text: str, images: Iterator[Image]) -> tuple[Part, ...]:
    """The parts of a text with the next picture in place of each `<image>`."""
    parts: list[Part] = []
    for piece in re.split(f"({IMAGE_PLACEHOLDER})", text):
        if piece == IMAGE_PLACEHOLDER:
            parts.append(next(images))
        elif piece:
            parts.append(Text(piece))
    return tuple(parts)


def pictures_first(messages: Sequence[Message]) -> list[Message]:
    """LLaVA's rule for turns made of parts: pictures come first, a line break after each, blank ends are cut off."""
    placed = []
    for message in messages:
        pictures = [p for p in message.parts if isinstance(p, Image)]
        words = [p for p in message.parts if isinstance(p, Text) and p.text]
        if pictures:
            if words:
                words[0] = Text(words[0].text.lstrip(), words[0].weight)
                words[-1] = Text(words[-1].text.rstrip(), words[-1].weight)
            lead: list[Part] = [p for one in pictures for p in (one, Text("\n"))]
            parts = [*lead, *words] if any(w.text for w in words) else lead[:-1]
            placed.append(Message(message.role, tuple(parts), message.weight))
        else:
            placed.append(message)
    return placed


def disagreement(where: str, placeholders: int, images: int) -> DataError:
    """The error for a record whose text has more or fewer `<image>` than the record has pictures."""
    if not images:
        return DataError(
            f"{where}: the text has {placeholders} {IMAGE_PLACEHOLDER}, but the record has no `image`; "
            f"name the picture, or take {IMAGE_PLACEHOLDER} out of the text"
        )
    return DataError(
        f"{where}: `image` names {images} picture(s), but the text has {placeholders} {IMAGE_PLACEHOLDER}; "
        f"write {IMAGE_PLACEHOLDER} once for each picture, where it belongs"
    )
