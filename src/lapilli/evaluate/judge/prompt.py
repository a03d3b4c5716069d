"""What is sent: the original's prompt, for an order of the answers, as the body of a chat completion.

A request is known by the SHA-256 of what decides its reply, so that a reply is paid for once and never taken for that
to another question, answer, rule or model.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lapilli.data.picture import ImageLimits, image_size, opened_file
from lapilli.data.sample import Image
from lapilli.evaluate.judge.items import Item
from lapilli.evaluate.judge.rules import SYSTEM

Order = Literal["12", "21"]
"""Which answer stands first: as the files are given, or the other way round."""

_KINDS = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif", b"RIFF": "image/webp"}


@dataclass(frozen=True, slots=True)
class Asking:
    """How the judge is asked."""

    model: str
    temperature: float | None = 0.2
    """None: not sent, for models that know no temperature."""
    max_tokens: int = 1024
    limit_field: str = "max_tokens"
    """What the endpoint calls it: `max_tokens`, or `max_completion_tokens`."""
    images: str | None = None
    """Where pictures lie that are sent along."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for the judge."""

    item: Item
    order: Order
    digest: str

    @property
    def name(self) -> str:
        return f"question {self.item.id}" + (", answers swapped" if self.order == "21" else "")


def content(item: Item, order: Order) -> str:
    """The user's message, in the original's form."""
    role = item.rule.role
    if item.graded:
        parts = [f"[Question]\n{item.question}", f"[Reference]\n{item.context}"]
        parts.append(f"[{role}]\n{item.answers[0]}\n\n[End of {role}]")
    else:
        first, second = item.answers if order == "12" else reversed(item.answers)
        parts = [] if item.context is None else [f"[Context]\n{item.context}"]
        parts.append(f"[Question]\n{item.question}")
        parts += [f"[{role} {n}]\n{text}\n\n[End of {role} {n}]" for n, text in ((1, first), (2, second))]
    return "\n\n".join([*parts, f"[System]\n{item.rule.prompt}"]) + "\n\n"


def body(item: Item, order: Order, asking: Asking) -> dict[str, Any]:
    """The JSON of the request. Raises DataError for a picture that can't be sent."""
    text = content(item, order)
    user: Any = text
    if asking.images is not None and item.image is not None:
        user = [
            {"type": "image_url", "image_url": {"url": _data_url(item, asking.images)}},
            {"type": "text", "text": text},
        ]
    made: dict[str, Any] = {
        "model": asking.model,
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}],
        asking.limit_field: asking.max_tokens,
    }
    return made if asking.temperature is None else {**made, "temperature": asking.temperature}


def requests(items: Sequence[Item], asking: Asking, both_orders: bool) -> list[Request]:
    """Every request there is to make, in the order of the questions; a grade has one order only."""
    made = []
    for item in items:
        orders: tuple[Order, ...] = ("12", "21") if both_orders and not item.graded else ("12",)
        for order in orders:
            written = json.dumps(body(item, order, asking), sort_keys=True)
            made.append(Request(item, order, hashlib.sha256(written.encode()).hexdigest()[:32]))
    return made


def _data_url(item: Item, root: str) -> str:
    where = f"question {item.id}"
    image_size(Image(path=item.image), root, where=where)
    with opened_file(Image(path=item.image), root, ImageLimits(), where, f'{where}: image "{item.image}"') as stream:
        raw = stream.read()
    kind = next((kind for head, kind in _KINDS.items() if raw.startswith(head)), None)
    if kind is None:
        raw, kind = _as_png(item, root, where), "image/png"
    return f"data:{kind};base64,{base64.b64encode(raw).decode('ascii')}"


def _as_png(item: Item, root: str, where: str) -> bytes:
    """A picture of a format that endpoints do not take, as PNG."""
    import io

    from lapilli.data.picture import open_image

    written = io.BytesIO()
    open_image(Image(path=item.image), root, where=where).save(written, "PNG")
    return written.getvalue()
