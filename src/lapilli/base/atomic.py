"""Files and folders that are either there and whole, or not there.

What a run writes is written under a temporary name beside its place, made durable (fsync) and renamed. A folder may
get a completion marker too, last, so that a later copy of it that was cut short is told from a whole one.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lapilli.base.errors import RunError

MARKER = ".complete"
_TEMPORARY = ".tmp-"
_REPLACED = ".old-"


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new one, never half of it."""
    path = Path(path)
    aside = _aside(path, _TEMPORARY)
    try:
        with open(aside, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    _sync(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """`atomic_write` of indented JSON; refuses NaN and infinity, which other readers can't read."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class Draft:
    """A folder that is being written under a temporary name, `path`, to be published under its own, or discarded.

    For writers that begin and end it in different places; `atomic_folder` is the same in one.
    """

    def __init__(self, place: str | Path, *, replace: bool = False, marker: bool = False) -> None:
        self.place, self._replace, self._marker = Path(place), replace, marker
        if not replace:
            refuse_taken(place)
        self.place.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.place.parent, self.place.name)
        self.path = _aside(self.place, _TEMPORARY)
        self.path.mkdir()

    def publish(self) -> None:
        """Make all of it durable and give it its name; with a marker if that was asked for."""
        flush(self.path)
        if self._marker:
            atomic_write(self.path / MARKER, "")
        _switch(self.path, self.place, self._replace)
        _sync(self.place.parent)

    def discard(self) -> None:
        """Remove what was written, if it has not been published."""
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False, marker: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the name `path`, durable, with `MARKER` inside if asked.

    After an exception nothing is left of it, and what stood at `path` stands. What a killed writer left is removed by
    the next one. With `replace`, an older folder stays until the new one is durable. Raises RunError if `path` is taken
    and `replace` is false.
    """
    draft = Draft(path, replace=replace, marker=marker)
    try:
        yield draft.path
        draft.publish()
    finally:
        draft.discard()


def is_complete(path: str | Path) -> bool:
    """Whether a folder written with a marker is whole."""
    return (Path(path) / MARKER).is_file()


def remove(path: str | Path) -> None:
    """Delete a folder so that it is never seen half deleted: it loses its name first."""
    path = Path(path)
    if path.exists():
        aside = _aside(path, _REPLACED)
        os.rename(path, aside)
        shutil.rmtree(aside)


def remove_leftovers(parent: str | Path, name: str | None = None) -> list[str]:
    """Delete what killed writers of `name` (None: of anything) left in `parent`, and return what it was called.

    Only for a place that one writer at a time has, as a run its run folder.
    """
    parent = Path(parent)
    if not parent.is_dir():
        return []
    heads = [f".{name}{kind}" if name else kind for kind in (_TEMPORARY, _REPLACED)]
    left = [p for p in parent.iterdir() if p.name.startswith(".") and any(h in p.name for h in heads)]
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return sorted(p.name for p in left)


def refuse_taken(path: str | Path) -> None:
    """Raise RunError if something stands at `path`."""
    path = Path(path)
    if path.exists():
        raise RunError(f"{path}: exists already; choose another name or remove it")


def _switch(aside: Path, path: Path, replace: bool) -> None:
    if not replace:
        refuse_taken(path)
        os.rename(aside, path)
        return
    old = _aside(path, _REPLACED)
    if path.exists():
        os.rename(path, old)
    os.rename(aside, path)
    shutil.rmtree(old, ignore_errors=True)


def _aside(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}{kind}{uuid.uuid4().hex[:8]}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(root: Path) -> None:
    """Make every file below `root`, and the folders' own entries, durable."""
    for base, _, files in os.walk(root, topdown=False):
        for name in files:
            _sync(Path(base) / name)
        _sync(Path(base))
