"""A chat request in the words of LLaVA's cluster: one rendered text, and pictures as the original's page sends them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image

from lapilli.base.errors import DataError
from lapilli.data.sample import Image, Message, Text
from lapilli.data.template import Template
from lapilli.generate.conversation import open_picture, read_chat
from lapilli.serve.page.state import as_sent
from lapilli.serve.reading import conversation, image_limits, is_address, picture_bytes
from lapilli.serve.refusal import ApiError, invalid
from lapilli.serve.remote import RemotePictures
from lapilli.serve.request import ChatRequest
from lapilli.serve.settings import Limits

_TAG = "<Image>"
_SEEN = "Received."
_NOT_CARRIED = ("seed", "logprobs", "top_logprobs", "top_k")
"""Fields that would change the answer and that the protocol has no place for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a worker, all but the model's name."""

    prompt: str
    pictures: int
    fields: dict[str, Any]


class Asker:
    """Writes requests for workers; safe to use from several threads."""

    def __init__(self, limits: Limits, remote: RemotePictures | None = None) -> None:
        self._limits, self._remote = limits, remote

    def check(self, request: ChatRequest) -> None:
        """Raise ApiError for what needs no look at pictures: lengths, and fields that the protocol can't carry."""
        for name in _NOT_CARRIED:
            if getattr(request, name) not in (None, False, 0, -1) or (name == "seed" and request.seed is not None):
                raise invalid(f"{name} is not carried by the cluster's protocol; leave it out", name)
        longest = self._limits.new_tokens
        wanted = request.max_completion_tokens or request.max_tokens
        if wanted is not None and wanted > longest:
            raise invalid(f"max_tokens: {wanted}; this server writes at most {longest} tokens", "max_tokens")

    def fetches(self, request: ChatRequest) -> bool:
        """Whether pictures of the request have to be fetched, which may take a while."""
        return self._remote is not None and any(is_address(url) for _, url in conversation(request)[1])

    def write(self, request: ChatRequest, template: Template) -> Asked:
        """The request as a worker takes it. Raises ApiError for pictures and conversations that can't be used."""
        chat, urls = conversation(request)
        if len(urls) > self._limits.images:
            raise invalid(f"{len(urls)} pictures; this server takes {self._limits.images} in a request", "messages")
        try:
            messages, _ = read_chat(chat, [b""] * len(urls))
            prompt = template.prompt(_tagged(messages, template))
        except DataError as error:
            raise invalid(str(error), "messages") from error
        until = self._remote.until() if self._remote else 0.0
        fields = {
            "prompt": prompt,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "max_new_tokens": request.max_completion_tokens or request.max_tokens or self._limits.new_tokens,
            "stop": template.stop[0] if template.stop else None,
            "images": [self._picture(url, where, until) for where, url in urls],
        }
        return Asked(prompt, len(urls), fields)

    def _picture(self, url: str, where: str, until: float) -> str:
        if self._remote is not None and is_address(url):
            data = self._remote.fetch(url, where, until)
        else:
            data = picture_bytes(url, where, self._limits.image_bytes)
        try:
            return as_base64(as_sent(open_picture(data, image_limits(self._limits))))
        except DataError as error:
            raise invalid(f"{where}: {error}", where, "invalid_image") from error


def as_base64(picture: PIL.Image.Image) -> str:
    """A picture as the original sends it: PNG, in base64."""
    written = io.BytesIO()
    picture.save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def _tagged(messages: Sequence[Message], template: Template) -> Sequence[Message]:
    """For the templates of LLaVA's tagged pictures: those of the first question as an exchange before it.

    So the original's page prompts, though it trains otherwise.
    """
    at = next((i for i, message in enumerate(messages) if message.role == "user"), 0)
    first = messages[at]
    pictures = [part for part in first.parts if isinstance(part, Image)]
    if template.image_prefix != _TAG or not pictures:
        return messages
    words = "".join(part.text for part in first.parts if isinstance(part, Text)).strip()
    shown = [Message("user", tuple(pictures)), Message("assistant", (Text(_SEEN),)), Message("user", (Text(words),))]
    return [*messages[:at], *shown, *messages[at + 1 :]]


def too_large() -> ApiError:
    """A request that the worker does not take for its size."""
    return ApiError(413, "the request is larger than the worker takes", code="request_too_large")
