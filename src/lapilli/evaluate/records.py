"""A benchmark's files as records, each checked, with file and record named where one is wrong.

Shared by the readers: JSON lists, JSON lines, and the questions' own checks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lapilli.base.errors import DataError, nearest
from lapilli.evaluate.task import Question

SHOWN = 3
"""How many examples of a fault are named."""


def read_json(path: str | Path) -> Any:
    """A JSON file's value. Raises DataError for a file that can't be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:  # UnicodeDecodeError too
        raise DataError(f"{path}: not JSON ({error})") from error


def read_jsonl(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with `file: line N` for messages. Blank lines are passed over.

    Raises DataError for a line that is not a JSON object.
    """
    made: list[tuple[str, dict[str, Any]]] = []
    try:
        with Path(path).open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                where = f"{path}: line {number}"
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{where}: not JSON ({error})") from error
                if not isinstance(value, dict):
                    raise DataError(f"{where}: must be a JSON object, not {type(value).__name__}")
                made.append((where, value))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    return made


def read_records(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON list or of a JSON-lines file, told apart by what stands first."""
    try:
        with Path(path).open(encoding="utf-8-sig", errors="replace") as stream:
            first = stream.read(4096).lstrip()[:1]
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error
    if first != "[":
        return read_jsonl(path)
    made = [(f"{path}: record {i}", value) for i, value in enumerate(read_json(path), 1)]
    for where, value in made:
        if not isinstance(value, dict):
            raise DataError(f"{where}: must be a JSON object, not {type(value).__name__}")
    return made


def field(record: Mapping[str, Any], key: str, where: str, kind: type | tuple[type, ...] = str) -> Any:
    """A record's field. Raises DataError if it is not there or not of its kind (a bool is no number)."""
    if key not in record:
        raise DataError(f'{where}: has no "{key}"{nearest(key, record)}; it has: {", ".join(map(str, record))}')
    value = record[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        raise DataError(f'{where}: "{key}" must be {wanted}, not {type(value).__name__} ({value!r:.80})')
    return value


def checked(questions: Sequence[Question], source: str) -> list[Question]:
    """The questions, once it is known that there are some and that no id occurs twice. Raises DataError."""
    if not questions:
        raise DataError(f"{source}: no questions in it")
    counts = Counter(question.id for question in questions)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise DataError(f"{source}: {examples(twice, 'id', 'ids')} on more than one question")
    return list(questions)


def refuse(faults: Sequence[str], source: str, questions: int) -> None:
    """Raise DataError with how many of the questions have a fault and the first of them, if there are any."""
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:SHOWN])
        raise DataError(
            f"{source}: {len(faults)} of {questions} questions have no answer there; the first:\n{shown}\n"
            "are these files of the same split and version?"
        )


def examples(names: Iterable[str], one: str, many: str) -> str:
    """`3 ids ("a", "b", "c")`, `12 ids ("a", "b", "c", ...)`: a count with its first examples."""
    listed = list(names)
    shown = ", ".join(f'"{name}"' for name in listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")
    return f"{len(listed)} {one if len(listed) == 1 else many} ({shown})"
