"""A short way for chat requests that are in order: from the guard straight to what answers.

A framework's layers around a request and around each piece of its answer take more of a processor than the answer's own
handling, and the engine waits for that processor. So a chat request that fits its schema goes past them; whatever else
comes, and every request that has to be refused for its form, goes through the framework as ever.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from starlette.responses import Response

from lapilli.serve.refusal import ApiError
from lapilli.serve.request import ChatRequest

CHAT = "/v1/chat/completions"

Answer = Callable[[ChatRequest, Request], Awaitable[Response]]


class Direct:
    """An ASGI application in front of `app`, behind a guard that has read and measured the body."""

    def __init__(self, app: Any, answer: Answer, refuse: Callable[[Request, Exception], Awaitable[Response]]) -> None:
        self._app, self._answer, self._refuse = app, answer, refuse

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != CHAT or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        message = await receive()
        try:
            body = ChatRequest.model_validate_json(message.get("body", b""))
        except ValidationError:
            await self._app(scope, _again(message, receive), send)
            return
        started = False

        async def sent(part: Any) -> None:
            nonlocal started
            started = True
            await send(part)

        request = Request(scope, receive)
        try:
            response = await self._answer(body, request)
            await response(scope, receive, sent)
        except ApiError as error:
            await (await self._refuse(request, error))(scope, receive, sent)
        except Exception as error:
            if not started:
                await (await self._refuse(request, error))(scope, receive, sent)
            raise  # for the log


def _again(message: Any, receive: Any) -> Any:
    """`receive` of an application whose first message was taken already."""
    waiting = [message]

    async def first() -> Any:
        return waiting.pop() if waiting else await receive()

    return first
