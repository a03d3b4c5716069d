"""A model as a worker of LLaVA's cluster: rendered prompts in, the whole text so far out with every piece.

The engine, its guards and its bounds are those of the API; only the words on the wire are others. A request that can't
be answered gets an object with a code, as clients of that protocol expect, not an HTTP error.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

import httpx
from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response, StreamingResponse

from lapilli.base.errors import LapilliError
from lapilli.data.template import Template
from lapilli.generate.decoding import Answer, Decoding
from lapilli.serve.app import bare_app
from lapilli.serve.cluster.frames import HEARTBEAT_SECONDS, TOO_LONG, WORKER_FAILED, frame
from lapilli.serve.completions import EventStream, GoneError, Pending
from lapilli.serve.description import FRAMES
from lapilli.serve.guard import Guard
from lapilli.serve.local import running
from lapilli.serve.metrics import Metrics
from lapilli.serve.models import Served
from lapilli.serve.refusal import ApiError
from lapilli.serve.settings import Keys, Limits
from lapilli.serve.threads import ReadingThreads
from lapilli.serve.worker import Piece

log = logging.getLogger(__name__)

_GREEDY_BELOW = 0.001
_MEDIA = "application/octet-stream"


class Counted(Protocol):
    """A model, and how many answers of it are on their way."""

    @property
    def name(self) -> str: ...
    @property
    def taken(self) -> int: ...
    @property
    def template(self) -> Template | None: ...


class Ask(BaseModel):
    """What the original's web server sends."""

    model: str = ""
    prompt: str
    images: list[str] | None = None
    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    max_new_tokens: int = Field(256, ge=1)
    stop: str | None = None


class Registration:
    """Tells a controller that the worker is there, from the start to the end of the worker."""

    def __init__(self, controller: str, address: str, key: str | None, beat_seconds: float = HEARTBEAT_SECONDS) -> None:
        self._controller, self._address, self._beat_seconds = controller.rstrip("/"), address, beat_seconds
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def keep(self, model: Counted) -> None:
        """For ever: register, and say how many wait; register again when the controller has forgotten."""
        known = said = False
        async with httpx.AsyncClient(headers=self._headers, timeout=5.0, trust_env=False) as client:
            while True:
                try:
                    if not known:
                        status = {"check_heart_beat": True, "worker_status": status_of(model)}
                        await self._post(client, "register_worker", status)
                        known, said = True, False
                        log.info("registered with %s as %s", self._controller, self._address)
                    answer = await self._post(client, "receive_heart_beat", {"queue_length": model.taken})
                    known = bool(answer["exist"])
                except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                    known = False
                    if not said:
                        log.warning("%s: %s; tried again until it answers", self._controller, error or type(error))
                    said = True
                await asyncio.sleep(self._beat_seconds if known else min(5.0, self._beat_seconds))

    async def _post(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
        response = await client.post(f"{self._controller}/{path}", json={"worker_name": self._address, **body})
        response.raise_for_status()
        return response.json()


def make_worker_app(model: Served, keys: Keys, limits: Limits, registration: Registration | None) -> Guard:
    """The worker as an ASGI application; the model's thread runs while it does."""
    metrics = Metrics()
    threads = ReadingThreads()

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        async with running([model]):
            registering = None if registration is None else asyncio.create_task(registration.keep(model))
            try:
                yield
            finally:
                if registering is not None:
                    registering.cancel()
                    with suppress(asyncio.CancelledError):
                        await registering
        threads.close()

    app = bare_app("lapilli worker", life, keys)

    @app.post("/worker_generate_stream", response_class=StreamingResponse, responses=FRAMES)
    async def generate(body: Ask, request: Request) -> Response:
        return await _answer(model, body, request, threads, metrics)

    @app.post("/worker_get_status")
    async def status() -> dict[str, Any]:
        return status_of(model)

    @app.get("/health")
    async def health() -> Response:
        well = model.worker.alive
        return JSONResponse({"status": "ok" if well else "engine stopped"}, 200 if well else 503)

    return Guard(app, keys, limits, metrics, bare_posts=True)


def status_of(model: Counted) -> dict[str, Any]:
    """What a controller needs to know of a worker; and, for our web server, how the model's prompts are written."""
    said = {"model_names": [model.name], "speed": 1, "queue_length": model.taken}
    if model.template is not None:
        said["templates"] = {model.name: model.template.model_dump(mode="json", exclude_defaults=True)}
    return said


async def _answer(model: Served, body: Ask, request: Request, threads: ReadingThreads, metrics: Metrics) -> Response:
    pending: Pending | None = None
    try:
        pending = Pending(model, 1, request.scope["state"]["begun"], metrics)
        decoding = _decoding(body, model.limits)
        files = files_of(body, model.limits)
        prompt = await threads.run(False, model.reader.read_rendered, body.prompt, files)
        pending.ask(prompt, [decoding], request)
        return EventStream(pending, _frames(pending, body.prompt, prompt.length), media_type=_MEDIA)
    except LapilliError as error:
        if pending is not None:
            pending.close()
        if isinstance(error, ApiError) and error.code == "context_length_exceeded":
            # Shown to the user as an answer, as the original does.
            return Response(frame(f"{body.prompt}{error}", finish_reason=TOO_LONG), media_type=_MEDIA)
        return Response(frame(str(error), WORKER_FAILED), media_type=_MEDIA)


async def _frames(pending: Pending, prompt: str, prompt_tokens: int) -> AsyncIterator[bytes]:
    """The text so far with every piece; with the last one, beyond the original, how it ended and its tokens."""
    text = prompt
    last: dict[str, Any] = {}
    try:
        while (item := await pending.next()) is not None:
            if isinstance(item[1], Piece):
                text += item[1].text
                yield frame(text)
            elif isinstance(item[1], Answer):
                finish = "length" if item[1].finish in ("length", "context") else "stop"
                counted = {"prompt_tokens": prompt_tokens, "completion_tokens": len(item[1].token_ids)}
                last = {"finish_reason": finish, "usage": counted}
    except ApiError as error:
        yield frame(error.message, WORKER_FAILED)
        return
    except GoneError:
        return
    yield frame(text, **last)


def _decoding(body: Ask, limits: Limits) -> Decoding:
    warm = body.temperature > _GREEDY_BELOW
    return Decoding(
        max_new_tokens=min(body.max_new_tokens, limits.new_tokens),
        temperature=body.temperature if warm else 0.0,
        top_p=max(body.top_p, 1e-9) if warm else None,
        stop=(body.stop,) if body.stop else (),
    )


def files_of(body: Ask, limits: Limits) -> list[bytes]:
    """The pictures' files of a question. Raises ApiError for too many, and for what is not base64."""
    images = body.images or []
    if len(images) > limits.images:
        raise ApiError(400, f"{len(images)} pictures; this worker takes {limits.images} in a request")
    try:
        return [base64.b64decode(one, validate=True) for one in images]
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"images: not base64 ({error})") from error
