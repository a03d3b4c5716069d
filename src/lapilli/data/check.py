"""The check that a run starts with: every record read, every picture's header opened, every conversation counted.

A run of days must not stop at record 400,000, so all problems of all records are found and listed before training
starts. Records pass through one chunk at a time into a folder of arrays and Samples under the data stamp; opening it
again, in any number of processes, only maps its files. Pictures are decoded in training, not here, unless their file
lacks its end.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np

from lapilli.base.atomic import atomic_folder
from lapilli.base.errors import DataError
from lapilli.base.progress import Progress
from lapilli.data.corpus import Corpus, RecordCorpus, are_prepared, open_prepared
from lapilli.data.encode import Encoder
from lapilli.data.image import ImageLimits, ImageSpec, usable_size
from lapilli.data.order import llava_length
from lapilli.data.read.open import open_source
from lapilli.data.read.position import Reading
from lapilli.data.read.record import Placement, RawRecord, Reader
from lapilli.data.sample import Sample
from lapilli.data.stamp import DataIndex, Note, index_folder, kind_of, make_stamp
from lapilli.data.store import SampleStore, StoreWriter, encode
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
    """What some records gave: one entry per usable Sample in all but the last four."""

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

    def extend(self, other: _Found) -> None:
        """Add what later records gave, but for their Samples."""
        self.records += other.records
        for name in ("kept", "facts", "sizes", "notes", "problems"):
            getattr(self, name).extend(getattr(other, name))


def index(
    sources: Sequence[Source],
    encoder: Encoder | Sequence[Encoder],
    spec: ImageSpec,
    *,
    placement: Placement = "keep",
    limits: ImageLimits | None = None,
    cache: str | Path | None = None,
    workers: int = 0,
    max_bad_ratio: float = 0.0,
    stream: TextIO | None = None,
) -> Corpus:
    """Read and check every record of `sources`; return the usable ones with their index.

    Prepared folders were checked when they were made, and are opened; they must fit `encoder`.

    `encoder` serves all sources, or is one for each (they differ in their templates, and in nothing else).
    `cache` is a folder that keeps indexes by stamp; where one fits, it is opened and nothing is read. `workers`
    processes share the work (0: this one does it). Progress goes to `stream` (default: standard error).
    `max_bad_ratio` is the part of all records that may be left out, each with a Note, for being bad. Raises BadData
    listing every bad record, counted by kind, and DataError if a file can't be read at all or nothing is left.
    """
    limits = limits or ImageLimits()
    encoders = (encoder,) * len(sources) if isinstance(encoder, Encoder) else tuple(encoder)
    if are_prepared(sources):
        return open_prepared(sources, encoders)
    readers = tuple(open_source(source, None if cache is None else Path(cache)) for source in sources)
    roots = tuple(reader.images for reader in readers)
    stamp = make_stamp(sources, readers, encoders, spec, placement, limits, max_bad_ratio, cache)
    kept = None if cache is None else index_folder(cache, stamp)
    if kept is not None and kept.is_dir():
        return _open(kept, stamp, roots)
    settings = _Settings(readers, encoders, spec, placement, limits)
    place: AbstractContextManager[str | Path] = tempfile.TemporaryDirectory() if kept is None else _kept(kept)
    with place as folder:
        found = _check_all(sources, settings, workers, Path(folder), stream)
        if len(found.problems) > int(found.records * max_bad_ratio):
            raise BadData(found.problems, found.records, max_bad_ratio)
        found.notes += [Note(where, f"left out as bad: {message}") for where, message in found.problems]
        _index(stamp, found).save(folder)
        # Mapped before it gets its name, or loses it: a file that is mapped stays readable either way.
        corpus = _open(Path(folder), stamp, roots)
        if not len(corpus):
            names = ", ".join(source.path for source in sources)
            why = "; ".join(f"{count:,} x {kind}" for kind, count in corpus.index.note_counts().items())
            raise DataError(f"{names}: nothing is left to train on: {found.records:,} records{why and f', {why}'}")
    return corpus


@contextmanager
def _kept(folder: Path) -> Iterator[Path]:
    """An index folder to fill; if the data are bad, the folders made for it go again."""
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        with atomic_folder(folder, replace=True) as draft:
            yield draft
    finally:
        for parent in made if not folder.exists() else ():
            with suppress(OSError):  # something else has been written there in the meantime
                parent.rmdir()


def _open(folder: Path, stamp: str, roots: Sequence[str | None]) -> RecordCorpus:
    try:
        known, samples = DataIndex.open(folder), SampleStore.open(folder, roots)
        if known.stamp != stamp or len(known) != len(samples):
            raise ValueError("its files belong to different indexes")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DataError(f"{folder}: the data index is damaged ({error}); delete it and it is made again") from error
    return RecordCorpus(samples, known)


def _index(stamp: str, found: _Found) -> DataIndex:
    facts = np.array(found.facts, dtype=np.int32).reshape(-1, 4)
    return DataIndex(
        stamp,
        found.records,
        np.array(found.kept, dtype=np.int64),
        *(np.ascontiguousarray(column) for column in facts.T),
        sizes=np.array(found.sizes, dtype=np.int32).reshape(-1, 2),
        notes=tuple(found.notes),
    )


def _check_all(
    sources: Sequence[Source], settings: _Settings, workers: int, folder: Path, stream: TextIO | None
) -> _Found:
    """Check every record; usable Samples go into `folder` as they come."""
    found = _Found()
    reading = Reading(settings.readers)
    chunks = _chunks(sources, settings.readers, reading)
    with Progress("checking data", reading=reading, stream=stream) as progress, StoreWriter(folder) as store:
        for part in shared(_check_chunk, settings, chunks, workers, "try data.workers: 0"):
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
            start, stop = _bounds(source, reader)
            for number, raw in enumerate(reading.records(place, start, stop), number):  # noqa: B020
                yield number, place, raw
            number += 1

    everything = records()
    while chunk := list(islice(everything, CHUNK_RECORDS)):
        yield chunk


def _bounds(source: Source, reader: Reader) -> tuple[int, int | None]:
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
