"""The check that a run starts with: every record read, every picture's header opened, every conversation counted.

A run of days must not stop at record 400,000, so all problems of all records are found and listed before training
starts. What is learnt on the way is kept under the data stamp, so that the next start is immediate. Pictures are
decoded in training, not here, unless their file lacks its end.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from lapilli.base.errors import DataError
from lapilli.base.progress import Progress
from lapilli.data.encode import Encoder
from lapilli.data.image import ImageLimits, ImageSpec, image_size
from lapilli.data.order import llava_length
from lapilli.data.read.llava import Placement, RawRecord, parse, read_records
from lapilli.data.sample import Image, Sample
from lapilli.data.stamp import DataIndex, Note, kind_of, make_stamp
from lapilli.data.store import SampleStore
from lapilli.recipe.schema import Source

CHUNK_RECORDS = 500
"""Records that a worker checks at a time."""
SHOWN_PER_KIND = 3
"""Problems of one kind that an error message spells out; `BadData.problems` has all of them."""

Record = tuple[int, int, RawRecord]
"""(number over all sources, source, record)"""


@dataclass(frozen=True)
class Corpus:
    """The Samples of one or more sources, all of them usable, and their index."""

    samples: SampleStore
    index: DataIndex

    def __len__(self) -> int:
        return len(self.index)


class BadData(DataError):
    """Records that can't be used. `problems` holds one message per record, each naming file and record."""

    def __init__(self, problems: Sequence[tuple[str, str]], records: int) -> None:
        self.problems = tuple(f"{where}: {message}" for where, message in problems)
        super().__init__(_report(problems, records))


@dataclass(frozen=True)
class _Settings:
    encoder: Encoder
    spec: ImageSpec
    placement: Placement
    limits: ImageLimits
    roots: tuple[str | None, ...]
    parse_only: bool


@dataclass
class _Found:
    """What some records gave: one entry per usable Sample in all but the last three."""

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
        for name, values in vars(self).items():
            values.extend(getattr(other, name))


def index(
    sources: Sequence[Source],
    encoder: Encoder,
    spec: ImageSpec,
    *,
    placement: Placement = "keep",
    limits: ImageLimits | None = None,
    cache: str | Path | None = None,
    workers: int = 0,
    stream: TextIO | None = None,
) -> Corpus:
    """Read and check every record of `sources`; return the usable Samples with their index.

    `cache` is a folder that keeps indexes by stamp; where one fits, records are only parsed. `workers` processes share
    the work (0: this one does it). Progress goes to `stream` (default: standard error). Raises BadData listing every
    bad record, counted by kind, and DataError if a file can't be read at all or nothing is left.
    """
    limits = limits or ImageLimits()
    roots = tuple(source.images for source in sources)
    stamp = make_stamp(sources, encoder, spec, placement, limits)
    known = None if cache is None else DataIndex.load(cache, stamp)
    records: list[Record] = []
    for place, source in enumerate(sources):
        records += [(len(records) + i, place, raw) for i, raw in enumerate(read_records(source.path))]
    total = len(records)
    if known is not None:
        records = [records[i] for i in known.kept]
    settings = _Settings(encoder, spec, placement, limits, roots, parse_only=known is not None)
    found = _check_all(records, settings, workers, "reading data" if known else "checking data", stream)
    if found.problems:
        raise BadData(found.problems, total)
    new = known is None
    known = _index(stamp, found, total) if known is None else known
    if not len(known):
        names = ", ".join(source.path for source in sources)
        why = "; ".join(f"{count:,} x {kind}" for kind, count in known.note_counts().items())
        raise DataError(f"{names}: nothing is left to train on: {total:,} records{why and f', {why}'}")
    if new and cache is not None:
        known.save(cache)
    return Corpus(SampleStore(found.blobs, found.sources, roots), known)


def _index(stamp: str, found: _Found, records: int) -> DataIndex:
    facts = np.array(found.facts, dtype=np.int32).reshape(-1, 4)
    return DataIndex(
        stamp,
        records,
        np.array(found.kept, dtype=np.int64),
        *(np.ascontiguousarray(column) for column in facts.T),
        sizes=np.array(found.sizes, dtype=np.int32).reshape(-1, 2),
        notes=tuple(found.notes),
    )


def _check_all(
    records: Sequence[Record], settings: _Settings, workers: int, what: str, stream: TextIO | None
) -> _Found:
    chunks = [range(i, min(len(records), i + CHUNK_RECORDS)) for i in range(0, len(records), CHUNK_RECORDS)]
    found = _Found()
    with Progress(what, len(records), stream=stream) as progress:
        for chunk, part in zip(chunks, _parts(records, chunks, settings, workers), strict=True):
            found.extend(part)
            bad = f"{len(found.problems):,} bad" if found.problems else ""
            progress.advance(len(chunk), bad)
    return found


def _parts(records: Sequence[Record], chunks: Sequence[range], settings: _Settings, workers: int) -> Iterator[_Found]:
    """Each chunk's findings, in order, from this process or from `workers` forked ones."""
    if workers < 2 or len(chunks) < 2:
        for chunk in chunks:
            yield _check_chunk(records, chunk, settings)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _Worker.start, (records, settings)) as pool:
        try:
            yield from pool.map(_Worker.check, chunks)
        except BrokenProcessPool as error:
            raise DataError(
                "a process that checked the data was killed, probably for want of memory; try data.workers: 0"
            ) from error


class _Worker:
    """What a forked process inherits: the records need not be sent to it."""

    records: Sequence[Record]
    settings: _Settings

    @classmethod
    def start(cls, records: Sequence[Record], settings: _Settings) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        cls.records, cls.settings = records, settings

    @classmethod
    def check(cls, chunk: range) -> _Found:
        return _check_chunk(cls.records, chunk, cls.settings)


def _check_chunk(records: Sequence[Record], chunk: range, settings: _Settings) -> _Found:
    found = _Found()
    for i in chunk:
        number, source, raw = records[i]
        try:
            sample = parse(raw, settings.placement)
            if not settings.parse_only and not _check_sample(sample, source, settings, found):
                continue
        except DataError as error:
            found.problems.append((raw.where, str(error).removeprefix(f"{raw.where}: ")))
            continue
        found.blobs.append(SampleStore.blob(sample))
        found.sources.append(source)
        found.kept.append(number)
    return found


def _check_sample(sample: Sample, source: int, settings: _Settings, found: _Found) -> bool:
    """Count one Sample into `found`; False if a policy drops it. Raises DataError."""
    sizes = [_size(image, source, settings, sample.where) for image in sample.images]
    encoded = settings.encoder.encode_noted(sample, sizes)
    found.notes += [Note(sample.where, reason) for reason in encoded.notes]
    if encoded.example is None:
        return False
    example = encoded.example
    found.facts.append((example.length, example.supervised, len(sizes), llava_length(sample)))
    found.sizes += sizes
    return True


def _size(image: Image, source: int, settings: _Settings, where: str) -> tuple[int, int]:
    size = image_size(image, settings.roots[source], settings.limits, where)
    try:
        settings.spec.check_size(*size)
    except DataError as error:
        raise DataError(f'{where}: image "{image.path}": {error}') from error
    return size


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
