"""One request whose answers are made elsewhere, from its admission to its last piece, whatever ends it.

The counterpart of `completions.Pending`: places and slots are given back in one place, `Passage.close`, and connections
to others are closed with them, which is how they learn that nobody waits any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from lapilli.serve.completions import CLIENT_GONE, EventStream, GoneError
from lapilli.serve.elsewhere.pieces import Delta, Usage
from lapilli.serve.elsewhere.reply import Words, lines, whole
from lapilli.serve.elsewhere.traffic import Traffic
from lapilli.serve.metrics import Metrics
from lapilli.serve.refusal import ApiError
from lapilli.serve.request import ChatRequest


class Passage:
    """The answers of one request, as they come. Raises ApiError if there is no room for them.

    Whoever brings them calls `open` once the request was taken, `put` for every piece, and `end` or `fail`.
    """

    def __init__(self, traffic: Traffic, metrics: Metrics, model: str, answers: int, begun: float) -> None:
        traffic.admit(answers)
        self.traffic, self.metrics, self.model, self.answers = traffic, metrics, model, answers
        self.growing = answers
        """Answers without an end."""
        self._places, self._begun = answers, begun
        self._events: asyncio.Queue[Delta | Usage | Exception | None] = asyncio.Queue()
        self._taken = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._opened = self._heard = self._failed = False

    def ask(self, runs: Iterable[Coroutine[Any, Any, None]], request: Request) -> None:
        """Begin what brings the answers, and from now on notice if the client leaves."""
        self._tasks = [asyncio.create_task(run) for run in (*runs, self._until_gone(request))]

    # ---- for who brings them ---------------------------------------------------------------------------------------

    def open(self) -> None:
        """The request was taken there: what is wrong from now on comes after the reply's status."""
        self._opened = True
        self._taken.set()

    def put(self, made: Delta | Usage) -> None:
        """The next piece."""
        if isinstance(made, Usage):
            self.metrics.count("lapilli_prompt_tokens_total", made.prompt, model=self.model)
            self.metrics.count("lapilli_completion_tokens_total", made.written, model=self.model)
        else:
            if not self._heard and (made.text or made.thought):
                self._heard = True
                self.metrics.observe("lapilli_first_token_seconds", time.monotonic() - self._begun, model=self.model)
            if made.finish is not None:
                self.growing -= 1
                self._count(made.finish)
        self._events.put_nowait(made)

    def end(self) -> None:
        """There is no more."""
        self._events.put_nowait(None)

    def fail(self, error: ApiError) -> None:
        """There is no more, for this reason."""
        if error.status >= 500:
            self.traffic.lost()
            self._count("lost", self.growing)
        self.growing, self._failed = 0, True
        self._stop(error)

    # ---- for who waits for them ------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether `next` has something without waiting."""
        return not self._events.empty()

    async def opened(self) -> None:
        """Wait until the request was taken. Raises as `next` does."""
        await self._within(self._taken.wait())
        if not self._opened:
            await self.next()  # raises why

    async def next(self) -> Delta | Usage | None:
        """What comes next; None after the last. Raises GoneError if the client left, ApiError if no more comes."""
        item = await self._within(self._events.get())
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Let go of the others, of the slots and of the request's places. Called twice, it does nothing."""
        for task in self._tasks:
            task.cancel()  # once: a second time would break off the closing of its connection
        if self._tasks:
            self._count("cancelled", self.growing)
        finished = bool(self._tasks) and not self.growing and not self._failed
        if self._places:
            self.traffic.release(self._places, time.monotonic() - self._begun if finished else None)
        self._places = self.growing = 0
        self._tasks = []

    def _stop(self, why: Exception) -> None:
        self._events.put_nowait(why)
        self._taken.set()

    async def _within(self, awaited: Awaitable[Any]) -> Any:
        limit = self.traffic.limits.request_seconds
        left = self._begun + limit - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left)):
                return await awaited
        except TimeoutError as error:
            raise ApiError(504, f"no answer within {limit:g} s; ask for a shorter one", code="timeout") from error

    def _count(self, finish: str, answers: int = 1) -> None:
        if answers:
            self.metrics.count("lapilli_answers_total", answers, model=self.model, finish=finish)

    async def _until_gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._stop(GoneError())


async def reply_from(passage: Passage, body: ChatRequest, ask: Callable[[], Awaitable[None]]) -> Response:
    """The reply to a request, whole or as a stream; `ask` prepares it and begins the passage.

    Raises ApiError for what is wrong before the first piece, streamed or not.
    """
    streams = False
    try:
        await ask()
        await passage.opened()
        words = Words(passage.model)
        if body.stream:
            streams = True
            return EventStream(passage, lines(passage, words, body))
        return JSONResponse(await whole(passage, words, body))
    except GoneError:
        return Response(status_code=CLIENT_GONE)
    finally:
        if not streams:
            passage.close()
