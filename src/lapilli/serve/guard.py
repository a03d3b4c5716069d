"""What stands before the API: who asks, how often, how much, and how long a body may take.

Plain ASGI, in front of all routes, so that none can be forgotten. A body is read here, whole and measured, before
anything looks at it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from lapilli.base.http import is_loopback
from lapilli.serve.metrics import Metrics
from lapilli.serve.refusal import ApiError
from lapilli.serve.settings import Keys, Limits

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health"})
"""Paths that need no key: what a load balancer asks."""
_PATHS = frozenset({"/health", "/metrics", "/v1/models", "/v1/chat/completions", "/openapi.json", "/register_worker",
                    "/refresh_all_workers", "/list_models", "/get_worker_address", "/receive_heart_beat",
                    "/worker_generate_stream", "/worker_get_status", "/", "/page/settings", "/page/turns",
                    "/page/votes"})  # fmt: skip
_ASKING = ("/v1/", "/worker_generate_stream")
_CALLERS = 10_000
"""Callers whose rate is remembered; beyond them the one that was silent longest is forgotten."""
_POLITE_BYTES = 256 << 20
"""So much of a refused body is still taken and thrown away, for clients that hear only when they have spoken."""


@dataclass
class _Body:
    data: bytearray = field(default_factory=bytearray)
    whole: bool = False
    """Whether the client has sent all of it."""


class Guard:
    """An ASGI application around another one. With `bare_posts` a POST without a body need not be JSON.

    `open_paths` are those that need no key beside `OPEN_PATHS`, each spelled out: files that are the same for all.
    """

    def __init__(
        self,
        app: Any,
        keys: Keys,
        limits: Limits,
        metrics: Metrics,
        *,
        bare_posts: bool = False,
        open_paths: frozenset[str] = frozenset(),
    ) -> None:
        self._bare_posts, self._open = bare_posts, OPEN_PATHS | open_paths
        self._app, self._keys, self._limits, self._metrics = app, keys, limits, metrics
        self._rates: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._held = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        # Nothing else (WebSocket) is spoken here.

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        begun = time.monotonic()
        path = scope["path"] if scope["path"] in _PATHS else "other"
        scope.setdefault("state", {})["begun"] = begun
        status = 500

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        body = _Body()
        try:
            try:
                self._admit(scope)
                await self._read(scope, receive, body)
            except ApiError as error:
                self._metrics.count("lapilli_refused_total", reason=error.code or str(error.status))
                if not body.whole:
                    await self._discard(scope, receive, len(body.data))
                await _answer(error, sent, close=not body.whole)
                return
            await self._app(scope, _replayed(bytes(body.data), receive), sent)
        finally:
            self._held -= len(body.data)
            seconds = time.monotonic() - begun
            self._metrics.count("lapilli_http_requests_total", path=path, status=str(status))
            self._metrics.observe("lapilli_http_request_seconds", seconds, path=path)
            log.info("%s %s %d %.3f s", scope["method"], path, status, seconds)

    def _admit(self, scope: Any) -> None:
        """Raise ApiError for one who may not ask, or not now."""
        headers = {name: value for name, value in scope["headers"]}
        caller = (scope.get("client") or ("",))[0]
        if not self._keys:
            # A page in the user's browser could reach this machine under a name of its own (DNS rebinding).
            if not is_loopback(_host(headers.get(b"host", b""))):
                raise ApiError(403, "without an API key this server answers to localhost only", code="wrong_host")
        elif scope["path"] not in self._open or scope["method"] not in ("GET", "HEAD"):
            scheme, _, given = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            found = self._keys.find(given.strip()) if scheme.lower() == "bearer" else None
            if found is None:
                raise ApiError(401, "wrong API key, or none: send Authorization: Bearer KEY", code="invalid_api_key")
            caller = f"key {found}"
        if self._limits.requests_per_minute is not None and scope["path"].startswith(_ASKING):
            self._pace(caller, self._limits.requests_per_minute)

    def _pace(self, caller: str, per_minute: int) -> None:
        """A bucket of a minute's requests that fills as time goes by."""
        now = time.monotonic()
        left, last = self._rates.pop(caller, (float(per_minute), now))
        left = min(float(per_minute), left + (now - last) * per_minute / 60)
        self._rates[caller] = (left - 1 if left >= 1 else left), now
        if len(self._rates) > _CALLERS:
            self._rates.popitem(last=False)
        if left < 1:
            wait = (1 - left) * 60 / per_minute
            raise ApiError(
                429, f"more than {per_minute} requests a minute", code="rate_limit_exceeded", retry_seconds=wait
            )

    async def _read(self, scope: Any, receive: Any, body: _Body) -> None:
        """Read the body into `body`. Raises ApiError for one that is too large, too slow or not JSON."""
        headers = {name: value for name, value in scope["headers"]}
        bare = self._bare_posts and headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers
        if scope["method"] in ("GET", "HEAD") or bare:
            most = 0
        else:
            most = self._limits.body_bytes
            media = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if media != b"application/json":
                raise ApiError(415, "send the request as content-type: application/json", code="not_json")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while not body.whole:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(408, "the request was cut off", code="cut_off")
                    piece = message.get("body", b"")
                    body.whole = not message.get("more_body", False)
                    if len(body.data) + len(piece) > most:
                        raise _too_large(most)
                    if self._held + len(piece) > self._limits.held_bytes:
                        raise ApiError(429, "too many large requests at once", code="busy", retry_seconds=1)
                    body.data += piece
                    self._held += len(piece)
        except TimeoutError as error:
            raise ApiError(
                408, f"the request took longer than {self._limits.body_seconds:g} s to arrive", code="slow_body"
            ) from error

    async def _discard(self, scope: Any, receive: Any, had: int) -> None:
        """Take the rest of a refused body, within bounds, so that the client gets to hear the refusal."""
        headers = {name: value for name, value in scope["headers"]}
        if headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers:
            return
        if headers.get(b"expect", b"").lower() == b"100-continue" and not had:
            return  # it waits for leave to send, and gets the refusal instead
        taken = had
        try:
            async with asyncio.timeout(min(5.0, self._limits.body_seconds)):
                while taken < _POLITE_BYTES:
                    message = await receive()
                    taken += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
        except TimeoutError:
            return


def _host(header: bytes) -> str:
    """The name in a Host header, without its port; empty for one that can't be read."""
    try:
        return urlsplit("//" + header.decode("latin-1")).hostname or ""
    except ValueError:
        return ""


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the request is larger than {most:,} bytes", code="request_too_large")


def _replayed(body: bytes, receive: Any) -> Any:
    """`receive` of an application whose body was read already."""
    told = False

    async def again() -> Any:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


async def _answer(error: ApiError, send: Any, *, close: bool) -> None:
    headers = [(k.encode(), v.encode()) for k, v in error.headers.items()]
    body = error.encoded
    headers.append((b"content-length", str(len(body)).encode()))
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
