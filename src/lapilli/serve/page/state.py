"""A conversation in the words of LLaVA's logs: its roles, its separators, and pictures by the hash of their pixels.

What is written here is what the original's web server writes, field by field, so that a reader of its logs reads ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import PIL.Image
import PIL.ImageOps

from lapilli.data.sample import IMAGE_PLACEHOLDER
from lapilli.data.template import Template
from lapilli.serve.request import ImagePart, Turn

_LONGEST_EDGE, _SHORTEST_EDGE = 1344, 672
"""Pixels. A picture with a longer edge is made smaller before it is sent or kept."""


Vote = Literal["upvote", "downvote", "flag"]


@dataclass(frozen=True, slots=True)
class Said:
    """A conversation on the page and who holds it; `ip` is the address that asked."""

    conversation: str
    model: str
    messages: Sequence[Turn]
    ip: str


@dataclass(frozen=True, slots=True)
class Style:
    """How the original calls the sides of a conversation, and what it puts after their turns."""

    roles: tuple[str, str]
    sep: str
    sep2: str | None


def style_of(template: Template) -> Style:
    """The original's words for a template; those of its oldest ones for templates that it has not."""
    user, answer = template.user_prefix, template.answer_prefix
    if template.system_place == "in_first_user":
        return Style(("USER", "ASSISTANT"), "<s>" if user.startswith("<s>") else "", template.answer_end.strip())
    if user.endswith(": "):
        sep2 = None if template.user_suffix == template.answer_end else template.answer_end
        return Style((user[:-2], answer.removesuffix(":")), template.user_suffix, sep2)
    if user and answer:
        return Style((user, answer), template.answer_end, None)
    return Style(("USER", "ASSISTANT"), " ", "</s>")


def state_of(template: Template, messages: Sequence[Turn], conversation: str, model: str) -> dict[str, Any]:
    """`Conversation.dict()` of a conversation, and beside it which one it is and whose answers are in it."""
    style = style_of(template)
    turns = [(turn.role, text_of(turn)) for turn in messages]
    system = next((text for role, text in turns if role in ("system", "developer")), template.system)
    shown = [[style.roles[i], text] for pair in template.examples for i, text in enumerate(pair)]
    said = [[style.roles[int(role == "assistant")], text] for role, text in turns if role in ("user", "assistant")]
    return {
        "system": template.system_prefix + system if style.roles[0].startswith("<|") else system,
        "roles": list(style.roles),
        "messages": shown + said,
        "offset": len(shown),
        "sep": style.sep,
        "sep2": style.sep2,
        "conv_id": conversation,
        "model_name": model,
    }


def text_of(turn: Turn) -> str:
    """A message as one text. Pictures that stand before or after all of it are written after it, one a line."""
    if isinstance(turn.content, str):
        return turn.content
    marks = [isinstance(part, ImagePart) for part in turn.content]
    texts = ["" if isinstance(part, ImagePart) else part.text for part in turn.content]
    if marks == sorted(marks) or marks == sorted(marks, reverse=True):
        return "".join(texts).strip("\n") + f"\n{IMAGE_PLACEHOLDER}" * sum(marks)
    return "".join(IMAGE_PLACEHOLDER if mark else text for mark, text in zip(marks, texts, strict=True))


def as_sent(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture as the original's page sends and keeps it: upright, RGB, its longest edge within bounds."""
    picture = PIL.ImageOps.exif_transpose(picture).convert("RGB")
    longest, shortest = max(picture.size), min(picture.size)
    if longest <= _LONGEST_EDGE:
        return picture
    ratio = longest / shortest
    short = int(min(_LONGEST_EDGE / ratio, _SHORTEST_EDGE, shortest))
    long = int(short * ratio)
    wide = picture.width >= picture.height
    return picture.resize((max(1, long), max(1, short)) if wide else (max(1, short), max(1, long)))


def picture_hash(picture: PIL.Image.Image) -> str:
    """The original's name of a picture: MD5 of its pixels' bytes. A name, nothing that has to be safe."""
    return hashlib.md5(picture.tobytes(), usedforsecurity=False).hexdigest()
