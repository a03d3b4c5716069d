"""A model's replicas in a Ray cluster, as the server sees them: in place of an engine thread of its own.

Answers wait here, in their order, and each goes to the replica with most room as soon as one has any; so a replica that
ends takes with it only what grew in it. To everything in front it looks like `Worker`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from lapilli.generate.processor import Prompt
from lapilli.serve.passing import Numbered, Packed
from lapilli.serve.replicas.replica import Asked
from lapilli.serve.worker import Event, Lost, Piece, Post, Wanted

log = logging.getLogger(__name__)

FAILURES = (RayError, RayServeException)
"""What a call to a replica raises when it, its machine or the way to it fails."""

_LOOK_SECONDS = 0.1
"""How often it is looked for answers that nobody waits for any more."""
_BEAT_SECONDS = 5.0
"""How often replicas hear that the server is there."""
_AGAIN_SECONDS = 0.5
"""From a replica's end to the next attempt to reach it; twice as long each time that it fails."""
_LONGEST_PAUSE_SECONDS = 30.0


@dataclass(eq=False, slots=True)
class _Given:
    """An answer that a replica has, or is about to."""

    wanted: Wanted
    there: bool = False
    """Whether the replica said that it has it."""
    told: bool = False
    """Whether the replica was told that nobody waits for it."""


@dataclass(eq=False, slots=True)
class _Replica:
    label: str
    handle: Any
    takes: int
    server: str = ""
    """What this server calls itself on the stream that is open now."""
    up: bool = False
    given: dict[int, _Given] = field(default_factory=dict)

    @property
    def room(self) -> int:
        return self.takes - len(self.given) if self.up else 0


class Replicas:
    """The replicas of one model, by handles of their Ray Serve deployments. Touched by the event loop alone."""

    def __init__(self, name: str, handles: Sequence[Any], takes: int) -> None:
        self._replicas = [_Replica(f"{name}, replica {i}", handle, takes) for i, handle in enumerate(handles, 1)]
        self._waiting: deque[Wanted] = deque()
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._due = False
        self._post: Post | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failures = 0

    @property
    def alive(self) -> bool:
        """Whether answers are being made."""
        return self.up > 0

    @property
    def up(self) -> int:
        """Replicas that answer now."""
        return sum(one.up for one in self._replicas)

    @property
    def active(self) -> int:
        """Answers that grow now."""
        return sum(len(one.given) for one in self._replicas)

    def start(self, post: Post) -> None:
        """Listen to the replicas; `post` gets what they make."""
        self._post, self._loop = post, asyncio.get_running_loop()
        for one in self._replicas:
            self._begin(self._listen(one))
        self._begin(self._look())
        self._begin(self._beat())

    async def listening(self) -> None:
        """Wait until one of the replicas answers."""
        while not self.alive:
            await asyncio.sleep(_LOOK_SECONDS)

    def want(self, wanted: Sequence[Wanted]) -> None:
        """Let answers to one prompt wait for their turn."""
        self._waiting += wanted
        self._deal_soon()

    def stop(self, wait_seconds: float = 10.0) -> None:
        """Listen no more; what still grows is lost. Called in another thread than the event loop's."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(wait_seconds)

    async def _end(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("what listens to replicas has failed", exc_info=task.exception())

    async def _listen(self, one: _Replica) -> None:
        """Hear what a replica makes, and after its end what the one makes that Ray starts in its place."""
        pause, again = _AGAIN_SECONDS, False
        while True:
            one.server, reason, stream = uuid.uuid4().hex, "it was stopped", None
            try:
                await one.handle.open.remote()
                stream = one.handle.options(stream=True).events.remote(one.server)
                async for made in stream:
                    if not made:  # it listens
                        one.up, pause = True, _AGAIN_SECONDS
                        if again:
                            log.info("%s: answers again", one.label)
                        self._deal_soon()
                    self._hear(one, made)
            except FAILURES as error:
                reason = _said(error)
            finally:
                one.up, again, lost = False, True, len(one.given)
                self._lose(one, list(one.given))
                if stream is not None:
                    stream.cancel()
            log.error("%s: has ended (%s), %d answers are lost; Ray starts another one", one.label, reason, lost)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _hear(self, one: _Replica, made: Sequence[Numbered]) -> None:
        heard: list[tuple[Wanted, Event]] = []
        for number, event in made:
            given = one.given.get(number)
            if given is not None:
                heard.append((given.wanted, event))
                if not isinstance(event, Piece):
                    del one.given[number]
                    self.failures += isinstance(event, Lost)
        if heard and self._post is not None:
            self._post(heard)
        if self._waiting:
            self._deal_soon()

    def _lose(self, one: _Replica, numbers: Sequence[int]) -> None:
        self._hear(one, [(number, Lost()) for number in numbers])

    def _deal_soon(self) -> None:
        """Deal once everything that arrives at this moment is here: answers to one prompt travel together."""
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._deal)

    def _deal(self) -> None:
        self._due = False
        dealt: dict[_Replica, list[tuple[Prompt, list[int]]]] = {}
        last: tuple[Prompt, _Replica] | None = None
        while self._waiting:
            if self._waiting[0].left:
                self._waiting.popleft()
                continue
            one = max(self._replicas, key=lambda r: r.room)
            prompt = self._waiting[0].prompt
            if last is not None and last[0] is prompt and last[1].room > 0:
                one = last[1]
            if one.room <= 0:
                break
            number = next(self._numbers)
            one.given[number] = _Given(self._waiting.popleft())
            bundles = dealt.setdefault(one, [])
            if not bundles or bundles[-1][0] is not prompt:
                bundles.append((prompt, []))
            bundles[-1][1].append(number)
            last = prompt, one
        for one, bundles in dealt.items():
            self._begin(self._send(one, bundles))

    async def _send(self, one: _Replica, bundles: list[tuple[Prompt, list[int]]]) -> None:
        server, numbers = one.server, [n for _, some in bundles for n in some]
        wanted = {n: one.given[n].wanted for n in numbers}
        asked = [
            Asked(Packed.of(prompt), tuple((n, wanted[n].decoding, wanted[n].whole) for n in some))
            for prompt, some in bundles
        ]
        try:
            taken = await one.handle.want.remote(server, asked)
        except FAILURES as error:
            log.error("%s: could not be asked (%s)", one.label, _said(error))
            taken = False
        if not taken:
            self._lose(one, numbers)
        for number in numbers:
            if number in one.given:
                one.given[number].there = True

    async def _look(self) -> None:
        """Tell replicas of answers that nobody waits for any more."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if any(wanted.left for wanted in self._waiting):
                self._waiting = deque(w for w in self._waiting if not w.left)
            for one in self._replicas:
                gone = [n for n, g in one.given.items() if g.there and not g.told and g.wanted.left]
                for number in gone:
                    one.given[number].told = True
                if gone:
                    self._begin(self._leave(one, gone))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            await asyncio.gather(*(self._leave(one, []) for one in self._replicas if one.up))

    async def _leave(self, one: _Replica, numbers: list[int]) -> None:
        try:
            await one.handle.leave.remote(one.server, numbers)
        except FAILURES as error:
            log.debug("%s: could not be told (%s)", one.label, _said(error))  # its stream ends, and says so


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
