"""Where data indexes are kept: one folder for all runs of a user, safe for any number of processes at once.

A folder is filled aside and renamed, so that it is there as a whole or not at all; of two processes that make the same
one, both succeed. What a killed process left is told by its lock, which nobody holds any more, and removed by the next.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lapilli.base.atomic import flush
from lapilli.base.errors import DataError

VARIABLE = "LAPILLI_CACHE"
"""Environment variable that names the user's cache folder."""

_REMEDY = f"name a folder that can be written with data.index, or with the environment variable {VARIABLE}"
_LOCK, _OLD = ".lock", ".old"


def index_root(given: str | None = None) -> Path:
    """The folder `given` by a recipe's `data.index`, else `index` in the user's cache folder.

    That is `$LAPILLI_CACHE`, else `$XDG_CACHE_HOME/lapilli`, else `~/.cache/lapilli`. Raises DataError if the user has
    no home folder.
    """
    if given is not None:
        return Path(given)
    own, common = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own).absolute() / "index"
    if os.path.isabs(common):  # a relative one is to be ignored, says the standard
        return Path(common) / "lapilli" / "index"
    home = Path(os.path.expanduser("~/.cache/lapilli"))
    if not home.is_absolute():
        raise DataError(f"there is no home folder to keep the data index in; {_REMEDY}")
    return home / "index"


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Turn an OSError of writing in `folder` into a DataError that names it and what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder}: can't keep the data index there ({error.strerror}); {_REMEDY}") from error


@contextmanager
def shared_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the name `path`, in place of what stood there.

    Who has mapped files of the older one keeps them. After an exception nothing is left. Raises DataError where `path`
    can't be written.
    """
    root = path.parent
    draft = root / f".{path.name}.{uuid.uuid4().hex[:12]}"
    with refusing(root):
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        lock = _locked(draft.with_name(draft.name + _LOCK))
    try:
        with refusing(root):
            draft.mkdir()
        yield draft
        with refusing(root):
            flush(draft)
            _publish(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):
            os.unlink(lock.name)
        lock.close()


def _publish(draft: Path, path: Path) -> None:
    """Give the draft its name, and remove what had it."""
    old = draft.with_name(draft.name + _OLD)
    with suppress(FileNotFoundError):
        os.rename(path, old)
    try:
        os.rename(draft, path)
    except OSError:
        if not path.is_dir():
            raise
        # Another process was first in this very moment; its folder is as good.
    shutil.rmtree(old, ignore_errors=True)


def _locked(path: Path) -> IO[str]:
    """A new lock file, locked for as long as it is open. Where the file system has no locks, it is only open."""
    while True:
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()  # another process took it for abandoned before it was locked


def _remove_abandoned(root: Path) -> None:
    """Remove drafts whose process is gone: their locks can be taken."""
    for path in root.glob(f".*{_LOCK}"):
        with suppress(OSError), open(path, "r+", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft = path.with_name(path.name.removesuffix(_LOCK))
            for left in (draft, draft.with_name(draft.name + _OLD)):
                shutil.rmtree(left, ignore_errors=True)
            path.unlink()
