"""From a checked request to what the engine takes: a prompt with its pictures, and one Decoding per answer.

Pictures come inside the request, as data URLs, or by their address where the operator allows it. No path is ever opened
for a request.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from threading import Lock
from typing import Any

from lapilli.base.errors import DataError, ModelError
from lapilli.data.picture import ImageLimits
from lapilli.data.sample import IMAGE_PLACEHOLDER
from lapilli.generate.decoding import Decoding
from lapilli.generate.engine import Engine, Room
from lapilli.generate.processor import Prepared, Processor, Prompt
from lapilli.serve.refusal import ApiError, invalid
from lapilli.serve.remote import RemotePictures
from lapilli.serve.request import ChatRequest, ImagePart, TextPart
from lapilli.serve.settings import Limits

_ROLES = {"developer": "system"}
_TEMPERATURE = 1.0
"""OpenAI's, where a request names none."""
_LEAST_TOP_P = 1e-9
"""`top_p` 0 asks for the likeliest token alone, and so does this."""


class Reader:
    """Reads requests for one model; safe to use from several threads. `processor` opens pictures within its limits.

    Without `remote`, pictures are not fetched from addresses.
    """

    def __init__(
        self, room: Engine | Room, processor: Processor, limits: Limits, remote: RemotePictures | None = None
    ) -> None:
        self._room, self._processor, self._limits, self._remote = room, processor, limits, remote
        self._tokenizer = Lock()

    def read(self, request: ChatRequest) -> Prompt:
        """The prompt of a request. Raises ApiError for pictures and conversations that can't be used."""
        chat, urls = conversation(request)
        if len(urls) > self._limits.images:
            raise invalid(f"{len(urls)} pictures; this server takes {self._limits.images} in a request", "messages")
        until = self._remote.until() if self._remote else 0.0
        files = [self._file(url, where, until) for where, url in urls]
        pictures: list[Prepared] = []
        for data, (where, _) in zip(files, urls, strict=True):
            try:
                pictures.append(self._processor.picture(data))
            except DataError as error:
                raise invalid(f"{where}: {error}", where, "invalid_image") from error
        try:
            with self._tokenizer:
                prompt = self._processor.prompt(chat, pictures)
        except DataError as error:
            raise invalid(str(error), "messages") from error
        try:
            self._room.check(prompt)
        except ModelError as error:
            raise invalid(str(error), "messages", "context_length_exceeded") from error
        return prompt

    def read_rendered(self, text: str, files: Sequence[bytes]) -> Prompt:
        """The prompt of a text that is rendered already, `<image>` where each of the pictures stands.

        Raises ApiError for pictures and texts that can't be used.
        """
        limits = self._limits
        if any(len(data) > limits.image_bytes for data in files):
            raise ApiError(413, f"a picture is larger than {limits.image_bytes:,} bytes", code="image_too_large")
        try:
            pictures = [self._processor.picture(data) for data in files]
            with self._tokenizer:
                prompt = self._processor.rendered(text, pictures)
        except DataError as error:
            raise invalid(str(error)) from error
        try:
            self._room.check(prompt)
        except ModelError as error:
            raise invalid(str(error), code="context_length_exceeded") from error
        return prompt

    def fetches(self, request: ChatRequest) -> bool:
        """Whether pictures of the request have to be fetched, which may take a while."""
        return self._remote is not None and any(is_address(url) for _, url in conversation(request)[1])

    def _file(self, url: str, where: str, until: float) -> bytes:
        if self._remote is not None and is_address(url):
            return self._remote.fetch(url, where, until)
        return picture_bytes(url, where, self._limits.image_bytes)

    def decodings(self, request: ChatRequest) -> list[Decoding]:
        """One for each of the `n` answers; answer i draws with seed + i. Raises ApiError for values out of bounds."""
        longest = self._limits.new_tokens
        wanted = request.max_completion_tokens or request.max_tokens
        if wanted is not None and wanted > longest:
            raise invalid(f"max_tokens: {wanted}; this server writes at most {longest} tokens", "max_tokens")
        top_p = None if request.top_p is None else max(request.top_p, _LEAST_TOP_P)
        common: dict[str, Any] = {
            "max_new_tokens": wanted or longest,
            "temperature": _TEMPERATURE if request.temperature is None else request.temperature,
            "top_p": top_p,
            "stop": request.stops,
            "top_k": request.top_k if request.top_k is not None and request.top_k > 0 else None,
            "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        }
        first = request.seed
        try:
            return [
                Decoding(seed=None if first is None else (first + i) % 2**63, **common) for i in range(request.n or 1)
            ]
        except ModelError as error:
            raise invalid(str(error)) from error


def image_limits(limits: Limits) -> ImageLimits:
    """What a picture may be, with the flag that changes it."""
    return ImageLimits(max_pixels=limits.image_pixels, max_bytes=limits.image_bytes, pixels_key="--image-pixels")


def conversation(request: ChatRequest) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Messages as `Processor.prompt` reads them, and the pictures' URLs in order, each with its place."""
    chat: list[dict[str, Any]] = []
    urls: list[tuple[str, str]] = []
    for number, turn in enumerate(request.messages):
        where = f"messages.{number}.content"
        role = _ROLES.get(turn.role, turn.role)
        parts = [TextPart(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
        made: list[dict[str, Any]] = []
        for place, part in enumerate(parts):
            here = where if isinstance(turn.content, str) else f"{where}.{place}"
            if isinstance(part, ImagePart):
                if role != "user":
                    raise invalid(f"{here}: pictures stand in the user's messages", here)
                urls.append((here, part.image_url.url))
                made.append({"type": "image"})
            elif IMAGE_PLACEHOLDER in part.text:
                raise invalid(
                    f"{here}: {IMAGE_PLACEHOLDER} in a text stands for a picture; send an image_url part in its place",
                    here,
                )
            else:
                made.append({"type": "text", "text": part.text})
        if not made:
            raise invalid(f"{where}: no parts in it", where)
        chat.append({"role": role, "content": made})
    return chat, urls


def is_address(url: str) -> bool:
    """Whether a picture is named by its address, to be fetched."""
    return url[:8].lower().startswith(("http://", "https://"))


def picture_bytes(url: str, where: str, most: int) -> bytes:
    """The bytes in a data URL. Raises ApiError for any other address and for one that is not base64."""
    head, comma, body = url.partition(",")
    if not head[:5].lower() == "data:" or not comma:
        raise invalid(
            f"{where}: this server fetches no addresses; send the picture itself, as data:image/...;base64,...",
            where,
            "image_url_refused",
        )
    media, *options = head[5:].lower().split(";")
    if not media.startswith("image/") or options[-1:] != ["base64"]:
        raise invalid(f"{where}: a picture is data:image/...;base64,...", where, "invalid_image")
    if len(body) * 3 // 4 > most + 2:
        raise ApiError(413, f"{where}: the picture is larger than {most:,} bytes", code="image_too_large", param=where)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{where}: not base64 ({error})", where, "invalid_image") from error
