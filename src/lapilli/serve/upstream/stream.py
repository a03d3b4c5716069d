"""What another server answers, read with suspicion: its stream of events, and its refusals.

Every event is checked before anything of it is passed on, and nothing is passed on as it came: a text is a text, an
answer has the number that was asked for, a stream that stops before its end is an error. The other server's own errors
become ours: what is the request's fault stays so, everything else is said to be the engine's.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lapilli.serve.elsewhere.pieces import Delta, Usage
from lapilli.serve.refusal import ApiError

_EVENT_BYTES = 4 << 20
"""The largest event; a token with its alternatives takes some kilobytes."""
_ERROR_BYTES = 64 << 10
_LONGEST = 500
"""Characters of the other server's message that are passed on."""
_FINISH = {"stop": "stop", "length": "length"}
_THEIR_FAULT = (400, 413, 422)
"""Refusals that are about the request, and not about how this server asked."""


class _Loose(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Top(_Loose):
    token: str
    logprob: float = Field(allow_inf_nan=False)
    bytes: list[int] | None = None


class _Token(_Top):
    top_logprobs: list[_Top] = []


class _Logprobs(_Loose):
    content: list[_Token] | None = None


class _New(_Loose):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(_Loose):
    index: int = Field(ge=0)
    delta: _New = _New()
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Usage(_Loose):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int | None = Field(None, ge=0)


class _Chunk(_Loose):
    choices: list[_Choice] = []
    usage: _Usage | None = None


async def events(response: httpx.Response, answers: int, engine: str) -> AsyncIterator[Delta | Usage]:
    """The events of a chat completion's stream, up to its end.

    Raises ApiError for anything but the stream of `answers` whole answers: an error in it, an event that can't be read,
    an answer that was not asked for, an end before the end.
    """
    going = set(range(answers))
    async for data in event_data(response, engine):
        if data == b"[DONE]":
            break
        for made in _read(data, answers, engine):
            if isinstance(made, Delta):
                if made.index not in going:
                    raise broken(engine, "it went on with an answer that was not asked for or had ended")
                if made.finish is not None:
                    going.discard(made.index)
            yield made
    if going:
        raise broken(engine, "the stream ended before the answer did")


async def event_data(response: httpx.Response, engine: str) -> AsyncIterator[bytes]:
    """The data of server-sent events. Raises ApiError for one that grows too large."""
    held, data = bytearray(), bytearray()
    async for piece in response.aiter_bytes():
        held += piece
        *lines, rest = held.split(b"\n")
        held = bytearray(rest)
        if len(held) + len(data) > _EVENT_BYTES:
            raise broken(engine, f"an event of more than {_EVENT_BYTES >> 20} MiB")
        for line in (one.rstrip(b"\r") for one in lines):
            if line.startswith(b"data:"):
                data += line[5:].strip()
            elif not line and data:
                yield bytes(data)
                data.clear()
    if data:
        yield bytes(data)


def _read(data: bytes, answers: int, engine: str) -> list[Delta | Usage]:
    """What one event says. Raises ApiError for an error, and for what is no event of a chat completion."""
    try:
        said = json.loads(data)
        if isinstance(said, dict) and said.get("error"):
            raise _told(said["error"], engine)
        chunk = _Chunk.model_validate(said)
    except (ValueError, RecursionError) as error:  # ValidationError is one, and so are JSON's and UTF-8's errors
        what = "an event that can't be read" if not isinstance(error, ValidationError) else "an event of another shape"
        raise broken(engine, what) from error
    made: list[Delta | Usage] = []
    for choice in chunk.choices:
        finish = None
        if choice.finish_reason is not None:
            finish = _FINISH.get(choice.finish_reason)
            if finish is None:
                raise broken(engine, "it gave an answer up")
        tokens = (choice.logprobs and choice.logprobs.content) or []
        made.append(
            Delta(
                choice.index,
                choice.delta.content or "",
                choice.delta.reasoning_content or choice.delta.reasoning or "",
                tuple(_entry(token) | {"top_logprobs": [_entry(t) for t in token.top_logprobs]} for token in tokens),
                finish,
            )
        )
    if chunk.usage is not None:
        made.append(Usage(chunk.usage.prompt_tokens, chunk.usage.completion_tokens or 0))
    return made


def _entry(token: _Top) -> dict[str, Any]:
    data = token.bytes
    if data is not None and any(not 0 <= value <= 255 for value in data):
        data = None
    return {"token": token.token, "logprob": max(token.logprob, -9999.0), "bytes": data}


async def refusal(response: httpx.Response, engine: str) -> ApiError:
    """The error that an answer with another status than 200 means here."""
    body = bytearray()
    try:
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > _ERROR_BYTES:
                break
        said = json.loads(bytes(body))
    except (httpx.HTTPError, ValueError, RecursionError):
        said = {}
    said = said if isinstance(said, dict) else {}
    inner = said.get("error") if isinstance(said.get("error"), dict) else said
    status = response.status_code
    if status in _THEIR_FAULT:
        return _told(inner, engine, status)
    if status == 429:
        wait = response.headers.get("retry-after", "")
        seconds = float(wait) if wait.isdecimal() and len(wait) < 6 else 1.0
        return ApiError(429, f"the engine ({engine}) is busy", code="busy", retry_seconds=seconds)
    if status == 503:
        return ApiError(503, f"the engine ({engine}) does not answer now", code="engine_stopped", retry_seconds=5)
    return broken(engine, f"it answered {status}")


def _told(error: Any, engine: str, status: int | None = None) -> ApiError:
    """An error that the other server words itself: passed on where the request is to blame."""
    said = error if isinstance(error, dict) else {"message": error}
    message, code = said.get("message"), said.get("code")
    blamed = status if status is not None else code if isinstance(code, int) else 500
    if blamed not in _THEIR_FAULT:
        return broken(engine, "it reported a failure; its log says which")
    words = "".join(c if c.isprintable() else " " for c in message[:_LONGEST]) if isinstance(message, str) else ""
    full = code == "context_length_exceeded" or "context length" in words
    known = code if isinstance(code, str) and code.isidentifier() and len(code) < 60 else None
    return ApiError(
        413 if blamed == 413 else 400,
        words.strip() or "the engine refused the request",
        code="context_length_exceeded" if full else known,
        param="messages" if full else None,
    )


def broken(engine: str, what: str) -> ApiError:
    """The engine's own failure, which asking for something else would not change."""
    return ApiError(502, f"the engine ({engine}) failed: {what}", code="engine_failed")
