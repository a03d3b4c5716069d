"""The API's description of itself, /openapi.json: what is asked, what is answered, errors, streams and keys.

It says what the server does, not what FastAPI guesses from signatures: `tests/serve/test_fuzz.py` asks for everything
that it allows and much that it forbids, and holds every answer against it.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from lapilli.serve.settings import Keys


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Refusal(BaseModel):
    """Every error's body, in OpenAI's shape."""

    error: Problem


class ModelCard(BaseModel):
    id: str
    object: str
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: str
    data: list[ModelCard]


class Likely(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class Token(Likely):
    top_logprobs: list[Likely]


class Logprobs(BaseModel):
    content: list[Token]
    refusal: None


class Message(BaseModel):
    role: str
    content: str
    refusal: None
    reasoning_content: str | None = None


class Choice(BaseModel):
    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: str


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """An answer that is not streamed."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


_STATUSES = {
    400: "The request says something that is not served; `param` names the field.",
    401: "No key, or a wrong one.",
    403: "Without keys, only requests to localhost by name are answered.",
    404: "No such model.",
    408: "The request took too long to arrive.",
    413: "The request or a picture in it is too large.",
    415: "Not application/json.",
    429: "Too many requests, or a full queue; `Retry-After` says when to ask again.",
    500: "The answer was lost; the server's log says why.",
    503: "The model does not answer.",
    504: "No answer within the server's time limit.",
}
_STREAM = (
    "With `stream`: events `data: {chat.completion.chunk}`, the last one `data: [DONE]`. What goes wrong after the "
    'first event is an event `data: {"error": ...}`, after which nothing follows.'
)
ANSWERED: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Completion,
        "description": f"The answer. {_STREAM}",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    **{status: {"model": Refusal, "description": said} for status, said in _STATUSES.items()},
}
"""What a chat request may be answered with."""
REFUSED: dict[int | str, dict[str, Any]] = {"default": {"model": Refusal, "description": "Refused."}}
"""What any request may be answered with."""


def text(media: str) -> dict[int | str, dict[str, Any]]:
    """A route that answers with text."""
    return {200: {"description": "Text.", "content": {media: {"schema": {"type": "string"}}}}}


FRAMES = text("application/octet-stream")
"""LLaVA's streams: JSON objects, each ended by a zero byte."""


class DescribedApi(FastAPI):
    """FastAPI, whose description tells of keys where there are some. `open_paths` need none."""

    def __init__(self, keys: Keys, open_paths: frozenset[str], **more: Any) -> None:
        super().__init__(**more, responses=REFUSED)
        self._needs_key, self._open = bool(keys), open_paths

    def openapi(self) -> dict[str, Any]:
        made = super().openapi()
        if self._needs_key:
            made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            made["security"] = [{"key": []}]
            for path in self._open & set(made["paths"]):
                for operation in made["paths"][path].values():
                    operation["security"] = []
        return made
