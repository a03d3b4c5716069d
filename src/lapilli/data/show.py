"""Conversations as they will be trained, for the eye: which tokens are supervised, and where pictures stand.

A `Drawing` is made from the same chunks that training encodes, so what is shown is what is trained. This file draws
it in the terminal and as JSON; `lapilli.data.show_html` makes a page of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from lapilli.data.encode import UNEXPANDED, Chunk, Encoder, Sizes
from lapilli.data.sample import IGNORE, Image, Sample

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True, slots=True)
class Glyph:
    """A piece of text and its token; more than one where a character takes several tokens."""

    text: str
    ids: tuple[int, ...]
    supervised: bool


@dataclass(frozen=True, slots=True)
class Slot:
    """A picture: how many entries it takes in the ids, and its size in pixels, (0, 0) where it was not opened."""

    image: Image
    entries: int
    width: int
    height: int

    @property
    def caption(self) -> str:
        """Name, size and tokens, as far as they are known."""
        size = f" {self.width}x{self.height}" if self.width else ""
        count = f" = {self.entries} tokens" if self.entries > 1 else ""
        return f"{self.image.path or 'picture'}{size}{count}"


@dataclass(frozen=True, slots=True)
class Drawing:
    """One conversation: its ids and labels (T,), and the same as text and pictures."""

    id: str | int
    items: tuple[Glyph | Slot, ...]
    input_ids: np.ndarray
    labels: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> str:
        """Tokens, learnt tokens and pictures, in words."""
        slots = sum(isinstance(item, Slot) for item in self.items)
        pictures = f", {slots} picture{'s' if slots > 1 else ''}" if slots else ""
        learnt = int((self.labels != IGNORE).sum())
        return f"{len(self.input_ids)} tokens, {learnt} learnt{pictures}"

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "input_ids": self.input_ids.tolist(), "labels": self.labels.tolist()}


def draw(
    sample: Sample,
    encoder: Encoder,
    sizes: Sizes | None = None,
    *,
    unexpanded: bool = False,
    name: str | int | None = None,
) -> Drawing:
    """Encode one Sample and keep the text of every token.

    `sizes`: (width, height) of each picture in order, where they are known. With `unexpanded`, or an Encoder without
    a layout, a picture is one entry, -200. `name` is shown in place of the Sample's id. Raises DataError as `Encoder`.
    """
    expands = not unexpanded and encoder.layout is not None and encoder.image_token_id is not None
    left = list(sizes if sizes is not None else [(0, 0)] * len(sample.images))
    items: list[Glyph | Slot] = []
    ids, labels = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for chunk in encoder.chunks(sample):
        if isinstance(chunk, Chunk):
            items += _glyphs(chunk, encoder)
            ids.append(chunk.ids)
            labels.append(chunk.labels)
            continue
        width, height = left.pop(0)
        entries, token = 1, UNEXPANDED
        if expands and encoder.layout is not None and encoder.image_token_id is not None:
            entries, token = encoder.layout.tokens(width, height), encoder.image_token_id
        items.append(Slot(chunk, entries, width, height))
        ids.append(np.full(entries, token))
        labels.append(np.full(entries, IGNORE))
    shown = sample.id if name is None else name
    return Drawing(shown, tuple(items), np.concatenate(ids), np.concatenate(labels), encoder.template.notes(sample))


def as_text(drawing: Drawing, coloured: bool = True) -> Text:
    """The conversation for the terminal: supervised text green (or, without colours, in ⟦ ⟧), pictures as blocks."""
    from rich.text import Text

    out = Text()
    out.append(f"── {visible(str(drawing.id))}: {drawing.counts} ──\n", style="bold" if coloured else "")
    for note in drawing.notes:
        out.append(f"note: {note}\n", style="yellow" if coloured else "")
    for kind, run in groupby(drawing.items, key=_kind):
        items: list[Any] = list(run)
        if kind == "learnt":
            text = visible(_text(items)).replace("\n", "⏎\n")
            out.append(text if coloured else f"⟦{text}⟧", style="bold green" if coloured else "")
        elif kind == "given":
            out.append(visible(_text(items)), style="dim" if coloured else "")
        else:
            for slot in items:
                out.append(f"▐ {visible(slot.caption)} ▌", style="black on cyan" if coloured else "")
    out.append("\n")
    return out


def visible(text: str) -> str:
    """The text with control characters, which a terminal would obey, as their pictures; line breaks and tabs stay."""
    return "".join(_picture_of(c) if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 else c for c in text)


def _kind(item: Glyph | Slot) -> str:
    if isinstance(item, Slot):
        return "picture"
    return "learnt" if item.supervised else "given"


def _text(glyphs: Sequence[Any]) -> str:
    return "".join(glyph.text for glyph in glyphs)


def _picture_of(character: str) -> str:
    return chr(0x2400 + ord(character)) if ord(character) < 32 else "\u2421" if ord(character) == 127 else "\ufffd"


def _glyphs(chunk: Chunk, encoder: Encoder) -> list[Glyph]:
    """Each token with the characters that it adds; tokens of one character, or of none, join the glyph before."""
    if not chunk.text:
        names: Sequence[str] = encoder.tokenizer.convert_ids_to_tokens(chunk.ids.tolist())
        return [Glyph(name, (token,), False) for name, token in zip(names, chunk.ids.tolist(), strict=True)]
    glyphs: list[Glyph] = []
    cursor = 0
    learnt = (chunk.labels != IGNORE).tolist()
    for token, supervised, end in zip(chunk.ids.tolist(), learnt, chunk.offsets[:, 1].tolist(), strict=True):
        last = glyphs[-1] if glyphs else None
        if end <= cursor and last is not None and last.supervised == supervised:
            glyphs[-1] = Glyph(last.text, (*last.ids, token), supervised)
            continue
        glyphs.append(Glyph(chunk.text[cursor : max(cursor, end)], (token,), supervised))
        cursor = max(cursor, end)
    if cursor < len(chunk.text):
        glyphs.append(Glyph(chunk.text[cursor:], (), False))
    return glyphs
