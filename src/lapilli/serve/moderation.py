"""Asks a moderation service about what users say, before a model is asked: any that speaks OpenAI's /v1/moderations.

Fails closed: where the service can't be asked, or says nothing that can be understood, the request is refused, unless
the operator wants it otherwise. Neither texts nor the service's key are logged.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from fastapi import Request
from starlette.responses import Response

from lapilli.base.errors import RunError
from lapilli.base.http import is_loopback
from lapilli.serve.backend import Backend, Card, Gauges
from lapilli.serve.metrics import Metrics
from lapilli.serve.refusal import ApiError, invalid
from lapilli.serve.request import ChatRequest, ImagePart, TextPart

log = logging.getLogger(__name__)

KEY_VARIABLE = "LAPILLI_MODERATION_KEY"
_AT_ONCE = 32
_MOST_BYTES = 1 << 20
_UNREADABLE = (ValueError, KeyError, IndexError, TypeError)


@dataclass(frozen=True)
class Moderation:
    """Which service is asked, and about what.

    `images`: pictures of the newest question too. `optional`: what can't be checked is answered all the same. `model`
    is the service's own. Raises RunError for an address that is none.
    """

    url: str
    images: bool = False
    optional: bool = False
    model: str | None = None
    seconds: float = 5.0
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname or "", parts.port
        except ValueError:
            parts, host = urlsplit(""), ""
        if parts.scheme not in ("http", "https") or not host or parts.username is not None:
            raise RunError(
                f"--moderation-url: an address such as https://HOST/v1/moderations; its key is {KEY_VARIABLE}"
            )
        if self.key and parts.scheme == "http" and not is_loopback(host):
            raise RunError(f"--moderation-url: {KEY_VARIABLE} would travel in the clear; use https")
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise RunError(f"{KEY_VARIABLE}: a key is printable ASCII")


def moderating(url: str | None, *, images: bool, optional: bool, model: str | None) -> Callable[[Backend], Backend]:
    """What puts the hook in front of a backend, if there is to be one. Raises RunError as `Moderation` does."""
    if url is None:
        for flag, given in (("images", images), ("optional", optional), ("model", model)):
            if given:
                raise RunError(f"--moderation-{flag} goes with --moderation-url")
        return lambda backend: backend
    moderation = Moderation(url, images, optional, model, key=moderation_key())
    return lambda backend: Moderated(backend, moderation)


def moderation_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """The key that the service is shown; from the environment, where other users of the machine don't see it."""
    return environment.get(KEY_VARIABLE, "").strip() or None


class Moderated:
    """A `Backend` in front of another one, which hears only what the service lets pass."""

    def __init__(self, backend: Backend, moderation: Moderation) -> None:
        self._backend, self._moderation = backend, moderation
        self._metrics = Metrics()
        self._client: httpx.AsyncClient | None = None

    @asynccontextmanager
    async def life(self, metrics: Metrics) -> AsyncIterator[None]:
        self._metrics = metrics
        key = self._moderation.key
        async with (
            httpx.AsyncClient(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=self._moderation.seconds,
                limits=httpx.Limits(max_connections=_AT_ONCE),
                follow_redirects=False,
                trust_env=not is_loopback(urlsplit(self._moderation.url).hostname or ""),  # proxies, beyond here
            ) as self._client,
            self._backend.life(metrics),
        ):
            yield

    @property
    def alive(self) -> bool:
        return self._backend.alive

    async def cards(self) -> list[Card]:
        return await self._backend.cards()

    def gauges(self) -> Gauges:
        return self._backend.gauges()

    async def complete(self, body: ChatRequest, request: Request) -> Response:
        """Answer, if nothing is to be said against the question. Raises ApiError (content_filter) otherwise."""
        asked = self._asked(body)
        if asked is not None and await self._flagged(asked):
            raise invalid("the question is against this server's rules on contents", "messages", "content_filter")
        return await self._backend.complete(body, request)

    def _asked(self, body: ChatRequest) -> dict[str, Any] | None:
        """What the service is asked about the newest words of the user; None if there are none."""
        newest = next((turn.content for turn in reversed(body.messages) if turn.role == "user"), "")
        parts = [TextPart(type="text", text=newest)] if isinstance(newest, str) else newest
        text = "\n".join(part.text for part in parts if isinstance(part, TextPart) and part.text.strip())
        images = (
            [part.image_url.url for part in parts if isinstance(part, ImagePart)] if self._moderation.images else []
        )
        if not text and not images:
            return None
        about: Any = text
        if images:
            about = [{"type": "text", "text": text}] if text else []
            about += [{"type": "image_url", "image_url": {"url": url}} for url in images]
        return {"input": about} | ({"model": self._moderation.model} if self._moderation.model else {})

    async def _flagged(self, asked: dict[str, Any]) -> bool:
        """Whether the service objects. Raises ApiError where that can't be known and must be."""
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._moderation.seconds):
                flagged = await self._ask(asked)
        except (httpx.HTTPError, TimeoutError, *_UNREADABLE) as error:
            self._metrics.count("lapilli_moderation_total", result="unavailable")
            log.warning("moderation: the service can't be asked (%s)", type(error).__name__)
            if self._moderation.optional:
                return False
            raise ApiError(
                503,
                "what you ask can't be checked now; try again later",
                code="moderation_unavailable",
                retry_seconds=5,
            ) from error
        self._metrics.observe("lapilli_moderation_seconds", time.monotonic() - begun)
        self._metrics.count("lapilli_moderation_total", result="flagged" if flagged else "passed")
        return flagged

    async def _ask(self, asked: dict[str, Any]) -> bool:
        if self._client is None:
            raise RuntimeError("moderation: asked outside of its life")
        async with self._client.stream("POST", self._moderation.url, json=asked) as response:
            response.raise_for_status()
            said = bytearray()
            async for piece in response.aiter_bytes():
                said += piece
                if len(said) > _MOST_BYTES:
                    raise ValueError("too long an answer")
        results = httpx.Response(200, content=bytes(said)).json()["results"]
        found = [one["flagged"] for one in results]
        if not found or not all(isinstance(one, bool) for one in found):
            raise ValueError("not what a moderation service says")
        return any(found)
