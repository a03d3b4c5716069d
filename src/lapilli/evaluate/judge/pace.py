"""How fast an endpoint is asked: so many requests a minute, and a pause for everybody when it asks for one."""

from __future__ import annotations

import time
from threading import Event, Lock


class Pace:
    """Turns for several threads; ends at once when `stop` is set."""

    def __init__(self, per_minute: float | None, stop: Event) -> None:
        self._apart = 60.0 / per_minute if per_minute else 0.0
        self._stop = stop
        self._next = self._pause_end = time.monotonic()
        self._lock = Lock()

    def turn(self) -> bool:
        """Wait for a turn; False if there is none because all was stopped."""
        with self._lock:
            self._next = mine = max(self._next, time.monotonic())
            self._next += self._apart
        while not self._stop.is_set():
            with self._lock:
                mine = max(mine, self._pause_end)
            left = mine - time.monotonic()
            if left <= 0:
                return True
            self._stop.wait(left)
        return False

    def pause(self, seconds: float) -> None:
        """Nobody has a turn for so long."""
        with self._lock:
            self._pause_end = max(self._pause_end, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> bool:
        """Wait for this thread alone; False if all was stopped."""
        return not self._stop.wait(seconds)
