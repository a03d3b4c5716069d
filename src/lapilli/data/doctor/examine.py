"""The doctor's rounds: all records through worker processes, then what only shows when all of them are known.

Records pass through in chunks, never all at once; what stays of each is a row of numbers and a few names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import numpy as np

from lapilli.base.errors import DataError
from lapilli.base.progress import Progress
from lapilli.data.check import bounds
from lapilli.data.corpus import are_prepared
from lapilli.data.doctor.columns import Columns
from lapilli.data.doctor.diagnosis import Diagnosis, Part
from lapilli.data.doctor.findings import Findings
from lapilli.data.doctor.picture import content_key
from lapilli.data.doctor.record import Decode, Examiner, Found, Numbered, Problem, Settings
from lapilli.data.doctor.repeats import Doubtful, repeats, settle
from lapilli.data.doctor.rows import RowReader
from lapilli.data.image import ImageLimits, ImageSpec
from lapilli.data.read.open import open_source
from lapilli.data.read.position import Reading
from lapilli.data.read.record import Placement, Reader, printable
from lapilli.data.sample import Image
from lapilli.data.workers import shared
from lapilli.recipe.schema import Source

if TYPE_CHECKING:
    from lapilli.data.encode import Encoder

CHUNK_RECORDS = 200
"""Records that a worker is handed at a time."""
CHUNK_PICTURES = 500

T = TypeVar("T")
R = TypeVar("R")


def examine(
    train: Sequence[Source],
    validation: Sequence[Source] = (),
    *,
    encoder: Encoder | Sequence[Encoder] | None = None,
    spec: ImageSpec | None = None,
    decode: Decode = "header",
    placement: Placement = "keep",
    limits: ImageLimits | None = None,
    workers: int = 0,
    stream: TextIO | None = None,
) -> Diagnosis:
    """Examine every record and picture of some sources; nothing that is wrong with one of them is raised.

    Sources are records or prepared folders. `encoder` serves all of them, or is one for each, those of `validation`
    last; without it and `spec`, lengths are counted in words and what only a model decides is not checked. `workers`
    processes share the work (below 2: this one does it). Progress goes to `stream` (default: standard error). Raises
    DataError if a source as a whole can't be read, or a worker is killed.
    """
    start = time.monotonic()
    sources = [*train, *validation]
    encoders = list(encoder) if isinstance(encoder, Sequence) else [encoder] * len(sources)
    prepared = [are_prepared(split) for split in (train, validation) for _ in split]
    readers: list[Reader] = [
        RowReader.open(source, one) if rows else open_source(source)
        for source, one, rows in zip(sources, encoders, prepared, strict=True)
    ]
    settings = Settings(readers, encoders, spec, placement, limits or ImageLimits(), decode)
    held_out = np.arange(len(sources)) >= len(train)
    usable, findings, counts = Columns(), Findings(), [0] * len(sources)
    reading = Reading(readers)
    records = _numbered(sources, reading, readers, findings)
    with Progress("checking data", reading=reading, stream=stream) as progress:
        for part in _shared(_examine_chunk, records, CHUNK_RECORDS, settings, workers):
            for source, count in part.counts.items():
                counts[source] += count
            usable.append(part.usable)
            for problem in part.problems:
                findings.add(problem)
            progress.advance(sum(part.counts.values()), f"{len(findings):,} findings" if len(findings) else "")
    settle(usable, held_out, lambda pictures, count: _hashed(pictures, count, settings, workers, stream))
    for problem in repeats(usable, held_out):
        findings.add(problem)
    parts = tuple(
        Part(source.path, "validation" if held else "train", reader.format, reader.images, count)
        for source, held, reader, count in zip(sources, held_out, readers, counts, strict=True)
    )
    limit = next((one.max_length for one in encoders if one is not None), None)
    tokens = prepared[: len(train)] == [True] * len(train) or None not in encoders[: len(train)]
    return Diagnosis(parts, usable, findings, decode, limit, tokens, time.monotonic() - start, _open_ends(readers))


def _numbered(
    sources: Sequence[Source], reading: Reading, readers: Sequence[Reader], findings: Findings
) -> Iterator[Numbered]:
    """Every record that is asked for; a source that breaks off is a problem, and what follows it is read on."""
    for place, (source, reader) in enumerate(zip(sources, readers, strict=True)):
        number = 0
        try:
            start, stop = bounds(source, reader)
            number = start
            for number, raw in enumerate(reading.records(place, start, stop), start + 1):
                yield place, number, raw
        except DataError as error:
            findings.add(Problem(place, number + 1, reader.files[0], "file", printable(str(error))))


def _open_ends(readers: Sequence[Reader]) -> tuple[str, ...]:
    """What prepared folders leave open."""
    rows = [reader for reader in readers if isinstance(reader, RowReader)]
    open_ends = []
    if any(reader.vocabulary is None for reader in rows):
        open_ends.append("token ids, as Cerebras' own files hold no vocabulary: name it with --model FOLDER")
    if rows and len(rows) < len(readers):
        open_ends.append("leakage between rows of prepared data and records that were not prepared")
    return tuple(open_ends)


def _shared(
    work: Callable[[Examiner, Sequence[Any]], R], items: Iterable[T], size: int, settings: Settings, workers: int
) -> Iterator[R]:
    """What `work` makes of chunks of `items`, in order, here or in `workers` forked processes."""
    rest = iter(items)
    chunks = iter(lambda: list(islice(rest, size)), [])
    remedy = "try --workers 1, which also shows the record at which it happens"
    return shared(work, Examiner(settings), chunks, workers, remedy)


def _examine_chunk(examiner: Examiner, chunk: Sequence[Numbered]) -> Found:
    return examiner.chunk(chunk)


def _hash_chunk(examiner: Examiner, chunk: Sequence[Doubtful]) -> list[bytes]:
    settings = examiner.settings
    return [content_key(Image(path), settings.readers[source].images, settings.limits) for source, path in chunk]


def _hashed(
    pictures: Iterable[Doubtful], count: int, settings: Settings, workers: int, stream: TextIO | None
) -> Iterator[bytes]:
    """The hashes of whole picture files, in order."""
    with Progress("comparing pictures", count, stream=stream) as progress:
        for keys in _shared(_hash_chunk, pictures, CHUNK_PICTURES, settings, workers):
            progress.advance(len(keys))
            yield from keys
