"""The folders and archives that pictures lie in, watched from one run to the next.

Reading every header again would take as long as the first time, so an index that outlives its run remembers when each
folder last got, lost or exchanged a file. A file that is overwritten in place does not show here; decoding it does.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

_FILE = "watched.json"
_TICK_SECONDS = 0.02
"""More than the step of any file system's clock that has one below a second."""

State = list[int] | None
"""Time of the last change in nanoseconds and, of an archive, bytes; None: not there."""


class Watch:
    """Collects places while pictures are looked at, and remembers their states."""

    def __init__(self) -> None:
        self._started_ns = time.time_ns()
        time.sleep(_TICK_SECONDS)  # what changes from now on has a later time than the start

    def save(self, folder: Path, places: Iterable[str]) -> None:
        """Write the state of every place into an index's `folder`.

        A place that has changed since this was made may have done so before or after its pictures were looked at, so
        it is remembered as changed.
        """
        states: dict[str, State] = {}
        for place in sorted({_existing(os.path.realpath(place)) for place in places if "\0" not in place}):
            state = _state(place)
            states[place] = [0] if state is not None and state[0] > self._started_ns else state
        (folder / _FILE).write_text(json.dumps(states), encoding="utf-8")


def changed(folder: Path) -> str | None:
    """A place that has changed since the index in `folder` was made. Raises OSError or ValueError if damaged."""
    states = dict(json.loads((folder / _FILE).read_text(encoding="utf-8")))
    return next((place for place, state in states.items() if _state(place) != state), None)


def _existing(path: str) -> str:
    """The path itself, or the archive that it runs through."""
    here = path
    while True:
        try:
            os.stat(here)
            return here
        except NotADirectoryError:
            here = os.path.dirname(here)
        except OSError:
            return path


def _state(path: str) -> State:
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return [facts.st_mtime_ns] if os.path.isdir(path) else [facts.st_mtime_ns, facts.st_size]
