"""Models of another server as a server's backend: vLLM or SGLang, or whatever speaks OpenAI's API.

That server makes the tokens; all else stays here: who may ask, what is looked at before it is sent on, how many wait,
how long, and what is said when it goes wrong. Every request goes to it as a stream, so that a client that leaves ends
it there too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import httpx
from fastapi import Request
from starlette.responses import JSONResponse, Response

from lapilli.data.template import Template
from lapilli.serve.backend import Card, Gauges, unknown_model
from lapilli.serve.completions import CLIENT_GONE, EventStream, GoneError
from lapilli.serve.metrics import Metrics
from lapilli.serve.refusal import ApiError, invalid
from lapilli.serve.remote import RemotePictures
from lapilli.serve.request import ChatRequest
from lapilli.serve.settings import Limits
from lapilli.serve.upstream.body import Target, Writer
from lapilli.serve.upstream.passage import Passage
from lapilli.serve.upstream.reply import Words, lines, whole

log = logging.getLogger(__name__)

_READERS, _FETCHERS = 4, 8
"""Requests whose pictures are decoded, and fetched, at a time."""
_LOOK_SECONDS = 0.5
"""How often a process that was started here is looked at."""
_CONNECT_SECONDS = 5.0
_LONGEST_WAIT_SECONDS = 60.0
_NEWEST = 0.2
"""Weight of the newest answer in how long an answer usually takes."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the other server is, and how it is spoken to; `root` without `/v1`."""

    root: str
    engine: str
    """What it is called in messages."""
    key: str | None = field(default=None, repr=False)
    health: str = "/health"
    """Answers 200 while it is well."""
    look_seconds: float = 10.0
    """How often that is asked."""
    ended: Callable[[], str | None] = lambda: None
    """What became of it, if it was started here and has ended."""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


@dataclass(eq=False)
class Elsewhere:
    """A model of the other server under the name it has here."""

    name: str
    target: Target
    template: Template | None = None
    created: int = field(default_factory=lambda: int(time.time()))


class Upstream:
    """A `Backend` over models of one other server.

    At most `limits.slots` answers are asked of it at a time, `limits.queue` wait here. `on_end` is called, in the event
    loop, when a server that was started here has ended by itself.
    """

    def __init__(
        self,
        models: Sequence[Elsewhere],
        endpoint: Endpoint,
        limits: Limits,
        *,
        remote: RemotePictures | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.endpoint, self.limits, self.metrics = endpoint, limits, Metrics()
        self._models = {model.name: model for model in models}
        self._writer = Writer(limits, remote)
        self._on_end = on_end
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="fetcher")
        self._door, self._slots = asyncio.Lock(), asyncio.Semaphore(limits.slots)
        self._client: httpx.AsyncClient | None = None
        self._well, self._missed, self._taken, self._active, self._failures = True, 0, 0, 0, 0
        self._usual_seconds = 1.0

    # ---- what a Backend is -----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def life(self, metrics: Metrics) -> AsyncIterator[None]:
        self.metrics = metrics
        wait = httpx.Timeout(None, connect=_CONNECT_SECONDS)  # the whole of a request is timed, not its parts
        # Servers close idle connections; one that is about to be closed must not be used again.
        bounds = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        async with httpx.AsyncClient(
            base_url=self.endpoint.root, headers=self.endpoint.headers, timeout=wait, limits=bounds, trust_env=False
        ) as self._client:
            looking = [asyncio.create_task(self._look_at_process()), asyncio.create_task(self._look_at_health())]
            try:
                yield
            finally:
                for task in looking:
                    task.cancel()
                    with suppress(asyncio.CancelledError):
                        await task
        for pool in (self._readers, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def names(self) -> list[str]:
        """What its models are called here."""
        return list(self._models)

    @property
    def alive(self) -> bool:
        return self._well

    async def cards(self) -> list[Card]:
        return [Card(m.name, m.created, m.template) for m in self._models.values()]

    async def complete(self, body: ChatRequest, request: Request) -> Response:
        model = self._models.get(body.model)
        if model is None:
            raise unknown_model(body.model, self._models)
        self._writer.check(body, model.target)
        passage = Passage(self, model.name, body.n or 1, request.scope["state"]["begun"])
        streams = False
        try:
            place = self._fetchers if self._writer.fetches(body) else self._readers
            asked = await asyncio.get_running_loop().run_in_executor(place, self._writer.write, body, model.target)
            self.metrics.count("lapilli_pictures_total", asked.pictures, model=model.name)
            passage.ask(asked.data, request)
            await passage.opened()  # what is wrong with a request is said by its status, streamed or not
            words = Words(model.name)
            if body.stream:
                streams = True
                return EventStream(passage, lines(passage, words, body))
            return JSONResponse(await whole(passage, words, body))
        except GoneError:
            return Response(status_code=CLIENT_GONE)
        finally:
            if not streams:
                passage.close()

    def gauges(self) -> Gauges:
        labels = {"model": ", ".join(self._models)}
        return {
            "lapilli_active": ("Answers that the engine was asked for.", [(labels, self._active)]),
            "lapilli_waiting": ("Answers that wait for a slot.", [(labels, max(0, self._taken - self._active))]),
            "lapilli_slots": ("Answers that may be asked for at a time.", [(labels, self.limits.slots)]),
            "lapilli_failures": ("Requests lost by the engine since the start.", [(labels, self._failures)]),
            "lapilli_up": ("Whether the engine answers.", [(labels, int(self.alive))]),
        }

    # ---- what a Passage needs --------------------------------------------------------------------------------------

    @property
    def client(self) -> httpx.AsyncClient:
        assert self._client is not None, "a backend answers inside its life"
        return self._client

    def admit(self, answers: int) -> None:
        """Take places for answers. Raises ApiError if there are none now, or never are."""
        room = self.limits.slots + self.limits.queue
        if not self.alive:
            raise ApiError(503, f"the engine ({self.endpoint.engine}) does not answer", code="engine_stopped")
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
    async def turn(self, answers: int) -> AsyncIterator[None]:
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
        """Count a request that failed by the engine's fault."""
        self._failures += 1

    # ---- whether it lives ------------------------------------------------------------------------------------------

    async def _look_at_process(self) -> None:
        while (what := self.endpoint.ended()) is None:
            await asyncio.sleep(_LOOK_SECONDS)
        self._well = False
        log.error("%s: %s", self.endpoint.engine, what)
        self._on_end()

    async def _look_at_health(self) -> None:
        while True:
            await asyncio.sleep(self.endpoint.look_seconds)
            if self.endpoint.ended() is not None:
                return
            try:
                well = (await self.client.get(self.endpoint.health, timeout=30.0)).status_code == 200
            except httpx.HTTPError:
                well = False
            self._missed = 0 if well else self._missed + 1
            was, self._well = self._well, self._missed < 2
            if was != self._well:
                log.warning("%s %s", self.endpoint.engine, "answers again" if self._well else "does not answer")
