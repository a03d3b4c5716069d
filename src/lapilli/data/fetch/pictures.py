"""Do the pictures that a data file names lie where they should? Asked once everything has come."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lapilli.data.read.stream import read_records


@dataclass
class Named:
    """Records of a data file, the pictures they name, and which of these are not there."""

    records: int = 0
    pictures: int = 0
    missing: int = 0
    examples: list[str] = field(default_factory=list)


def named_pictures(path: str | Path) -> Iterator[str]:
    """Every picture path that the records of a LLaVA-like file name, in order. Raises DataError as its reader does."""
    for record in read_records(path):
        yield from _paths(record.value)


def check_pictures(path: str | Path, root: str | Path, examples: int = 3) -> Named:
    """Count the pictures that are named and not below `root`. Raises DataError if the file can't be read."""
    result, base = Named(), os.fspath(root)
    for record in read_records(path):
        result.records += 1
        for name in _paths(record.value):
            result.pictures += 1
            if not os.path.isfile(os.path.join(base, name)):
                result.missing += 1
                if len(result.examples) < examples:
                    result.examples.append(name)
    return result


def _paths(value: object) -> list[str]:
    if not isinstance(value, dict):
        return []
    paths = value.get("image") if value.get("image") is not None else value.get("images")
    listed = paths if isinstance(paths, list) else [paths]
    return [path for path in listed if isinstance(path, str) and path and "\0" not in path]
