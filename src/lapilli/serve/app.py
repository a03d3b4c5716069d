"""The routes of the API, and its life: what answers is ready before the first request and ends after the last."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Lifespan

from lapilli.base.version import VERSION
from lapilli.serve.backend import Backend, Card, unknown_model
from lapilli.serve.description import ANSWERED, DescribedApi, ModelCard, ModelList, text
from lapilli.serve.direct import CHAT, Direct
from lapilli.serve.guard import OPEN_PATHS, Guard
from lapilli.serve.metrics import Metrics
from lapilli.serve.page.routes import Page, add_page
from lapilli.serve.refusal import ApiError, from_validation
from lapilli.serve.request import ChatRequest
from lapilli.serve.settings import Keys, Limits


def make_app(backend: Backend, keys: Keys, limits: Limits, *, page: Page | None = None) -> Guard:
    """The API, and the page if there is to be one, as an ASGI application in front of whatever answers."""
    metrics = Metrics()

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        async with backend.life(metrics):
            yield

    open_paths = frozenset() if page is None else page.open_paths
    app = bare_app("lapilli", life, keys, open_paths)

    @app.post(CHAT, summary="Answer a conversation", responses=ANSWERED)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await backend.complete(body, request)

    @app.get("/v1/models", summary="List the models", response_model=ModelList)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(card) for card in await backend.cards()]}

    @app.get("/v1/models/{name:path}", summary="Describe one model", response_model=ModelCard)
    async def one_model(name: str) -> dict[str, Any]:
        cards = {card.name: card for card in await backend.cards()}
        if name not in cards:
            raise unknown_model(name, cards)
        return _described(cards[name])

    @app.get("/health", summary="Whether answers are made", responses={503: {"description": "None are made."}})
    async def health() -> Response:
        return JSONResponse(
            {"status": "ok"} if backend.alive else {"status": "engine stopped"}, 200 if backend.alive else 503
        )

    @app.get(
        "/metrics", summary="Numbers for Prometheus", response_class=PlainTextResponse, responses=text("text/plain")
    )
    async def show_metrics() -> Response:
        return PlainTextResponse(metrics.text(backend.gauges()), media_type="text/plain; version=0.0.4")

    if page is not None:
        add_page(app, page, backend, limits)
    return Guard(Direct(app, backend.complete, _refuse), keys, limits, metrics, open_paths=open_paths)


def bare_app(title: str, life: Lifespan[FastAPI], keys: Keys, open_paths: frozenset[str] = frozenset()) -> FastAPI:
    """An application without routes, whose refusals have OpenAI's shape and whose description tells of keys."""
    app = DescribedApi(
        keys, OPEN_PATHS | open_paths, title=title, version=VERSION, lifespan=life, docs_url=None, redoc_url=None
    )
    for error in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(error, _refuse)
    return app


def _described(card: Card) -> dict[str, Any]:
    return {"id": card.name, "object": "model", "created": card.created, "owned_by": "lapilli"}


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
