"""LLaVA's conversation files, JSON list or JSONL, as Samples.

Reading is two steps, so that one bad record neither hides the others nor stops the listing: `read_records` goes
through the file, `parse` turns one record into a Sample or says what is wrong with it. Which of the two layouts a file
has is seen from its first character, not from its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lapilli.base.errors import DataError, unknown
from lapilli.data.sample import IMAGE_PLACEHOLDER, Image, Message, Part, Role, Sample, Text
from lapilli.data.template import check_turns

Placement = Literal["keep", "front"]

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record as the file has it. `number` counts from 1; `problem` is set where it is not even JSON."""

    file: str
    number: int
    value: Any
    problem: str | None = None

    @property
    def where(self) -> str:
        """File and record for messages, with the record's own id where it has one."""
        name = self.value.get("id") if isinstance(self.value, dict) else None
        return f"{self.file}: record {self.number}" + (f" (id {name})" if isinstance(name, str | int) else "")


def read(path: str | Path, placement: Placement = "keep") -> Iterator[Sample]:
    """Every Sample of a file, in order. Raises DataError at the first record that is wrong."""
    for record in read_records(path):
        yield parse(record, placement)


def read_records(path: str | Path) -> Iterator[RawRecord]:
    """Every record of a file, in order, unchecked. Raises DataError if the file as a whole can't be read."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: can't read it ({error.strerror})") from error
    start = text.lstrip()[:1]
    if start == "[":
        yield from _json_list(str(path), text)
    elif start == "{":
        yield from _json_lines(str(path), text)
    elif not start:
        raise DataError(f"{path}: the file is empty")
    else:
        raise DataError(f"{path}: begins with {start!r}: neither a JSON list ([...]) nor JSON lines ({{...}} per line)")


def parse(record: RawRecord, placement: Placement = "keep") -> Sample:
    """One record as a Sample. `placement` says where its pictures stand in their turns (see `_front`).

    Raises DataError with file, record, field and what to do.
    """
    where, value = record.where, record.value
    if record.problem is not None:
        raise DataError(f"{where}: {record.problem}")
    if not isinstance(value, dict):
        raise DataError(f"{where}: a record must be an object with `conversations`, not {_kind(value)}")
    images = _images(value, where)
    turns = _turns(value, where)
    counts = [text.count(IMAGE_PLACEHOLDER) for _, text, _ in turns]
    if placement == "front":
        messages = _front(turns, images, counts, where)
    else:
        if sum(counts) != len(images):
            raise DataError(_disagreement(where, sum(counts), len(images)))
        rest = iter(images)
        messages = [Message(role, _in_place(text, rest), weight) for role, text, weight in turns]
    check_turns(messages, where)
    name = value.get("id")
    return Sample(str(record.number if name is None else name), tuple(messages), where)


def _json_list(path: str, text: str) -> Iterator[RawRecord]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {_not_json(error)}") from error
    for number, value in enumerate(values, 1):
        yield RawRecord(path, number, value)


def _json_lines(path: str, text: str) -> Iterator[RawRecord]:
    number = 0
    # Not splitlines: U+2028 and its like may stand inside a JSON string.
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        number += 1
        try:
            yield RawRecord(path, number, json.loads(line))
        except (ValueError, RecursionError) as error:
            problem = _not_json(error, line_number)
            if number == 1 and line.strip() == "{":
                problem += "; an object over several lines must stand in a list: put it in [ ]"
            yield RawRecord(path, number, None, problem)


def _not_json(error: ValueError | RecursionError, line: int = 1) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (line {error.lineno + line - 1}, column {error.colno})"
    # A number of thousands of digits, or brackets nested by the thousand.
    return f"can't be read as JSON: {error} (line {line})"


def _images(value: dict[str, Any], where: str) -> list[Image]:
    if value.get("image") is not None and value.get("images") is not None:
        raise DataError(f"{where}: has both `image` and `images`; keep one")
    field = "images" if value.get("images") is not None else "image"
    paths = value.get(field)
    if paths is None:
        return []
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list):
        raise DataError(f"{where}: `{field}` must be a path or a list of paths, not {_kind(paths)}")
    for i, path in enumerate(paths):
        if not isinstance(path, str) or not path:
            raise DataError(f"{where}: `{field}` {i + 1} must be a path, not {_kind(path) if path != '' else 'empty'}")
    return [Image(path) for path in paths]


def _turns(value: dict[str, Any], where: str) -> list[tuple[Role, str, float]]:
    """Role, text and weight of every turn."""
    field = "messages" if "conversations" not in value and "messages" in value else "conversations"
    turns = value.get(field)
    if turns is None:
        raise DataError(f"{where}: `conversations` is missing")
    if not isinstance(turns, list):
        raise DataError(f"{where}: `{field}` must be a list of turns, not {_kind(turns)}")
    if not turns:
        raise DataError(f"{where}: `{field}` is empty; leave the record out")
    return [_turn(turn, f"{where}: {field} turn {i}") for i, turn in enumerate(turns, 1)]


def _turn(turn: Any, where: str) -> tuple[Role, str, float]:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: must be an object with `from` and `value`, not {_kind(turn)}")
    role = _field(turn, ("from", "role"), where)
    if role not in ROLES:
        raise DataError(f"{where}: {unknown('role', role, ROLES)}")
    weight = turn.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{where}: `weight` must be 0 (not trained) or 1, not {weight!r}")
    return ROLES[role], _field(turn, ("value", "content"), where), float(weight)


def _field(turn: dict[str, Any], names: tuple[str, str], where: str) -> str:
    present = [name for name in names if name in turn]
    if len(present) != 1:
        raise DataError(f"{where}: needs `{names[0]}` or `{names[1]}`" + (", not both" if present else ""))
    value = turn[present[0]]
    if not isinstance(value, str):
        raise DataError(f"{where}: `{present[0]}` must be text, not {_kind(value)}")
    return value


def _in_place(text: str, images: Iterator[Image]) -> tuple[Part, ...]:
    parts: list[Part] = []
    for piece in re.split(f"({IMAGE_PLACEHOLDER})", text):
        if piece == IMAGE_PLACEHOLDER:
            parts.append(next(images))
        elif piece:
            parts.append(Text(piece))
    return tuple(parts)


def _front(turns: list[tuple[Role, str, float]], images: list[Image], counts: list[int], where: str) -> list[Message]:
    """LLaVA's rule: in a turn with pictures they come first, a line break after each, and blank ends are cut off.

    The original knows one picture per record and makes all placeholders of a turn one. So several placeholders in a
    turn are one picture where the record has just one picture per such turn; otherwise each is a picture of its own.
    """
    if sum(counts) != len(images):
        if sum(1 for count in counts if count) != len(images):
            raise DataError(_disagreement(where, sum(counts), len(images)))
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


def _disagreement(where: str, placeholders: int, images: int) -> str:
    if not images:
        return (
            f"{where}: the text has {placeholders} {IMAGE_PLACEHOLDER}, but the record has no `image`; "
            f"name the picture, or take {IMAGE_PLACEHOLDER} out of the text"
        )
    return (
        f"{where}: `image` names {images} picture(s), but the text has {placeholders} {IMAGE_PLACEHOLDER}; "
        f"write {IMAGE_PLACEHOLDER} once for each picture, where it belongs"
    )


def _kind(value: Any) -> str:
    names = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
