"""LLaVA's conversations, and ShareGPT's, as Samples: turns of text with `<image>` where a picture stands.

A file of them is a JSON list or JSON lines, see `data/read/stream`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lapilli.base.errors import DataError, unknown
from lapilli.data.read.fields import (
    ROLES,
    disagreement,
    in_place,
    record_pictures,
    text_of,
    turn_weight,
)
from lapilli.data.read.record import Placement, RawRecord, kind
from lapilli.data.read.stream import read_records
from lapilli.data.sample import IMAGE_PLACEHOLDER, Image, Message, Part, Role, Sample, Text
from lapilli.data.template import check_turns

__all__ = ["ROLES", "Placement", "RawRecord", "parse", "read", "read_records"]


def read(path: str | Path, placement: Placement = "keep") -> Iterator[Sample]:
    """Every Sample of a file, in order. Raises DataError at the first record that is wrong."""
    for record in read_records(path):
        yield parse(record, placement)


def parse(record: RawRecord, placement: Placement = "keep") -> Sample:
    """One record as a Sample. `placement` says where its pictures stand in their turns (see `_front`).

    Raises DataError with file, record, field and what to do.
    """
    where, value = record.where, record.value
    if record.problem is not None:
        raise DataError(f"{where}: {record.problem}")
    if not isinstance(value, dict):
        raise DataError(f"{where}: a record must be an object with `conversations`, not {kind(value)}")
    images = record_pictures(value, where)
    turns = _turns(value, where)
    counts = [text.count(IMAGE_PLACEHOLDER) for _, text, _ in turns]
    if placement == "front":
        messages = _front(turns, images, counts, where)
    else:
        if sum(counts) != len(images):
            raise disagreement(where, sum(counts), len(images))
        rest = iter(images)
        messages = [
            Message(role, in_place(text, rest) if count else (Text(text),) if text else (), weight)
            for (role, text, weight), count in zip(turns, counts, strict=True)
        ]
    check_turns(messages, where)
    name = value.get("id")
    return Sample(str(record.number if name is None else name), tuple(messages), where)


def _turns(value: dict[str, Any], where: str) -> list[tuple[Role, str, float]]:
    """Role, text and weight of every turn; ShareGPT's `system` beside the turns is the first one."""
    field = "messages" if "conversations" not in value and "messages" in value else "conversations"
    turns = value.get(field)
    if turns is None:
        raise DataError(f"{where}: `conversations` is missing")
    if not isinstance(turns, list):
        raise DataError(f"{where}: `{field}` must be a list of turns, not {kind(turns)}")
    if not turns:
        raise DataError(f"{where}: `{field}` is empty; leave the record out")
    made = [_turn(turn, f"{where}: {field} turn {i}") for i, turn in enumerate(turns, 1)]
    if value.get("system") and made[0][0] != "system":
        made.insert(0, ("system", text_of(value["system"], where, "system"), 1.0))
    return made


def _turn(turn: Any, where: str) -> tuple[Role, str, float]:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: must be an object with `from` and `value`, not {kind(turn)}")
    role = _field(turn, ("from", "role"), where)
    if role not in ROLES:
        raise DataError(f"{where}: {unknown('role', role, ROLES)}")
    return ROLES[role], _field(turn, ("value", "content"), where), turn_weight(turn, where)


def _field(turn: dict[str, Any], names: tuple[str, str], where: str) -> str:
    present = [name for name in names if name in turn]
    if len(present) != 1:
        raise DataError(f"{where}: needs `{names[0]}` or `{names[1]}`" + (", not both" if present else ""))
    return text_of(turn[present[0]], where, present[0])


def _front(turns: list[tuple[Role, str, float]], images: list[Image], counts: list[int], where: str) -> list[Message]:
    """LLaVA's rule: in a turn with pictures they come first, a line break after each, and blank ends are cut off.

    The original knows one picture per record and makes all placeholders of a turn one. So several placeholders in a
    turn are one picture where the record has just one picture per such turn; otherwise each is a picture of its own.
    """
    if sum(counts) != len(images):
        if sum(1 for count in counts if count) != len(images):
            raise disagreement(where, sum(counts), len(images))
        counts = [min(count, 1) for count in counts]
    messages, rest = [], iter(images)
    for (role, text, weight), count in zip(turns, counts, strict=True):
        parts: list[Part] = [Text(text)] if text else []
        if count:
            parts = []
            for _ in range(count):
                parts += [next(rest), Text("\n")]
            words = text.replace(IMAGE_PLACEHOLDER, "").strip()
            parts = [*parts, Text(words)] if words else parts[:-1]
        messages.append(Message(role, tuple(parts), weight))
    return messages
