"""One request to another server, from its admission to its last event, whatever ends it.

The counterpart of `completions.Pending`: places and slots are given back in one place, `Passage.close`, and the
connection to the other server is closed with them, which is how it learns that nobody waits any more.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import httpx
from fastapi import Request

from lapilli.serve.completions import GoneError
from lapilli.serve.refusal import ApiError
from lapilli.serve.upstream.stream import Delta, Usage, broken, events, refusal

if TYPE_CHECKING:
    from lapilli.serve.upstream.backend import Upstream

_CHAT = "/v1/chat/completions"
_OPENED = object()


class Passage:
    """The answers of one request, as they come. Raises ApiError if there is no room for them."""

    def __init__(self, upstream: Upstream, name: str, answers: int, begun: float) -> None:
        upstream.admit(answers)
        self._upstream, self._name, self._answers, self._begun = upstream, name, answers, begun
        self._places, self._growing = answers, answers
        self._events: asyncio.Queue[object] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._heard = self._failed = False

    def ask(self, data: bytes, request: Request) -> None:
        """Send the request when its turn comes, and from now on notice if the client leaves."""
        self._tasks = [asyncio.create_task(self._run(data)), asyncio.create_task(self._until_gone(request))]

    @property
    def ready(self) -> bool:
        """Whether `next` has something without waiting."""
        return not self._events.empty()

    async def opened(self) -> None:
        """Wait until the other server has taken the request. Raises as `next` does."""
        item = await self._get()
        assert item is _OPENED

    async def next(self) -> Delta | Usage | None:
        """What comes next; None after the last.

        Raises GoneError if the client left, ApiError if the engine failed or time is over.
        """
        item = await self._get()
        assert item is None or isinstance(item, Delta | Usage)
        return item

    def close(self) -> None:
        """Let go of the other server, of the slots and of the request's places. Called twice, it does nothing."""
        for task in self._tasks:
            task.cancel()  # once: a second time would break off the closing of its connection
        metrics = self._upstream.metrics
        if self._growing and self._tasks:
            metrics.count("lapilli_answers_total", self._growing, model=self._name, finish="cancelled")
        finished = bool(self._tasks) and not self._growing and not self._failed
        if self._places:
            self._upstream.release(self._places, time.monotonic() - self._begun if finished else None)
        self._places = self._growing = 0
        self._tasks = []

    async def _get(self) -> object:
        limit = self._upstream.limits.request_seconds
        left = self._begun + limit - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left)):
                item = await self._events.get()
        except TimeoutError as error:
            raise ApiError(504, f"no answer within {limit:g} s; ask for a shorter one", code="timeout") from error
        if isinstance(item, Exception):
            raise item
        return item

    async def _run(self, data: bytes) -> None:
        upstream, engine = self._upstream, self._upstream.endpoint.engine
        headers = {"content-type": "application/json", "accept": "text/event-stream"}
        try:
            async with (
                upstream.turn(self._answers),
                upstream.client.stream("POST", _CHAT, content=data, headers=headers) as response,
            ):
                if response.status_code != 200:
                    raise await refusal(response, engine)
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    raise broken(engine, "it answered without a stream")
                self._events.put_nowait(_OPENED)
                async for made in events(response, self._answers, engine):
                    self._take(made)
            self._events.put_nowait(None)
        except ApiError as error:
            self._fail(error)
        except (httpx.HTTPError, httpx.StreamError) as error:
            began = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            self._fail(broken(engine, "no connection to it" if began else "it broke the connection off"))

    def _take(self, made: Delta | Usage) -> None:
        metrics, name = self._upstream.metrics, self._name
        if isinstance(made, Usage):
            metrics.count("lapilli_prompt_tokens_total", made.prompt, model=name)
            metrics.count("lapilli_completion_tokens_total", made.written, model=name)
        else:
            if not self._heard and (made.text or made.thought):
                self._heard = True
                metrics.observe("lapilli_first_token_seconds", time.monotonic() - self._begun, model=name)
            if made.finish is not None:
                self._growing -= 1
                metrics.count("lapilli_answers_total", model=name, finish=made.finish)
        self._events.put_nowait(made)

    def _fail(self, error: ApiError) -> None:
        if error.status >= 500:
            self._upstream.lost()
            if self._growing:
                self._upstream.metrics.count("lapilli_answers_total", self._growing, model=self._name, finish="lost")
        self._growing, self._failed = 0, True
        self._events.put_nowait(error)

    async def _until_gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(GoneError())
