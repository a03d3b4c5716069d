"""Prepared folders under examination: every row read as training reads it, and held against what was prepared.

Rows have no words, so a row is known again by its ids and labels. What a folder does not say, such as the vocabulary of
Cerebras' own files, comes from a model where one is named, and is else left open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from lapilli.base.errors import DataError
from lapilli.base.layout import ImageLayout
from lapilli.data.read.position import Spot
from lapilli.data.read.prepared import PreparedStore
from lapilli.data.read.record import Placement, RawRecord
from lapilli.data.sample import IGNORE, Example, Sample

if TYPE_CHECKING:
    from lapilli.data.encode import Encoder
    from lapilli.recipe.schema import Source


@dataclass(frozen=True)
class RowReader:
    """A prepared folder as a source: its records are its rows, and a record's value is its place."""

    store: PreparedStore
    vocabulary: int | None
    """How many token ids there are; None: not known."""
    layout: ImageLayout | None
    max_length: int | None

    @classmethod
    def open(cls, source: Source, encoder: Encoder | None) -> RowReader:
        """Open a folder. Raises DataError if it is not whole, or was not prepared for `encoder`."""
        store = PreparedStore(source.path, encoder, source.images)
        facts = store.facts
        if facts is not None:
            layout = None if facts.layout is None else ImageLayout.model_validate(facts.layout)
            return cls(store, facts.vocabulary, layout, facts.max_length)
        if encoder is None and store.pictures.any():
            raise DataError(
                f"{source.path}: Cerebras' own files do not say which token stands for a picture; name the model that "
                "they were prepared for with --model"
            )
        if encoder is not None:
            return cls(store, len(encoder.tokenizer), encoder.layout, encoder.max_length)
        return cls(store, None, None, None)

    @property
    def format(self) -> str:
        return f"prepared ({self.store.layout})"

    @property
    def files(self) -> list[str]:
        return [str(file) for file in sorted(self.store.path.iterdir()) if file.is_file()]

    @property
    def images(self) -> str | None:
        return self.store.images

    def records(self, spot: Spot | None = None) -> Iterator[RawRecord]:
        files = len(self.files)
        for i in range(len(self.store)):
            if spot is not None:
                file, share = divmod(files * i / len(self.store), 1)
                spot.at(int(file), share)
            yield RawRecord(str(self.store.path), i + 1, i)

    def parse(self, raw: RawRecord, placement: Placement = "keep") -> Sample:
        """Rows were conversations once. Raises DataError."""
        raise DataError(f"{raw.file}: prepared data have no conversations to read")

    def wrong(self, example: Example, i: int) -> Iterator[tuple[str, str]]:
        """(code, message) for all that is wrong with row `i`, but for its pictures' files."""
        store = self.store
        said = (int(store.lengths[i]), int(store.supervised[i]), int(store.pictures[i]))
        held = (example.length, example.supervised, len(example.images))
        for what, expected, found in zip(("tokens", "supervised tokens", "pictures"), said, held, strict=True):
            if expected != found:
                yield "row", f"holds {found} {what}, but the folder's table says {expected}; prepare the data again"
        if not example.supervised:
            yield "no_supervised", "nothing to learn from this row: no token is supervised; leave it out"
        if self.max_length is not None and example.length > self.max_length:
            yield "too_long", f"{example.length} tokens, but max_length is {self.max_length}"
        weights = example.weights
        if weights is not None and not (np.isfinite(weights).all() and (weights >= 0).all()):
            yield "row", "has loss weights that are negative or no numbers; prepare the data again"
        yield from self._wrong_places(example)
        yield from self._wrong_ids(example)

    def _wrong_places(self, example: Example) -> Iterator[tuple[str, str]]:
        end = 0
        for k, slot in enumerate(example.images, 1):
            if slot.start < end or slot.tokens < 1 or slot.start + slot.tokens > example.length:
                places = f"{slot.start} to {slot.start + slot.tokens}"
                yield "places", f"picture {k} has places {places} of {example.length}, which are not its own"
            end = slot.start + slot.tokens
            known = slot.width > 0 and slot.height > 0
            if self.layout is None or not (known or self.layout.mode != "anyres"):
                continue
            tokens = self.layout.tokens(slot.width, slot.height)
            if slot.tokens != tokens:
                yield "places", f"picture {k} has {slot.tokens} places, but its layout gives it {tokens}"

    def _wrong_ids(self, example: Example) -> Iterator[tuple[str, str]]:
        ids, text = example.input_ids, np.ones(example.length, dtype=bool)
        for slot in example.images:
            text[max(0, slot.start) : slot.start + slot.tokens] = False
        if (example.labels[~text] != IGNORE).any():
            yield "places", "places of pictures are supervised; prepare the data again"
        limit = np.iinfo(np.int64).max if self.vocabulary is None else self.vocabulary
        outside = ids[text & ((ids < 0) | (ids >= limit))]
        if len(outside):
            known = "ids begin at 0" if self.vocabulary is None else f"the vocabulary has {self.vocabulary:,}"
            yield "vocabulary", f"{len(outside)} token ids are outside the vocabulary, such as {outside[0]} ({known})"
        elif (example.labels[text] != np.where(example.labels[text] == IGNORE, IGNORE, ids[text])).any():
            yield "row", "has labels that are not its own ids; prepare the data again"


def row_key(example: Example) -> bytes:
    """A hash of what a row teaches, with the places of pictures but not the pictures."""
    hashed = blake2b(digest_size=16)
    for column in (example.input_ids, example.labels, example.weights):
        hashed.update(b"\0" if column is None else column.tobytes())
    return hashed.digest()
