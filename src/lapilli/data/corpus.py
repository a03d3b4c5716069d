"""What a run reads from: usable conversations by number, whether written by a user or prepared beforehand.

A loader needs few things of its data, and this is all of them. Records are encoded each time they are read; rows of
prepared folders were encoded once and for all, for one tokenizer, template and layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from lapilli.base.errors import DataError
from lapilli.data.encode import Encoder
from lapilli.data.read.prepared import PreparedStore, is_prepared
from lapilli.data.sample import Example
from lapilli.data.stamp import DataIndex
from lapilli.data.store import SampleStore
from lapilli.recipe.schema import Source
from lapilli.recipe.subset import parse_subset


class Corpus(Protocol):
    """The conversations of one or more sources, all of them usable, and their index. Safe to fork."""

    @property
    def index(self) -> DataIndex: ...
    @property
    def kept(self) -> str:
        """Where the index is kept, and since when; empty if it is not."""
        ...

    @property
    def sources(self) -> np.ndarray:
        """Number of each conversation's source (n,)."""
        ...

    def __len__(self) -> int: ...
    def example(self, i: int, encoders: Sequence[Encoder]) -> Example:
        """Conversation `i` as numbers; `encoders` has one for each source, or one for all. Raises DataError."""
        ...

    def root(self, i: int) -> str | None:
        """What the picture paths of conversation `i` are relative to."""
        ...

    def where(self, i: int) -> str:
        """File and record of conversation `i`, for messages."""
        ...

    def name(self, i: int) -> str:
        """The id of conversation `i`."""
        ...


@dataclass(frozen=True)
class RecordCorpus:
    """Records as they were written, checked and indexed."""

    samples: SampleStore
    index: DataIndex
    kept: str = ""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def sources(self) -> np.ndarray:
        return self.samples.sources

    def example(self, i: int, encoders: Sequence[Encoder]) -> Example:
        placed = self.samples[i]
        encoder = encoders[placed.source if len(encoders) > 1 else 0]
        example = encoder.encode(placed.sample, self.index.image_sizes(i))
        if example is None or example.length != self.index.lengths[i]:
            raise DataError(f"{placed.sample.where}: the record gives other tokens than when it was indexed")
        return example

    def root(self, i: int) -> str | None:
        return self.samples[i].root

    def where(self, i: int) -> str:
        return self.samples[i].sample.where

    def name(self, i: int) -> str:
        return self.samples[i].sample.id


class PreparedCorpus:
    """Rows of prepared folders. `rows` (n,) are their places in the folders of their `sources` (n,)."""

    kept = ""
    """The folders are their own index."""

    def __init__(
        self, stores: Sequence[PreparedStore], sources: np.ndarray, rows: np.ndarray, index: DataIndex
    ) -> None:
        self._stores, self._rows, self.sources, self.index = tuple(stores), rows, sources, index

    def __len__(self) -> int:
        return len(self.index)

    def example(self, i: int, encoders: Sequence[Encoder]) -> Example:
        del encoders  # it was encoded when it was prepared
        return self._stores[self.sources[i]].example(int(self._rows[i]))

    def root(self, i: int) -> str | None:
        return self._stores[self.sources[i]].images

    def where(self, i: int) -> str:
        return f"{self._stores[self.sources[i]].path}: row {int(self._rows[i]) + 1}"

    def name(self, i: int) -> str:
        return self.example(i, ()).id


def are_prepared(sources: Sequence[Source]) -> bool:
    """Whether the sources are prepared folders. Raises DataError if only some of them are."""
    prepared = [is_prepared(source.path) for source in sources]
    if any(prepared) and not all(prepared):
        names = {whether: sources[prepared.index(whether)].path for whether in (True, False)}
        raise DataError(
            f"{names[True]} is prepared data and {names[False]} is not: run `lapilli data prepare` on that one too, "
            "with the same model, or train on the conversations that the prepared data were made from"
        )
    return all(prepared) and bool(prepared)


def open_prepared(sources: Sequence[Source], encoders: Sequence[Encoder]) -> PreparedCorpus:
    """Open prepared folders for a run. Raises DataError where they were made for something else, with both values."""
    stores = [
        PreparedStore(source.path, encoder, source.images) for source, encoder in zip(sources, encoders, strict=True)
    ]
    rows, numbers, places, sizes, facts = [], [], [], [], []
    first = 0
    for place, (source, store) in enumerate(zip(sources, stores, strict=True)):
        start, stop = parse_subset(source.subset).bounds(len(store)) if source.subset else (0, len(store))
        rows.append(np.arange(start, stop))
        places.append(np.full(stop - start, place, dtype=np.int32))
        numbers.append(first + rows[-1])
        ends = np.concatenate([[0], np.cumsum(store.pictures, dtype=np.int64)])
        sizes.append(store.sizes[ends[start] : ends[stop]])
        facts.append([store.layout, _digest(store.path), start, stop])
        first += len(store)
    columns = [
        np.concatenate([getattr(store, name)[r] for store, r in zip(stores, rows, strict=True)])
        for name in ("lengths", "supervised", "pictures")
    ]
    stamp = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    kept = np.concatenate(numbers)
    index = DataIndex(
        stamp, "", len(kept), kept, *columns, words=np.zeros_like(columns[0]), sizes=np.concatenate(sizes)
    )
    if not len(index):
        raise DataError(f"{', '.join(source.path for source in sources)}: no rows to train on")
    return PreparedCorpus(stores, np.concatenate(places), np.concatenate(rows), index)


def _digest(folder: Path) -> str:
    """Hash of what a prepared folder says of itself, and of its files' names and lengths."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    said = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.suffix == ".json"]
    return hashlib.sha256(json.dumps([[f.name, f.stat().st_size] for f in files] + said).encode()).hexdigest()
