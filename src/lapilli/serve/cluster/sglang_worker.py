"""A worker of LLaVA's cluster whose answers an SGLang server makes, through SGLang's own `/generate`.

The cluster's protocol comes in, with its rendered prompts and bare pictures; SGLang gets the text as it stands, so its
own chat templates play no part. Unlike the original's worker this one hands the stop string on, and checks pictures
before they leave.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from lapilli.base.errors import LapilliError, RunError
from lapilli.data.sample import IMAGE_PLACEHOLDER
from lapilli.data.template import Template
from lapilli.serve.app import bare_app
from lapilli.serve.cluster.frames import WORKER_FAILED, frame
from lapilli.serve.cluster.worker_app import Ask, Registration, files_of, status_of
from lapilli.serve.completions import EventStream
from lapilli.serve.guard import Guard
from lapilli.serve.metrics import Metrics
from lapilli.serve.refusal import ApiError, invalid
from lapilli.serve.settings import Keys, Limits
from lapilli.serve.threads import ReadingThreads
from lapilli.serve.upstream.body import plain_picture
from lapilli.serve.upstream.stream import broken, event_data, refusal

log = logging.getLogger(__name__)

_ENGINE = "sglang"
_INFO = ("/model_info", "/get_model_info")
"""The first is the newer name."""
_GREEDY_BELOW = 0.001


@dataclass(eq=False)
class SglangModel:
    """The model of an SGLang server, as the cluster knows it."""

    name: str
    root: str
    key: str | None = field(default=None, repr=False)
    pieces: bool = False
    """It streams what is new (`--incremental-streaming-output`) and not the whole text so far."""
    taken: int = 0
    """Questions that wait or are answered."""
    alive: bool = True
    template: Template | None = None
    """How its prompts are written: SGLang knows nothing of it, so whoever asks guesses by the name."""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


def find_model(root: str, key: str | None, name: str | None = None) -> SglangModel:
    """The model that an SGLang server has. Raises RunError if it does not answer as one."""
    made = SglangModel(name or "", root, key)
    try:
        with httpx.Client(base_url=root, headers=made.headers, trust_env=False, timeout=20.0) as client:
            info = next((r for path in _INFO if (r := client.get(path)).status_code != 404), None)
            said = info.raise_for_status().json() if info is not None else {}
            server = client.get("/server_info")
            made.pieces = server.status_code == 200 and bool(server.json().get("incremental_streaming_output"))
        if not made.name:
            path = said.get("served_model_name") or said["model_path"]
            made.name = str(path).rstrip("/").rpartition("/")[2]
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"--sgl-endpoint {root}: not an SGLang server that answers ({error})") from error
    return made


def make_sglang_app(model: SglangModel, keys: Keys, limits: Limits, registration: Registration | None) -> Guard:
    """The worker as an ASGI application. At most `limits.slots` questions are asked at a time, `limits.queue` wait."""
    turns = asyncio.Semaphore(limits.slots)
    threads = ReadingThreads()
    client = httpx.AsyncClient(
        base_url=model.root,
        headers=model.headers,
        timeout=httpx.Timeout(None, connect=5.0),
        limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
        trust_env=False,
    )

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(_look(model, client))]
        if registration is not None:
            tasks.append(asyncio.create_task(registration.keep(model)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await client.aclose()
            threads.close()

    app = bare_app("lapilli worker", life, keys)

    @app.post("/worker_generate_stream")
    async def generate(body: Ask, request: Request) -> Response:
        if model.taken >= limits.slots + limits.queue:
            return Response(frame("the queue is full; ask again", WORKER_FAILED))
        model.taken += 1
        until = request.scope["state"]["begun"] + limits.request_seconds
        try:
            data = await threads.run(False, _written, body, limits)
        except (LapilliError, asyncio.CancelledError) as error:
            model.taken -= 1
            if isinstance(error, asyncio.CancelledError):
                raise
            return Response(frame(str(error), WORKER_FAILED))
        answer = _Answer(model, client, turns, until, limits.request_seconds)
        answer.ask(body.prompt, data, request)
        return EventStream(answer, answer.frames(), media_type="application/octet-stream")

    @app.post("/worker_get_status")
    async def status() -> dict[str, Any]:
        return status_of(model)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok" if model.alive else "engine stopped"}, 200 if model.alive else 503)

    return Guard(app, keys, limits, Metrics(), bare_posts=True)


def _written(body: Ask, limits: Limits) -> bytes:
    """What SGLang is asked. Raises ApiError for pictures that can't be used or have no place."""
    files = files_of(body, limits)
    places = body.prompt.count(IMAGE_PLACEHOLDER)
    if places != len(files):
        raise invalid(f"{len(files)} pictures for {places} {IMAGE_PLACEHOLDER} in the prompt")
    large = next((f for f in files if len(f) > limits.image_bytes), None)
    if large is not None:
        raise invalid(f"a picture of {len(large):,} bytes; {limits.image_bytes:,} are allowed")
    warm = body.temperature > _GREEDY_BELOW
    sampling: dict[str, Any] = {
        "temperature": body.temperature if warm else 0.0,
        "top_p": max(body.top_p, 1e-9) if warm else 1.0,
        "max_new_tokens": min(body.max_new_tokens, limits.new_tokens),
    }
    if body.stop:
        sampling["stop"] = [body.stop]
    asked: dict[str, Any] = {"text": body.prompt, "sampling_params": sampling, "stream": True}
    if files:
        asked["image_data"] = [plain_picture(file, f"images.{i}", limits) for i, file in enumerate(files)]
        asked["modalities"] = ["multi-images" if len(files) > 1 else "image"]
    return json.dumps(asked).encode()


class _Answer:
    """One answer, from its turn to its last frame; `close`, or a client that leaves, lets go of the engine."""

    def __init__(
        self, model: SglangModel, client: httpx.AsyncClient, turns: asyncio.Semaphore, until: float, seconds: float
    ) -> None:
        self._model, self._client, self._turns, self._until, self._seconds = model, client, turns, until, seconds
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    def ask(self, prompt: str, data: bytes, request: Request) -> None:
        """Ask the engine when its turn comes, and from now on notice if the client leaves."""
        self._tasks = [asyncio.create_task(self._run(prompt, data)), asyncio.create_task(self._until_gone(request))]

    @property
    def ready(self) -> bool:
        """Whether `frames` has something without waiting."""
        return not self._frames.empty()

    async def frames(self) -> AsyncIterator[bytes]:
        """Objects of the cluster's stream, each with the whole text so far."""
        while (one := await self._frames.get()) is not None:
            yield one

    def close(self) -> None:
        """Let go of the engine and of the place. Called twice, it does nothing."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            self._model.taken -= 1
        self._tasks = []

    async def _until_gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._tasks[0].cancel()

    async def _run(self, prompt: str, data: bytes) -> None:
        try:
            async for one in self._answered(prompt, data):
                self._frames.put_nowait(one)
        finally:
            self._frames.put_nowait(None)

    async def _answered(self, prompt: str, data: bytes) -> AsyncIterator[bytes]:
        said = prompt
        try:
            async with asyncio.timeout(max(0.0, self._until - time.monotonic())), self._turns:
                headers = {"content-type": "application/json"}
                async with self._client.stream("POST", "/generate", content=data, headers=headers) as response:
                    if response.status_code != 200:
                        raise await refusal(response, _ENGINE)
                    ended, text = False, ""
                    async for one in event_data(response, _ENGINE):
                        if one == b"[DONE]":
                            break
                        new, ended = _read(one)
                        text = text + new if self._model.pieces else new
                        said = prompt + text
                        yield frame(said)
                    if not ended:
                        raise broken(_ENGINE, "the stream ended before the answer did")
        except TimeoutError:
            yield frame(f"no answer within {self._seconds:g} s", WORKER_FAILED)
        except ApiError as error:
            yield frame(error.message, WORKER_FAILED)
        except httpx.HTTPError:
            yield frame(broken(_ENGINE, "it broke the connection off").message, WORKER_FAILED)


def _read(data: bytes) -> tuple[str, bool]:
    """(text, whether the answer has ended) of one event. Raises ApiError for errors and what is no such event."""
    try:
        said = json.loads(data)
        error = said.get("error")
        finish = (said.get("meta_info") or {}).get("finish_reason")
        text = said.get("text")
    except (ValueError, AttributeError, RecursionError) as error:
        raise broken(_ENGINE, "an event that can't be read") from error
    kind = finish.get("type") if isinstance(finish, dict) else finish
    if error is not None or kind == "abort":
        told = error if isinstance(error, dict) else {"message": finish.get("message") if finish else error}
        blamed = told.get("code", finish.get("status_code") if isinstance(finish, dict) else None) == 400
        words = str(told.get("message"))[:500]
        raise invalid(words) if blamed else broken(_ENGINE, "it reported a failure; its log says which")
    if not isinstance(text, str):
        raise broken(_ENGINE, "an event of another shape")
    return text, kind is not None


async def _look(model: SglangModel, client: httpx.AsyncClient) -> None:
    """For ever: whether the engine answers."""
    missed = 0
    while True:
        await asyncio.sleep(10.0)
        try:
            well = (await client.get("/health", timeout=30.0)).status_code == 200
        except httpx.HTTPError:
            well = False
        missed = 0 if well else missed + 1
        was, model.alive = model.alive, missed < 2
        if was != model.alive:
            log.warning("%s %s", model.root, "answers again" if model.alive else "does not answer")
