"""Where a task's files lie, and a clear word where they don't.

The data folder holds one folder per task, as the original's `playground/data/eval` does, or the files themselves where
only one task is asked for; any file can be named by hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from lapilli.base.errors import DataError, RecipeError, unknown
from lapilli.evaluate.task import Task


def locate(task: Task, data: str | Path, named: Mapping[str, str] | None = None, alone: bool = True) -> dict[str, Path]:
    """Every part of a task's data that is there, as a path; `named` are those the user names by hand.

    `alone`: the files may lie in `data` itself. Optional parts that are missing are left out. Raises DataError naming
    each missing file, the task and where to get it; RecipeError for a part that the task does not have.
    """
    named = named or {}
    for part in named:
        if part not in task.files:
            raise RecipeError(f"--files {part}=...: {unknown(f'file of task {task.name}', part, task.files)}")
    data = Path(data).expanduser()
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; it should hold the files of task {task.name}")
    root = data / (task.folder or task.name)
    if not root.is_dir() and alone:
        root = data
    found: dict[str, Path] = {}
    missing: list[str] = []
    for part, place in task.files.items():
        path = Path(named[part]).expanduser() if part in named else root / place
        if path.exists():
            found[part] = path
        elif part not in task.optional or part in named:
            missing.append(f"{path} ({part})")
    if missing:
        get = f"; get it: {task.obtain}" if task.obtain else ""
        raise DataError(f"task {task.name}: no file {', '.join(missing)}{get}; --files PART=PATH names another place")
    return found


def read_overrides(given: Sequence[str]) -> dict[str, str]:
    """`part=path` texts of the command line. Raises RecipeError for another form."""
    made: dict[str, str] = {}
    for text in given:
        part, equals, path = text.partition("=")
        if not equals or not part or not path:
            raise RecipeError(f'--files "{text}": must be PART=PATH, such as questions=my.jsonl')
        made[part] = path
    return made


def digests(files: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Path and SHA-256 of every part that is a file; folders are named only."""
    made: dict[str, dict[str, str]] = {}
    for part, path in files.items():
        made[part] = {"path": str(path)}
        if path.is_file():
            with path.open("rb") as stream:
                made[part]["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    return made
