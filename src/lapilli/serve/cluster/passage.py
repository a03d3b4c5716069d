"""One chat request on its way through a cluster: each of its answers from a worker, and an end to all of it.

Whatever ends it (the last object, a client that left, the time limit, a worker that died), the connections to workers
are closed, which ends their work, and the request's places are given back, in one place: `Passage.close`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import httpx
from fastapi import Request

from lapilli.generate.text import HeldText
from lapilli.serve.cluster.asking import Asked, too_large
from lapilli.serve.cluster.frames import Said, gone, read_frames
from lapilli.serve.completions import GoneError
from lapilli.serve.refusal import ApiError
from lapilli.serve.upstream.stream import Delta, Usage

if TYPE_CHECKING:
    from lapilli.serve.cluster.web import Cluster

_FINISH = {"stop": "stop", "length": "length"}


class Passage:
    """The answers of one request, as they come. Raises ApiError if there is no room for them."""

    def __init__(self, cluster: Cluster, model: str, answers: int, begun: float) -> None:
        cluster.admit(answers)
        self._cluster, self._model, self._begun = cluster, model, begun
        self._places = self._growing = answers
        self._events: asyncio.Queue[Delta | Usage | Exception | None] = asyncio.Queue()
        self._first: list[Delta | Usage | Exception | None] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._counted: list[Usage] = []
        self._answers = answers
        self._heard = False

    def ask(self, asked: Asked, stops: Sequence[str], request: Request) -> None:
        """Send the request when its turn comes, and from now on notice if the client leaves."""
        runs = [asyncio.create_task(self._run(index, asked, stops)) for index in range(self._answers)]
        self._tasks = [*runs, asyncio.create_task(self._until_gone(request))]

    @property
    def ready(self) -> bool:
        """Whether `next` has something without waiting."""
        return bool(self._first) or not self._events.empty()

    async def opened(self) -> None:
        """Wait until a worker has said something. Raises as `next` does."""
        self._first.append(await self.next())

    async def next(self) -> Delta | Usage | None:
        """What comes next; None after the last. Raises GoneError if the client left, ApiError if no more comes."""
        if self._first:
            item = self._first.pop()
        else:
            limit = self._cluster.limits.request_seconds
            left = self._begun + limit - time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, left)):
                    item = await self._events.get()
            except TimeoutError as error:
                raise ApiError(504, f"no answer within {limit:g} s; ask for a shorter one", code="timeout") from error
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Let go of the workers and of the request's places. Called twice, it does nothing."""
        for task in self._tasks:
            task.cancel()  # once: a second time would break off the closing of its connection
        if self._growing and self._tasks:
            self._count("cancelled", self._growing)
        self._cluster.release(self._places)
        self._places = self._growing = 0
        self._tasks = []

    async def _run(self, index: int, asked: Asked, stops: Sequence[str]) -> None:
        cluster = self._cluster
        try:
            async with cluster.turn():
                address = await cluster.address(self._model)
                body = {"model": self._model, **asked.fields}
                async with cluster.client.stream("POST", f"{address}/worker_generate_stream", json=body) as response:
                    if response.status_code != 200:
                        raise _refused(response.status_code)
                    await self._take(index, response, asked.prompt, stops)
        except ApiError as error:
            self._fail(error)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError):
            self._fail(gone())

    async def _take(self, index: int, response: httpx.Response, prompt: str, stops: Sequence[str]) -> None:
        """Pass on what a worker says, up to the end of its answer or the first stop string."""
        held = HeldText(stops, partial(self._say, index))
        said: Said | None = None
        had, cut = 0, False
        async for said in read_frames(response.aiter_raw()):
            text = said.answer(prompt)
            cut = len(text) < had
            if cut:  # a stop string was cut off that had come in pieces; they were held back here
                break
            held.add(text[had:])
            had = len(text)
            if held.stopped:
                break
        if said is None:
            raise gone()
        if not cut:
            held.finish()
        if said.usage is not None:
            self._counted.append(Usage(said.usage.prompt_tokens, said.usage.completion_tokens))
        self._end(index, "stop" if held.stopped or cut else _FINISH.get(said.finish_reason or "", "stop"))

    def _say(self, index: int, text: str) -> None:
        if not self._heard:
            self._heard = True
            seconds = time.monotonic() - self._begun
            self._cluster.metrics.observe("lapilli_first_token_seconds", seconds, model=self._model)
        self._events.put_nowait(Delta(index, text))

    def _end(self, index: int, finish: str) -> None:
        self._count(finish)
        self._growing -= 1
        self._events.put_nowait(Delta(index, finish=finish))
        if self._growing:
            return
        if len(self._counted) == self._answers:  # else a worker that counts nothing was among them
            written = sum(one.written for one in self._counted)
            self._cluster.metrics.count("lapilli_completion_tokens_total", written, model=self._model)
            self._cluster.metrics.count("lapilli_prompt_tokens_total", self._counted[0].prompt, model=self._model)
            self._events.put_nowait(Usage(self._counted[0].prompt, written))
        self._events.put_nowait(None)

    def _fail(self, error: ApiError) -> None:
        if error.status >= 500:
            self._cluster.lost()
            self._count("lost", self._growing)
        self._growing = 0
        self._events.put_nowait(error)

    def _count(self, finish: str, answers: int = 1) -> None:
        self._cluster.metrics.count("lapilli_answers_total", answers, model=self._model, finish=finish)

    async def _until_gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(GoneError())


def _refused(status: int) -> ApiError:
    if status == 413:
        return too_large()
    if status == 429:
        return ApiError(429, "the worker's queue is full", code="queue_full", retry_seconds=2)
    return ApiError(502, f"the worker refused the request (HTTP {status})", code="worker_failed")
