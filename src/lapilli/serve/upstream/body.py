"""A checked request in the words of another server: vLLM, SGLang, or any that speaks OpenAI's.

Nothing is left to the other server's defaults that could differ from ours, and nothing is left for it to fetch or to
decode first: pictures are fetched, measured and decoded here, and leave as data of a plain format.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lapilli.base.errors import DataError
from lapilli.data.picture import FORMATS
from lapilli.generate.conversation import open_picture, read_chat
from lapilli.serve.reading import conversation, image_limits, is_address, picture_bytes
from lapilli.serve.refusal import invalid
from lapilli.serve.remote import RemotePictures
from lapilli.serve.request import ChatRequest
from lapilli.serve.settings import Limits

Dialect = Literal["vllm", "sglang", "openai"]
"""Whose server it is; what it takes beyond OpenAI's fields."""

_ORIENTATION = 0x0112
"""EXIF's tag for a picture that lies on its side; some servers turn it, models trained here saw it as it lies."""
_ALREADY_PLAIN = {"JPEG": "jpeg", "PNG": "png"}


@dataclass(frozen=True, slots=True)
class Target:
    """A model of another server: `name` there, and what ends its answers beside its end token."""

    name: str
    dialect: Dialect
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """What is sent, and how many pictures are in it."""

    data: bytes
    """JSON."""
    pictures: int


class Writer:
    """Writes requests for another server; safe to use from several threads."""

    def __init__(self, limits: Limits, remote: RemotePictures | None = None) -> None:
        self._limits, self._remote = limits, remote

    def check(self, request: ChatRequest, target: Target) -> None:
        """Raise ApiError for what needs no look at pictures: lengths, and fields that the other server has not."""
        longest = self._limits.new_tokens
        wanted = request.max_completion_tokens or request.max_tokens
        if wanted is not None and wanted > longest:
            raise invalid(f"max_tokens: {wanted}; this server writes at most {longest} tokens", "max_tokens")
        if request.top_k not in (None, 0, -1) and target.dialect == "openai":
            raise invalid("top_k is not served by the engine behind this server; leave it out", "top_k")

    def fetches(self, request: ChatRequest) -> bool:
        """Whether pictures of the request have to be fetched, which may take a while."""
        return self._remote is not None and any(is_address(url) for _, url in conversation(request)[1])

    def write(self, request: ChatRequest, target: Target) -> Asked:
        """The request for the other server, always as a stream. Raises ApiError for pictures that can't be used."""
        chat, urls = conversation(request)
        try:
            read_chat(chat, [b""] * len(urls))  # whether it is a conversation, before anything is fetched
        except DataError as error:
            raise invalid(str(error), "messages") from error
        if len(urls) > self._limits.images:
            raise invalid(f"{len(urls)} pictures; this server takes {self._limits.images} in a request", "messages")
        until = self._remote.until() if self._remote else 0.0
        pictures = iter([self._picture(url, where, until) for where, url in urls])
        several = {"modalities": "multi-images"} if len(urls) > 1 and target.dialect == "sglang" else {}
        for turn in chat:
            turn["content"] = _content(turn["content"], pictures, several)
        body = {
            "model": target.name,
            "messages": chat,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._decoding(request, target),
        }
        return Asked(json.dumps(body).encode(), len(urls))

    def _decoding(self, request: ChatRequest, target: Target) -> dict[str, Any]:
        made: dict[str, Any] = {
            "max_tokens": request.max_completion_tokens or request.max_tokens or self._limits.new_tokens,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "top_p": 1.0 if request.top_p is None else max(request.top_p, 1e-9),
            "n": request.n or 1,
        }
        if target.dialect != "openai":  # else the folder's generation_config.json would decide
            made["top_k"] = request.top_k if request.top_k is not None and request.top_k > 0 else -1
        stop = list(dict.fromkeys((*request.stops, *target.stop)))
        if stop:
            made["stop"] = stop
        if request.seed is not None:
            made["seed"] = request.seed
        if request.logprobs:
            made |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
        return made

    def _picture(self, url: str, where: str, until: float) -> str:
        """A picture as a data URL that needs no trust."""
        if self._remote is not None and is_address(url):
            data = self._remote.fetch(url, where, until)
        else:
            data = picture_bytes(url, where, self._limits.image_bytes)
        return plain_picture(data, where, self._limits)


def plain_picture(data: bytes, where: str, limits: Limits) -> str:
    """A picture's bytes, measured and decoded, as a data URL of a plain RGB picture.

    JPEG and PNG files of one upright RGB picture are passed on; anything else (palettes, transparency, animations,
    other formats) is written anew as PNG, so that the engine sees the pixels that models here are trained on. Raises
    ApiError for what can't be used.
    """
    import PIL.Image

    try:
        picture = open_picture(data, image_limits(limits))
    except DataError as error:
        raise invalid(f"{where}: {error}", where, "invalid_image") from error
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as file:
        kind = _ALREADY_PLAIN.get(file.format or "")
        as_it_is = kind is not None and file.mode == "RGB" and getattr(file, "n_frames", 1) == 1
        as_it_is = as_it_is and not file.info.get("transparency") and file.getexif().get(_ORIENTATION, 1) == 1
    if not as_it_is:
        written = io.BytesIO()
        picture.save(written, "PNG", compress_level=1)
        kind, data = "png", written.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _content(parts: list[dict[str, Any]], pictures: Iterator[str], several: dict[str, str]) -> Any:
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return [
        part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": next(pictures)}, **several}
        for part in parts
    ]
