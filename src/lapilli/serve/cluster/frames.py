"""What travels in LLaVA's cluster protocol: JSON objects, each ended by a zero byte, and what their codes mean."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lapilli.serve.refusal import ApiError, invalid

END = b"\0"
OK, WORKER_FAILED, NO_WORKER, WORKER_GONE = range(4)
"""`error_code`: the text is an answer; the worker could not make it; nobody serves the model; the worker is gone."""

HEARTBEAT_SECONDS = 15.0
"""How often a worker says that it is there."""
EXPIRY_SECONDS = 30.0
"""A worker that said nothing for so long is forgotten."""

_FRAME_BYTES = 64 << 20
"""The largest object that is read: an answer with its prompt."""
_LONGEST = 500
"""Characters of a worker's message that are passed on."""
TOO_LONG = "context_length_exceeded"
"""`finish_reason` of an object that says that the prompt is too long, as if it were the answer."""
_THEIR_TOO_LONG = "Exceeds max token length."
_NOTHING_SAID = "**NETWORK ERROR"
"""What the original says, in capitals, whatever went wrong."""


def frame(text: str, code: int = OK, **more: object) -> bytes:
    """One object of a stream. The text is all of it so far, the prompt included, not what is new."""
    return json.dumps({"text": text, "error_code": code, **more}).encode() + END


class Counted(BaseModel):
    """Tokens of a prompt and of its answer so far."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class Said(BaseModel):
    """One object of a worker's stream. The original's workers leave out all but text and code."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    text: str
    error_code: int = 0
    finish_reason: str | None = None
    """`stop` or `length` with the last object, or `TOO_LONG`."""
    usage: Counted | None = None

    def answer(self, prompt: str) -> str:
        """The answer so far. Raises ApiError if it says that the prompt is too long."""
        text = self.text[len(prompt) :]
        if self.finish_reason == TOO_LONG or text.startswith(_THEIR_TOO_LONG):
            raise invalid("the conversation is longer than the model's context", "messages", TOO_LONG)
        return text


async def read_frames(pieces: AsyncIterator[bytes]) -> AsyncIterator[Said]:
    """The objects of a stream.

    Raises ApiError for one whose code is an error, for what is no such object, and for a stream that breaks off in one.
    """
    held = bytearray()
    async for piece in pieces:
        held += piece
        if len(held) > _FRAME_BYTES:
            raise _broken("it sends more than was agreed")
        *whole, rest = held.split(END)
        held = bytearray(rest)
        for one in whole:
            if one:
                yield _read(bytes(one))
    if held:
        raise gone()


def _read(data: bytes) -> Said:
    try:
        said = Said.model_validate_json(data)
    except ValidationError as error:
        raise _broken("it sent what is no answer") from error
    if said.error_code != OK:
        raise _refusal(said)
    return said


def _refusal(said: Said) -> ApiError:
    if said.error_code == NO_WORKER:
        return no_worker()
    if said.error_code == WORKER_GONE:
        return gone()
    words = "".join(c if c.isprintable() else " " for c in said.text[:_LONGEST]).strip()
    if not words or words.startswith(_NOTHING_SAID):
        words = "the worker could not answer; its log says why"
    return ApiError(502, words, code="worker_failed")


def no_worker() -> ApiError:
    """Nobody serves the model now."""
    return ApiError(503, "no worker serves this model now", code="no_worker", retry_seconds=5)


def gone() -> ApiError:
    """A worker that broke off."""
    return ApiError(502, "the worker is gone; please ask again", code="worker_gone", retry_seconds=1)


def _broken(what: str) -> ApiError:
    return ApiError(502, f"the worker failed: {what}", code="worker_failed")
