"""The page's addresses: its files, which need no key for they hold nothing secret, and what it has to know.

`/` and `/page/static/...` answer with files that were read at the start. Everything else here passes the same guard as
the API.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response

from lapilli.base.version import VERSION
from lapilli.data.template import Template
from lapilli.serve.backend import Backend, unknown_model
from lapilli.serve.description import text
from lapilli.serve.page.examples import Example, Picture
from lapilli.serve.page.shipped import INDEX, Shipped, read_shipped
from lapilli.serve.page.state import Said, Vote
from lapilli.serve.refusal import ApiError
from lapilli.serve.request import Turn
from lapilli.serve.settings import Limits

if TYPE_CHECKING:
    from lapilli.serve.page.log import ConversationLog

_TEMPERATURE, _TOP_P, _MAX_TOKENS = 0.2, 0.7, 512
"""What the page begins with, as the original's."""
_WRITERS = 2
"""Conversations that are written to the log at a time."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; font-src 'self'; "
    "img-src 'self' data: blob:; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing from other hosts, nothing inline, in nobody's frame."""
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(min_length=1, max_length=100)
    model: str = Field(max_length=300)
    messages: list[Turn] = Field(min_length=2, max_length=2000)

    @model_validator(mode="after")
    def _answered(self) -> _Said:
        if self.messages[-1].role != "assistant":
            raise ValueError("messages: an answer comes last")
        return self


class _Answered(_Said):
    start: float = Field(ge=0, le=1e11, allow_inf_nan=False)
    finish: float = Field(ge=0, le=1e11, allow_inf_nan=False)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1)


class _Voted(_Said):
    type: Vote


@dataclass(frozen=True)
class Page:
    """What the page shows beside the models."""

    examples: tuple[Example, ...] = ()
    log: ConversationLog | None = None
    """Where conversations and votes are kept; without it nothing is."""
    shipped: Mapping[str, Shipped] = field(default_factory=read_shipped, repr=False)

    @property
    def open_paths(self) -> frozenset[str]:
        """Paths that need no key, each spelled out."""
        return frozenset({"/", *(f"/page/static/{name}" for name in self.shipped)})


def add_page(app: FastAPI, page: Page, backend: Backend, limits: Limits) -> None:
    """Give an application the page's routes."""
    pictures = [picture for example in page.examples for picture in example.images]

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return _file(page.shipped.get(INDEX), request)

    @app.api_route("/page/static/{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def static(name: str, request: Request) -> Response:
        return _file(page.shipped.get(name), request)

    @app.get("/page/settings")
    async def settings() -> dict[str, Any]:
        return {
            "models": [{"name": card.name} for card in await backend.cards()],
            "new_tokens": limits.new_tokens,
            "images": limits.images,
            "image_bytes": limits.image_bytes,
            "image_pixels": limits.image_pixels,
            "body_bytes": limits.body_bytes,
            "defaults": {
                "temperature": _TEMPERATURE,
                "top_p": _TOP_P,
                "max_tokens": min(_MAX_TOKENS, limits.new_tokens),
            },
            "votes": page.log is not None,
            "examples": _listed(page.examples),
            "version": VERSION,
        }

    @app.get("/page/examples/{number}", response_class=Response, responses=text("image/*"))
    async def example(number: int) -> Response:
        if not 0 <= number < len(pictures):
            raise ApiError(404, "no such example", code="not_found")
        return _picture(pictures[number])

    if page.log is not None:
        _add_log(app, page.log, backend)


def _add_log(app: FastAPI, kept: ConversationLog, backend: Backend) -> None:
    writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="log")

    async def keep(body: _Said, request: Request, how: Callable[[Said, Template | None], None]) -> Response:
        cards = {card.name: card for card in await backend.cards()}
        if body.model not in cards:
            raise unknown_model(body.model, cards)
        said = Said(body.id, body.model, body.messages, request.client.host if request.client else "")
        await asyncio.get_running_loop().run_in_executor(writers, how, said, cards[body.model].template)
        return Response(status_code=204)

    @app.post("/page/turns", status_code=204, response_class=Response)
    async def turn(body: _Answered, request: Request) -> Response:
        sampling = {"temperature": body.temperature, "top_p": body.top_p, "max_new_tokens": body.max_tokens}
        return await keep(
            body, request, lambda said, template: kept.turn(said, template, body.start, body.finish, sampling)
        )

    @app.post("/page/votes", status_code=204, response_class=Response)
    async def vote(body: _Voted, request: Request) -> Response:
        return await keep(body, request, lambda said, template: kept.vote(said, template, body.type))


def _listed(examples: tuple[Example, ...]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    first = 0
    for one in examples:
        images = [f"/page/examples/{first + i}" for i in range(len(one.images))]
        made.append({"text": one.text, "images": images})
        first += len(images)
    return made


def _file(found: Shipped | None, request: Request) -> Response:
    if found is None:
        raise ApiError(404, "no such page", code="not_found")
    headers = {**_HEADERS, "cache-control": "no-cache", "etag": found.tag}
    if request.headers.get("if-none-match") == found.tag:
        return Response(status_code=304, headers=headers)
    return Response(found.data, headers=headers, media_type=found.media)


def _picture(found: Picture) -> Response:
    headers = {**_HEADERS, "content-security-policy": "default-src 'none'; sandbox", "cache-control": "no-store"}
    return Response(found.data, headers=headers, media_type=found.media)
