"""Folders and files that are either complete or not there.

Everything is written under a temporary name beside its destination, flushed to the disk, and renamed. A process that
is killed in between leaves a `.draft-` folder that nothing reads and the next write removes.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lapilli.base.errors import RunError

_DRAFT = ".draft-"


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a draft folder that becomes `path` when the block ends without an error, and disappears otherwise.

    Raises RunError if `path` exists already.
    """
    if path.exists():
        raise RunError(f"{path}: exists already; choose another name or remove it")
    draft = path.with_name(_DRAFT + path.name)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        flush(draft)
        draft.rename(path)
        _flush_entry(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def atomic_write(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old content or the new, never a part."""
    draft = path.with_name(_DRAFT + path.name)
    draft.write_text(text, encoding="utf-8")
    _flush_entry(draft)
    os.replace(draft, path)
    _flush_entry(path.parent)


def flush(folder: Path) -> None:
    """Make every file below `folder`, and the folder's own entries, durable."""
    for entry in sorted(folder.rglob("*")):
        _flush_entry(entry)
    _flush_entry(folder)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
