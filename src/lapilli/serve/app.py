"""The routes of the API, and its life: engines start before the first request and stop after the last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Lifespan

from lapilli.base.version import VERSION
from lapilli.serve.completions import complete
from lapilli.serve.guard import Guard
from lapilli.serve.metrics import Metrics
from lapilli.serve.models import Served, find
from lapilli.serve.refusal import ApiError, from_validation
from lapilli.serve.request import ChatRequest
from lapilli.serve.settings import Keys, Limits
from lapilli.serve.worker import Event, Wanted

_READERS = 4
"""Requests whose pictures are decoded at a time."""
_FETCHERS = 8
"""Requests whose pictures are fetched at a time."""


def make_app(models: Mapping[str, Served], keys: Keys, limits: Limits) -> Guard:
    """The API as an ASGI application; the models' threads run while it does."""
    metrics = Metrics()
    readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")
    fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="fetcher")

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        async with running(models.values()):
            yield
        for pool in (readers, fetchers):
            pool.shutdown(wait=False, cancel_futures=True)

    app = bare_app("lapilli", life)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await complete(find(models, body.model), body, request, readers, fetchers, metrics)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(m) for m in models.values()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return _described(find(models, name))

    @app.get("/health")
    async def health() -> Response:
        well = all(m.worker.alive for m in models.values())
        return JSONResponse({"status": "ok" if well else "engine stopped"}, 200 if well else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return PlainTextResponse(metrics.text(_gauges(models)), media_type="text/plain; version=0.0.4")

    return Guard(app, keys, limits, metrics)


def bare_app(title: str, life: Lifespan[FastAPI]) -> FastAPI:
    """An application without routes, whose refusals have OpenAI's shape."""
    app = FastAPI(title=title, version=VERSION, lifespan=life, docs_url=None, redoc_url=None)
    for error in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(error, _refuse)
    return app


@asynccontextmanager
async def running(models: Collection[Served]) -> AsyncIterator[None]:
    """Inside, the models' threads run, and what they make is handed out in this event loop."""
    loop = asyncio.get_running_loop()

    def post(made: Sequence[tuple[Wanted, Event]]) -> None:
        loop.call_soon_threadsafe(_hand_out, made)

    for model in models:
        model.worker.start(post)
    try:
        yield
    finally:
        for model in models:
            await asyncio.to_thread(model.worker.stop)


def _hand_out(made: Sequence[tuple[Wanted, Event]]) -> None:
    """Give what a step made to those who wait for it, in the event loop."""
    for wanted, event in made:
        wanted.take(event)


def _described(model: Served) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "lapilli"}


def _gauges(models: Mapping[str, Served]) -> dict[str, Any]:
    each = [({"model": m.name}, m) for m in models.values()]
    return {
        "lapilli_active": ("Answers that grow now.", [(labels, m.worker.active) for labels, m in each]),
        "lapilli_waiting": (
            "Answers that wait for a slot.",
            [(labels, max(0, m.taken - m.worker.active)) for labels, m in each],
        ),
        "lapilli_slots": ("Answers that may grow at a time.", [(labels, m.limits.slots) for labels, m in each]),
        "lapilli_failures": (
            "Answers lost by failures of the engine since the start.",
            [(labels, m.worker.failures) for labels, m in each],
        ),
        "lapilli_up": ("Whether the model's engine runs.", [(labels, int(m.worker.alive)) for labels, m in each]),
    }


async def _refuse(_: Request, error: Exception) -> Response:
    """Any error, in OpenAI's shape. One that nobody foresaw says nothing of itself; the log has it."""
    if isinstance(error, ApiError):
        refusal = error
    elif isinstance(error, RequestValidationError):
        refusal = from_validation(error.errors())
    elif isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        refusal = ApiError(error.status_code, str(error.detail), code=code)
    else:
        refusal = ApiError(500, "something failed in this server; its log says what", code="internal_error")
    return Response(refusal.encoded, refusal.status, refusal.headers)
