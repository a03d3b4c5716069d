"""What callers bring as a conversation, made into the `Message`s that templates render.

A question alone, LLaVA's `<image>` in the text, and the parts that chat APIs send all become the same thing, with the
pictures in the order of their places. Which picture belongs to which place is settled here and nowhere else.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from lapilli.base.errors import DataError, unknown
from lapilli.data.picture import ImageLimits, open_image
from lapilli.data.sample import IMAGE_PLACEHOLDER, Image, Message, Part, Role, Text
from lapilli.data.template import check_turns

Picture = PIL.Image.Image | str | os.PathLike[str] | bytes
"""A picture as callers have it: opened, a file, or a file's bytes."""

Chat = str | Sequence[Mapping[str, Any]]
"""One question, or messages `{"role", "content"}` whose content is text or a list of text and image parts."""

ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}

_WHERE = "messages"


def read_chat(chat: Chat, images: Sequence[Picture] | None = None) -> tuple[tuple[Message, ...], list[Picture]]:
    """Return the messages and their pictures, in order.

    Each `<image>` in a text, and each image part that brings no picture, takes the next of `images`. If no place is
    marked at all, `images` stand in front of the first question, a line break after each, as LLaVA trains them.
    Raises DataError if places and pictures disagree in number, or if it is not a conversation that ends with a
    question.
    """
    raw: Sequence[Mapping[str, Any]] = [{"role": "user", "content": chat}] if isinstance(chat, str) else chat
    given = [images] if isinstance(images, PIL.Image.Image | str | os.PathLike | bytes) else list(images or ())
    places: list[Picture | None] = []
    messages = [_message(m, f"{_WHERE}: message {i}", places) for i, m in enumerate(raw, 1)]
    if given and not places:
        first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
        if first is not None:
            front = tuple(part for _ in given for part in (Image(), Text("\n")))
            messages[first] = Message("user", front + messages[first].parts)
            places = [None] * len(given)
    open_places = sum(p is None for p in places)
    if open_places != len(given):
        raise DataError(
            f"{_WHERE}: {open_places} places for pictures ({IMAGE_PLACEHOLDER} or image parts without a picture), but "
            f"{len(given)} pictures in `images`; give one picture per place"
        )
    check_turns(messages, _WHERE)
    if messages[-1].role != "user":
        raise DataError(f"{_WHERE}: the last message is from the {messages[-1].role}; a prompt ends with a question")
    rest = iter(given)
    return tuple(messages), [next(rest) if p is None else p for p in places]


def split_placeholders(text: str, *placeholders: str) -> Iterator[Part]:
    """Text and image places of a text, in order."""
    marks = "|".join(re.escape(p) for p in placeholders)
    for i, run in enumerate(re.split(marks, text)):
        if i:
            yield Image()
        if run:
            yield Text(run)


def open_picture(picture: Picture, limits: ImageLimits | None = None) -> PIL.Image.Image:
    """Decode a picture that a caller named. Raises DataError naming the file and what is wrong with it."""
    if isinstance(picture, PIL.Image.Image):
        return picture
    if isinstance(picture, bytes):
        return open_image(Image(data=picture), None, limits)
    path = Path(picture)
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if path.is_dir():
        raise DataError(f"{path}: a folder, not a picture")
    real = path.resolve()
    return open_image(Image(path=real.name), real.parent, limits, where=str(path))


def _message(message: Mapping[str, Any], where: str, places: list[Picture | None]) -> Message:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise DataError(f'{where}: must be an object with "role" and "content"')
    if message["role"] not in ROLES:
        raise DataError(f"{where}: {unknown('role', str(message['role']), ROLES)}")
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence):
        raise DataError(f"{where}: content must be text or a list of parts, not {type(content).__name__}")
    made: list[Part] = []
    for part in parts:
        made += _parts(part, where, places)
    return Message(ROLES[message["role"]], tuple(made))


def _parts(part: Any, where: str, places: list[Picture | None]) -> Iterator[Part]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        for piece in split_placeholders(part["text"], IMAGE_PLACEHOLDER):
            if isinstance(piece, Image):
                places.append(None)
            yield piece
    elif kind == "image":
        picture = part.get("image")
        if picture is not None and not isinstance(picture, PIL.Image.Image | str | os.PathLike | bytes):
            raise DataError(f"{where}: an image must be a PIL image, a path or bytes, not {type(picture).__name__}")
        places.append(picture)
        yield Image()
    else:
        raise DataError(
            f'{where}: a part is {{"type": "text", "text": ...}} or {{"type": "image", "image": ...}}, not {part!r:.80}'
        )
