"""The check that a run starts with: every record read, every picture's header opened, every conversation counted.

A run of days must not stop at record 400,000, so all problems of all records are found and listed before training
starts. Records pass through one chunk at a time into a folder of arrays and Samples; opening it again, in any number of
processes and by any run that reads the same data so, only maps its files. Pictures are decoded in training, not here,
unless their file lacks its end.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from lapilli.base.errors import DataError
from lapilli.base.progress import Progress
from lapilli.data.cache import refusing, shared_folder
from lapilli.data.corpus import Corpus, RecordCorpus, are_prepared, open_prepared
from lapilli.data.encode import Encoder
from lapilli.data.image import ImageLimits, ImageSpec, usable_size
from lapilli.data.order import llava_length
from lapilli.data.read.open import open_source
from lapilli.data.read.position import Reading
from lapilli.data.read.record import Placement, RawRecord, Reader
from lapilli.data.sample import Sample
from lapilli.data.stamp import DataIndex, Note, hash_inputs, index_folder, kind_of, stamp_of
from lapilli.data.store import SampleStore, StoreWriter, encode
from lapilli.data.watched import Watch, changed
from lapilli.data.workers import shared
from lapilli.recipe.schema import Source
from lapilli.recipe.subset import parse_subset

CHUNK_RECORDS = 500
"""Records that a worker checks at a time."""
SHOWN_PER_KIND = 3
"""Problems of one kind that an error message spells out; `BadData.problems` has all of them."""

Record = tuple[int, int, RawRecord]
"""(number over all sources, source, record)"""


class BadData(DataError):
    """Records that can't be used. `problems` holds one message per record, each naming file and record."""

    def __init__(self, problems: Sequence[tuple[str, str]], records: int, max_bad_ratio: float = 0.0) -> None:
        self.problems = tuple(f"{where}: {message}" for where, message in problems)
        allowed = f"\n(data.max_bad_ratio {max_bad_ratio:g} allows {int(records * max_bad_ratio):,})"
        super().__init__(_report(problems, records) + (allowed if max_bad_ratio else ""))


@dataclass(frozen=True)
class _Settings:
    readers: tuple[Reader, ...]
    encoders: tuple[Encoder, ...]
    spec: ImageSpec
    placement: Placement
    limits: ImageLimits


@dataclass
class _Found:
    """What some records gave: one entry per usable Sample in all but the last five."""

    records: int = 0
    blobs: list[bytes] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    facts: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(length, supervised, pictures, words)"""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(where, message)"""
    places: set[str] = field(default_factory=set)
    """Folders that pictures are asked for in."""

    def extend(self, other: _Found) -> None:
        """Add what later records gave, but for their Samples."""
        self.records += other.records
        for name in ("kept", "facts", "sizes", "notes", "problems"):
            getattr(self, name).extend(getattr(other, name))
        self.places |= other.places


def index(
    sources: Sequence[Source],
    encoder: Encoder | Sequence[Encoder],
    spec: ImageSpec,
    *,
    placement: Placement = "keep",
    limits: ImageLimits | None = None,
    cache: str | Path | None = None,
    keep: bool = True,
    workers: int = 0,
    max_bad_ratio: float = 0.0,
    stream: TextIO | None = None,
) -> Corpus:
    """Read and check every record of `sources`; return the usable ones with their index.

    Prepared folders were checked when they were made, and are opened; they must fit `encoder`.

    `encoder` serves all sources, or is one for each (they differ in their templates, and in nothing else).
    `cache` is a folder that keeps indexes, for any number of processes; where one fits, it is opened and nothing is
    read. One that is made stays there with `keep`. `workers` processes share the work (0: this one does it). Progress
    goes to `stream` (default: standard error). `max_bad_ratio` is the part of all records that may be left out, each
    with a Note, for being bad. Raises BadData listing every bad record, counted by kind, and DataError if a file can't
    be read at all, nothing is left, or `cache` can't be written.
    """
    limits = limits or ImageLimits()
    encoders = (encoder,) * len(sources) if isinstance(encoder, Encoder) else tuple(encoder)
    if are_prepared(sources):
        return open_prepared(sources, encoders)
    readers = tuple(open_source(source, None if cache is None else Path(cache)) for source in sources)
    roots = tuple(reader.images for reader in readers)
    inputs = hash_inputs(sources, readers, encoders, spec, placement, limits, max_bad_ratio, cache, keep)
    kept = None if cache is None else index_folder(cache, inputs, readers)
    corpus, stale = (None, None) if kept is None else _find(kept, inputs, roots)
    if corpus is not None:
        return corpus
    settings = _Settings(readers, encoders, spec, placement, limits)
    said = "" if kept is None or not keep else f"{kept}, made now" + (f" ({stale} has changed)" if stale else "")
    place: AbstractContextManager[str | Path] = (
        tempfile.TemporaryDirectory() if kept is None or not keep else shared_folder(kept)
    )
    with place as folder:
        watch = Watch()
        found = _check_all(sources, settings, workers, Path(folder), stream)
        if len(found.problems) > int(found.records * max_bad_ratio):
            raise BadData(found.problems, found.records, max_bad_ratio)
        found.notes += [Note(where, f"left out as bad: {message}") for where, message in found.problems]
        with refusing(Path(folder)):
            _index(inputs, found).save(folder)
            watch.save(Path(folder), found.places)
        # Mapped before it gets its name, or loses it: a file that is mapped stays readable either way.
        corpus = _open(Path(folder), inputs, roots, said)
        if not len(corpus):
            names = ", ".join(source.path for source in sources)
            why = "; ".join(f"{count:,} x {kind}" for kind, count in corpus.index.note_counts().items())
            raise DataError(f"{names}: nothing is left to train on: {found.records:,} records{why and f', {why}'}")
    return corpus


def _find(folder: Path, inputs: str, roots: Sequence[str | None]) -> tuple[RecordCorpus | None, str | None]:
    """The kept index, or None and, if there is one that no longer fits, the picture folder that has changed."""
    while True:
        before = _identity(folder)
        if before is None:
            return None, None
        try:
            stale = changed(folder)
            corpus = None if stale else _open(folder, inputs, roots, f"{folder}, found")
        except (OSError, ValueError, TypeError, DataError) as error:
            if _identity(folder) == before:
                raise error if isinstance(error, DataError) else _damaged(folder, error) from error
        else:
            if _identity(folder) == before:
                return corpus, stale
        # Another process has made it anew in the middle of this.


def _identity(folder: Path) -> int | None:
    with refusing(folder.parent):
        return folder.stat().st_ino if folder.exists() else None


def _open(folder: Path, inputs: str, roots: Sequence[str | None], said: str) -> RecordCorpus:
    try:
        known, samples = DataIndex.open(folder), SampleStore.open(folder, roots)
        if known.inputs != inputs or len(known) != len(samples):
            raise ValueError("its files belong to different indexes")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise _damaged(folder, error) from error
    return RecordCorpus(samples, known, said)


def _damaged(folder: Path, error: Exception) -> DataError:
    return DataError(f"{folder}: the data index is damaged ({error}); delete it and it is made again")


def _index(inputs: str, found: _Found) -> DataIndex:
    facts = np.array(found.facts, dtype=np.int32).reshape(-1, 4)
    columns = map(np.ascontiguousarray, facts.T)
    arrays: dict[str, Any] = dict(zip(("lengths", "supervised", "pictures", "words"), columns, strict=True))
    arrays["kept"] = np.array(found.kept, dtype=np.int64)
    arrays["sizes"] = np.array(found.sizes, dtype=np.int32).reshape(-1, 2)
    return DataIndex(stamp_of(inputs, arrays), inputs, found.records, notes=tuple(found.notes), **arrays)


def _check_all(
    sources: Sequence[Source], settings: _Settings, workers: int, folder: Path, stream: TextIO | None
) -> _Found:
    """Check every record; usable Samples go into `folder` as they come."""
    found = _Found()
    reading = Reading(settings.readers)
    chunks = _chunks(sources, settings.readers, reading)
    with Progress("checking data", reading=reading, stream=stream) as progress, StoreWriter(folder) as store:
        for part in shared(_check_chunk, settings, chunks, workers, "try data.workers: 0"):
            with refusing(folder):
                for blob, source in zip(part.blobs, part.sources, strict=True):
                    store.append(blob, source)
            found.extend(part)
            bad = f"{len(found.problems):,} bad" if found.problems else ""
            progress.advance(part.records, bad)
    return found


def _chunks(sources: Sequence[Source], readers: Sequence[Reader], reading: Reading) -> Iterator[list[Record]]:
    """The records of all sources, or of the parts of them that are asked for, some at a time."""

    def records() -> Iterator[Record]:
        number = 0
        for place, (source, reader) in enumerate(zip(sources, readers, strict=True)):
            start, stop = bounds(source, reader)
            for number, raw in enumerate(reading.records(place, start, stop), number):  # noqa: B020
                yield number, place, raw
            number += 1

    everything = records()
    while chunk := list(islice(everything, CHUNK_RECORDS)):
        yield chunk


def bounds(source: Source, reader: Reader) -> tuple[int, int | None]:
    """First record of the source's part, from 0, and the one after its last (None: the end).

    A share needs the number of all records first, so the source is then read twice.
    """
    if source.subset is None:
        return 0, None
    subset = parse_subset(source.subset)
    return subset.bounds(sum(1 for _ in reader.records()))


def _check_chunk(settings: _Settings, chunk: Sequence[Record]) -> _Found:
    found = _Found(records=len(chunk))
    for number, source, raw in chunk:
        try:
            sample = settings.readers[source].parse(raw, settings.placement)
            if not _check_sample(sample, source, settings, found):
                continue
        except DataError as error:
            found.problems.append((raw.where, str(error).removeprefix(f"{raw.where}: ")))
            continue
        found.blobs.append(encode(sample))
        found.sources.append(source)
        found.kept.append(number)
    return found


def _check_sample(sample: Sample, source: int, settings: _Settings, found: _Found) -> bool:
    """Count one Sample into `found`; False if a policy drops it. Raises DataError."""
    root = settings.readers[source].images
    if root is not None:
        found.places.update(os.path.join(root, os.path.dirname(i.path)) for i in sample.images if i.path is not None)
    sizes = [usable_size(image, root, settings.spec, settings.limits, sample.where) for image in sample.images]
    encoded = settings.encoders[source].encode_noted(sample, sizes)
    found.notes += [Note(sample.where, reason) for reason in encoded.notes]
    if encoded.example is None:
        return False
    example = encoded.example
    found.facts.append((example.length, example.supervised, len(sizes), llava_length(sample)))
    found.sizes += sizes
    return True


def _report(problems: Sequence[tuple[str, str]], records: int) -> str:
    kinds: dict[str, list[str]] = defaultdict(list)
    for where, message in problems:
        kinds[kind_of(message)].append(f"{where}: {message}")
    if len(problems) == 1:
        return next(iter(kinds.values()))[0]
    lines = [f"{len(problems):,} of {records:,} records can't be used:"]
    for kind, messages in sorted(kinds.items(), key=lambda item: -len(item[1])):
        lines.append(f"  {len(messages):,} x {kind}")
        lines += [f"      {message}" for message in messages[:SHOWN_PER_KIND]]
        if len(messages) > SHOWN_PER_KIND:
            lines.append(f"      ... and {len(messages) - SHOWN_PER_KIND:,} more")
    return "\n".join(lines)
