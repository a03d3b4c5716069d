"""One chat request from its arrival to the last byte of its answer.

Whatever ends it (the last token, a client that left, the time limit, a server that stops) its answers leave their slots
and its places are given back, in one place: `Pending.close`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import JSONResponse, Response

from lapilli.generate.decoding import Answer, Decoding
from lapilli.generate.processor import Prompt
from lapilli.serve.metrics import Metrics
from lapilli.serve.models import Served
from lapilli.serve.refusal import ApiError
from lapilli.serve.reply import DONE, Reply, Thoughts, Tokens, event
from lapilli.serve.request import ChatRequest
from lapilli.serve.threads import ReadingThreads
from lapilli.serve.worker import Event, Lost, Piece, Wanted

CLIENT_GONE = 499
"""Status in log and metrics of a request whose client left; nobody hears it."""


class GoneError(Exception):
    """The client left."""


class Pending:
    """The answers of one request, and their events in the order in which they are made."""

    def __init__(self, model: Served, answers: int, begun: float, metrics: Metrics) -> None:
        model.admit(answers)
        self._model, self._places, self._begun, self._metrics = model, answers, begun, metrics
        self._events: deque[tuple[int, Event]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._wanted: list[Wanted] = []
        self._growing = 0
        self._heard = self._gone = self._late = False
        self._watch: asyncio.Task[None] | None = None
        self._clock: asyncio.TimerHandle | None = None

    def ask(self, prompt: Prompt, decodings: list[Decoding], request: Request, *, whole: bool = False) -> None:
        """Hand the prompt to the model, and from now on notice if the client leaves.

        `whole`: pieces are of no use, only the answers.
        """
        name = self._model.name
        self._metrics.count("lapilli_prompt_tokens_total", prompt.length, model=name)
        self._metrics.count("lapilli_pictures_total", len(prompt.tiles), model=name)
        self._wanted = [Wanted(prompt, one, partial(self._take, i), whole) for i, one in enumerate(decodings)]
        self._growing = len(self._wanted)
        self._model.worker.want(self._wanted)
        self._watch = asyncio.create_task(self._until_gone(request))
        left = self._begun + self._model.limits.request_seconds - time.monotonic()
        self._clock = asyncio.get_running_loop().call_later(max(0.0, left), self._over)

    @property
    def ready(self) -> bool:
        """Whether `next` returns without waiting."""
        return bool(self._events) or not self._growing

    @property
    def over(self) -> bool:
        """Whether `next` has nothing more."""
        return not self._events and not self._growing

    async def next(self) -> tuple[int, Event] | None:
        """The next (index, event); None after the last one.

        Raises GoneError if the client left, ApiError if an answer is lost or time is over.
        """
        while True:
            if self._gone:
                raise GoneError
            if self._late and self._growing:
                limit = self._model.limits.request_seconds
                raise ApiError(504, f"no answer within {limit:g} s; ask for a shorter one", code="timeout")
            if self._events:
                item = self._events.popleft()
                if isinstance(item[1], Lost):
                    raise ApiError(500, "the answer was lost; the server's log says why", code="engine_failed")
                return item
            if not self._growing:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def close(self) -> None:
        """Free the slots of answers that have not ended, and the request's places. Called twice, it does nothing."""
        if self._watch is not None:
            self._watch.cancel()
        if self._clock is not None:
            self._clock.cancel()
        for wanted in self._wanted:
            wanted.leave()
        if self._growing:
            self._metrics.count("lapilli_answers_total", self._growing, model=self._model.name, finish="cancelled")
        finished = bool(self._wanted) and not self._growing
        if self._places:
            self._model.release(self._places, time.monotonic() - self._begun if finished else None)
        self._places = self._growing = 0
        self._wanted = []

    def _take(self, index: int, made: Event) -> None:
        if not self._wanted:
            return  # closed; a last word that nobody waits for
        name = self._model.name
        if not self._heard:
            self._heard = True
            self._metrics.observe("lapilli_first_token_seconds", time.monotonic() - self._begun, model=name)
        if isinstance(made, Answer):
            self._metrics.count("lapilli_answers_total", finish=made.finish, model=name)
            self._metrics.count("lapilli_completion_tokens_total", len(made.token_ids), model=name)
        if isinstance(made, Lost):
            self._metrics.count("lapilli_answers_total", finish="lost", model=name)
        if not isinstance(made, Piece):
            self._growing -= 1
        self._events.append((index, made))
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _over(self) -> None:
        self._late = True
        self._wake()

    async def _until_gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        for wanted in self._wanted:
            wanted.leave()
        self._gone = True
        self._wake()


async def complete(
    model: Served, body: ChatRequest, request: Request, threads: ReadingThreads, metrics: Metrics
) -> Response:
    """Answer a chat request, which is read in `threads`. Raises ApiError for one that can't be answered."""
    pending = Pending(model, body.n or 1, request.scope["state"]["begun"], metrics)
    streams = False
    try:
        decodings = model.reader.decodings(body)
        prompt = await threads.run(model.reader.fetches(body), model.reader.read, body)
        reply = Reply(model.name, model.vocabulary, prompt.length)
        pending.ask(prompt, decodings, request, whole=not body.stream)
        if body.stream:
            streams = True
            return EventStream(pending, _lines(pending, reply, body))
        answers: dict[int, Answer] = {}
        while (item := await pending.next()) is not None:
            if isinstance(item[1], Answer):
                answers[item[0]] = item[1]
        return JSONResponse(reply.whole([answers[i] for i in sorted(answers)], bool(body.logprobs)))
    except GoneError:
        return Response(status_code=CLIENT_GONE)
    finally:
        if not streams:
            pending.close()


class Coming(Protocol):
    """What is on its way for one request: a `Pending`, or its like where answers are made elsewhere."""

    @property
    def ready(self) -> bool: ...
    def close(self) -> None: ...


class EventStream(Response):
    """Sends events as they are made, and closes what they come from whatever happens."""

    def __init__(self, pending: Coming, lines: Any, media_type: str = "text/event-stream") -> None:
        self.status_code, self.background, self.media_type = 200, None, media_type
        self._pending, self._lines = pending, lines
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self._lines) as lines:
                held: list[bytes] = []
                async for line in lines:
                    held.append(line)
                    if not self._pending.ready:  # what has piled up leaves together
                        await send({"type": "http.response.body", "body": b"".join(held), "more_body": True})
                        held.clear()
            await send({"type": "http.response.body", "body": b"".join(held)})
        except OSError:
            return  # the client left between two events
        finally:
            self._pending.close()


async def _lines(pending: Pending, reply: Reply, body: ChatRequest) -> AsyncIterator[bytes]:
    """The events of a stream. An error after its beginning is an event of its own, and no `[DONE]` follows."""
    count = body.n or 1
    tokens = [Tokens(reply.vocabulary) for _ in range(count)]
    thoughts = [Thoughts() for _ in range(count)]
    told = [0] * count
    written = 0
    # Beginnings leave with the first words: one packet less for each answer.
    held = b"".join(reply.chunk(i, {"role": "assistant", "content": "", "refusal": None}) for i in range(count))
    try:
        while (item := await pending.next()) is not None:
            index, made = item
            if isinstance(made, Piece):
                delta, new, answer = _delta(*thoughts[index].add(made.text)), made.logprobs, None
                told[index] += len(new)
            elif isinstance(made, Answer):
                delta, new, answer = _delta(*thoughts[index].rest()), made.logprobs[told[index] :], made
                written += len(made.token_ids)
            else:
                continue
            logprobs = tokens[index].add(new) if body.logprobs else None
            if delta or logprobs:
                held += reply.chunk(index, delta, logprobs)
            if answer is not None:
                held += reply.chunk(index, {}, None, answer)
            if (delta or logprobs or answer) and not pending.over:
                yield held
                held = b""
    except ApiError as error:
        yield held + event(error.body)
        return
    except GoneError:
        return
    if body.stream_options is not None and body.stream_options.include_usage:
        held += reply.usage_chunk(written)
    yield held + DONE


def _delta(thought: str, text: str) -> dict[str, Any]:
    return ({"reasoning_content": thought} if thought else {}) | ({"content": text} if text else {})
