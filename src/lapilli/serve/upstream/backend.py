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
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import httpx
from fastapi import Request
from starlette.responses import Response

from lapilli.data.template import Template
from lapilli.serve.backend import Card, Gauges, unknown_model
from lapilli.serve.elsewhere.passage import Passage, reply_from
from lapilli.serve.elsewhere.traffic import Traffic
from lapilli.serve.metrics import Metrics
from lapilli.serve.refusal import ApiError
from lapilli.serve.remote import RemotePictures
from lapilli.serve.request import ChatRequest
from lapilli.serve.settings import Limits
from lapilli.serve.threads import ReadingThreads
from lapilli.serve.upstream.body import Target, Writer
from lapilli.serve.upstream.passage import bring

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
"""How often a process that was started here is looked at."""
_CONNECT_SECONDS = 5.0


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
        self.endpoint, self.metrics, self.traffic = endpoint, Metrics(), Traffic(limits)
        self._models = {model.name: model for model in models}
        self._writer = Writer(limits, remote)
        self._on_end = on_end
        self._threads = ReadingThreads()
        self._client: httpx.AsyncClient | None = None
        self._well, self._missed = True, 0

    @asynccontextmanager
    async def life(self, metrics: Metrics) -> AsyncIterator[None]:
        self.metrics = metrics
        wait = httpx.Timeout(None, connect=_CONNECT_SECONDS)  # the whole of a request is timed, not its parts
        # Servers close idle connections; one that is about to be closed must not be used again.
        bounds = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        async with httpx.AsyncClient(
            base_url=self.endpoint.root, headers=self.endpoint.headers, timeout=wait, limits=bounds, trust_env=False
        ) as client:
            self._client = client
            looking = [asyncio.create_task(self._look_at_process()), asyncio.create_task(self._look_at_health(client))]
            try:
                yield
            finally:
                for task in looking:
                    task.cancel()
                    with suppress(asyncio.CancelledError):
                        await task
        self._threads.close()

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
        if not self.alive:
            raise ApiError(503, f"the engine ({self.endpoint.engine}) does not answer", code="engine_stopped")
        self._writer.check(body, model.target)
        passage = Passage(self.traffic, self.metrics, model.name, body.n or 1, request.scope["state"]["begun"])

        async def ask() -> None:
            asked = await self._threads.run(self._writer.fetches(body), self._writer.write, body, model.target)
            self.metrics.count("lapilli_pictures_total", asked.pictures, model=model.name)
            assert self._client is not None, "a backend answers inside its life"
            passage.ask([bring(passage, self._client, self.endpoint.engine, asked.data)], request)

        return await reply_from(passage, body, ask)

    def gauges(self) -> Gauges:
        return self.traffic.gauges({"model": ", ".join(self._models)}, self.alive)

    async def _look_at_process(self) -> None:
        while (what := self.endpoint.ended()) is None:
            await asyncio.sleep(_LOOK_SECONDS)
        self._well = False
        log.error("%s: %s", self.endpoint.engine, what)
        self._on_end()

    async def _look_at_health(self, client: httpx.AsyncClient) -> None:
        while True:
            await asyncio.sleep(self.endpoint.look_seconds)
            if self.endpoint.ended() is not None:
                return
            try:
                well = (await client.get(self.endpoint.health, timeout=30.0)).status_code == 200
            except httpx.HTTPError:
                well = False
            self._missed = 0 if well else self._missed + 1
            was, self._well = self._well, self._missed < 2
            if was != self._well:
                log.warning("%s %s", self.endpoint.engine, "answers again" if self._well else "does not answer")
