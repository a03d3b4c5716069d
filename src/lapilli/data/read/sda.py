"""Cerebras' semantic data array as Samples: turns of parts, each part with its own weight in the loss.

A turn is `{"type": "user", "content": [{"text": ...}, {"image": path}, ...]}` with optional lists beside the content:
`semantic_loss_weight` (a number per part), `semantic_drop_mask` (true: the part is left out) and
`semantic_attention_mask`. Any other key of a part is a named region of text; `include_tags` writes its name around it.
Turns of `prompt` and `completion`, and documents without types, as pretraining has them, are one question and answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lapilli.base.errors import DataError, unknown
from lapilli.data.read.fields import picture, pictures_first, text_of, weight_of
from lapilli.data.read.record import Placement, RawRecord, kind
from lapilli.data.sample import Image, Message, Part, Role, Sample, Text
from lapilli.data.template import check_turns

TYPES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "prompt": "user",
    "completion": "assistant",
}
_LISTS = ("semantic_loss_weight", "semantic_drop_mask", "semantic_attention_mask")


@dataclass(frozen=True)
class Regions:
    """What a part gets by its region's name where its turn says nothing: Cerebras' `processing.semantic_*`."""

    loss_weight: Mapping[str, float] = field(default_factory=dict)
    drop: Mapping[str, bool] = field(default_factory=dict)
    attention: Mapping[str, bool] = field(default_factory=dict)


def find(value: Any) -> list[Any] | None:
    """The semantic data array in a decoded record: the record itself, or its one field that is such an array.

    A field may also hold the array as JSON text, as Cerebras' reader wants its columns.
    """
    if _is_array(value):
        return value
    if not isinstance(value, dict):
        return None
    found = []
    for key, given in value.items():
        if key in ("conversations", "messages"):
            continue
        array = _decoded(given) if isinstance(given, str) else given
        if _is_array(array):
            found.append(array)
    return found[0] if len(found) == 1 else None


def parse(record: RawRecord, placement: Placement = "keep", regions: Regions | None = None) -> Sample:
    """One record as a Sample. Raises DataError with file, record, turn, part and what to do."""
    where, value = record.where, record.value
    turns = find(value)
    if turns is None:
        raise DataError(f"{where}: holds no semantic data array")
    regions = regions or Regions()
    messages: list[Message] = []
    for i, turn in enumerate(turns, 1):
        messages += _messages(turn, regions, f"{where}: turn {i}")
    check_turns(messages, where)
    if placement == "front":
        messages = pictures_first(messages)
    name = value.get("id") if isinstance(value, dict) else None
    return Sample(str(record.number if name is None else name), tuple(messages), where)


def _decoded(text: str) -> Any:
    """What JSON text holds if it may be an array of turns, else None."""
    if text.lstrip()[:1] != "[" or '"content"' not in text:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_array(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(t, dict) and isinstance(t.get("content"), list) and "role" not in t for t in value)
    )


def _messages(turn: dict[str, Any], regions: Regions, where: str) -> list[Message]:
    """One turn as a message; a document without a type as the pictures that it begins with, then the rest."""
    name = turn.get("type")
    if name is None:
        parts = _parts(turn, "document", regions, where)
        opening = next((i for i, p in enumerate(parts) if not isinstance(p, Image)), len(parts))
        return [Message("user", parts[:opening]), Message("assistant", parts[opening:])]
    if not isinstance(name, str) or name not in TYPES:
        raise DataError(f"{where}: {unknown('type', str(name), TYPES)}")
    parts = _parts(turn, name, regions, where)
    if name == "system" and any(isinstance(p, Image) or p.weight for p in parts):
        raise DataError(f"{where}: a system turn can hold neither a picture nor text that is trained")
    return [Message(TYPES[name], parts)]


def _parts(turn: dict[str, Any], role: str, regions: Regions, where: str) -> tuple[Part, ...]:
    content = turn["content"]
    lists = {}
    for key in _LISTS:
        given = turn.get(key)
        if given is not None and (not isinstance(given, list) or len(given) != len(content)):
            length = len(given) if isinstance(given, list) else kind(given)
            raise DataError(f"{where}: `{key}` must be a list of {len(content)}, one per part, not {length}")
        lists[key] = given or [None] * len(content)
    parts: list[Part] = []
    for i, (part, weight, drop, attend) in enumerate(zip(content, *(lists[key] for key in _LISTS), strict=True), 1):
        parts += _part(part, (weight, drop, attend), role, regions, f"{where}, part {i}")
    return tuple(parts)


def _part(part: Any, settings: tuple[Any, Any, Any], role: str, regions: Regions, where: str) -> list[Part]:
    """A part as it stands in the text, with its tags; nothing if it is dropped."""
    names = [key for key in part if key != "include_tags"] if isinstance(part, dict) else []
    if len(names) != 1:
        shown = f"has {', '.join(map(str, names))}" if names else f"is {kind(part)}"
        raise DataError(f"{where}: must be an object with one region such as `text` or `image`; this one {shown}")
    name = names[0]
    weight = _setting(settings[0], regions.loss_weight.get(name))
    if _flag(_setting(settings[1], regions.drop.get(name), False), where, "semantic_drop_mask"):
        return []
    if not _flag(_setting(settings[2], regions.attention.get(name), True), where, "semantic_attention_mask"):
        raise DataError(
            f"{where}: `semantic_attention_mask` hides this part from attention, which lapilli does not do; "
            "leave the part out with `semantic_drop_mask`"
        )
    share = None if weight is None else weight_of(weight, where, "semantic_loss_weight")
    bar, slash = ("|", "") if role == "document" else ("", "/")
    before, after = (f"<{bar}{name}{bar}>", f"<{slash}{bar}{name}{bar}>") if part.get("include_tags") else ("", "")
    if name == "image":
        shown = picture(part[name], where, "`image`")
        return [Text(before, share), shown, Text(after, share)] if before else [shown]
    text = text_of(part[name], where, name)
    if not text:
        raise DataError(f"{where}: `{name}` is empty; leave the part out")
    return [Text(before + text + after, share)]


def _setting(*given: Any) -> Any:
    return next((one for one in given if one is not None), None)


def _flag(value: Any, where: str, name: str) -> bool:
    if value in (0, 1):
        return bool(value)
    raise DataError(f"{where}: `{name}` must hold true or false, not {value!r}")
