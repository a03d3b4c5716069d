"""How many answers are asked for elsewhere at a time, and how many wait for that here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lapilli.serve.backend import Gauges
from lapilli.serve.refusal import ApiError, invalid
from lapilli.serve.settings import Limits

_LONGEST_WAIT_SECONDS = 60.0
_NEWEST = 0.2
"""Weight of the newest answer in how long an answer usually takes."""


class Traffic:
    """At most `limits.slots` answers are asked for at a time, `limits.queue` wait. Touched by the event loop alone."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._door, self._slots = asyncio.Lock(), asyncio.Semaphore(limits.slots)
        self._taken = self._active = self._failures = 0
        self._usual_seconds = 1.0

    def admit(self, answers: int) -> None:
        """Take places for answers. Raises ApiError if there are none now, or never are."""
        room = self.limits.slots + self.limits.queue
        if answers > room:
            raise invalid(f"n: {answers}; this server makes {room} answers at a time at most", "n")
        over = self._taken + answers - room
        if over > 0:
            wait = min(_LONGEST_WAIT_SECONDS, self._usual_seconds * max(1.0, over / self.limits.slots))
            raise ApiError(429, "the queue is full", code="queue_full", retry_seconds=wait)
        self._taken += answers

    def release(self, answers: int, seconds: float | None) -> None:
        """Give places back; `seconds`: how long the answers took, if they were finished."""
        self._taken -= answers
        if seconds is not None:
            self._usual_seconds += _NEWEST * (seconds - self._usual_seconds)

    @asynccontextmanager
    async def turn(self, answers: int = 1) -> AsyncIterator[None]:
        """Inside, so many answers may be asked for. First come, first served."""
        held, wanted = 0, min(answers, self.limits.slots)
        try:
            async with self._door:  # one at a time collects slots, or two could wait for each other's
                while held < wanted:
                    await self._slots.acquire()
                    held += 1
            self._active += answers
            try:
                yield
            finally:
                self._active -= answers
        finally:
            for _ in range(held):
                self._slots.release()

    def lost(self) -> None:
        """Count a request that failed by their fault."""
        self._failures += 1

    def gauges(self, labels: dict[str, str], well: bool) -> Gauges:
        """What /metrics shows of it; `well`: whether they answer now."""
        return {
            "lapilli_active": ("Answers that were asked for elsewhere.", [(labels, self._active)]),
            "lapilli_waiting": ("Answers that wait for their turn.", [(labels, max(0, self._taken - self._active))]),
            "lapilli_slots": ("Answers that may be asked for at a time.", [(labels, self.limits.slots)]),
            "lapilli_failures": ("Requests lost elsewhere since the start.", [(labels, self._failures)]),
            "lapilli_up": ("Whether they answer there.", [(labels, int(well))]),
        }
