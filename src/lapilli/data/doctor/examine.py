"""The doctor's rounds: all records through worker processes, then what only shows when all of them are known.

Records pass through in chunks, never all at once. Duplicates and leakage are found from hashes; where a hash of a
picture's ends says that two may be equal, the whole files are compared.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from lapilli.base.errors import DataError
from lapilli.base.progress import Progress
from lapilli.data.doctor.diagnosis import Diagnosis, Part
from lapilli.data.doctor.picture import PictureFacts, content_key
from lapilli.data.doctor.record import Decode, Examiner, Found, Numbered, Problem, RecordFacts, Settings
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
    encoder: Encoder | None = None,
    spec: ImageSpec | None = None,
    decode: Decode = "header",
    placement: Placement = "keep",
    limits: ImageLimits | None = None,
    workers: int = 0,
    stream: TextIO | None = None,
) -> Diagnosis:
    """Examine every record and picture of some sources; nothing that is wrong with one of them is raised.

    Without `encoder` and `spec`, lengths are counted in words and what only a model decides is not checked.
    `workers` processes share the work (below 2: this one does it). Progress goes to `stream` (default: standard
    error). Raises DataError if a source as a whole can't be read, or a worker is killed.
    """
    start = time.monotonic()
    sources = [*train, *validation]
    readers = [open_source(source) for source in sources]
    settings = Settings(readers, _strict(encoder), spec, placement, limits or ImageLimits(), decode)
    found = Found()
    reading = Reading(readers)
    records = _numbered(readers, reading, found.problems)
    with Progress("checking data", reading=reading, stream=stream) as progress:
        for part in _shared(_examine_chunk, records, CHUNK_RECORDS, settings, workers):
            for source, count in part.counts.items():
                found.counts[source] = found.counts.get(source, 0) + count
            found.usable += part.usable
            found.problems += part.problems
            progress.advance(sum(part.counts.values()), f"{len(found.problems):,} findings" if found.problems else "")
    splits = tuple("train" if place < len(train) else "validation" for place in range(len(sources)))
    usable = _exact(found.usable, splits, settings, workers, stream)
    found.problems += _repeats(usable, splits)
    parts = tuple(
        Part(source.path, split, reader.format, reader.images, found.counts.get(place, 0))
        for place, (source, split, reader) in enumerate(zip(sources, splits, readers, strict=True))
    )
    return Diagnosis(
        parts,
        tuple(usable),
        tuple(sorted(found.problems, key=lambda p: (p.source, p.number))),
        decode,
        None if encoder is None else encoder.max_length,
        encoder is not None,
        time.monotonic() - start,
    )


def _numbered(readers: Sequence[Reader], reading: Reading, problems: list[Problem]) -> Iterator[Numbered]:
    """Every record of every source; a source that breaks off is a problem, and what follows it is read on."""
    for place, reader in enumerate(readers):
        number = 0
        try:
            for number, raw in enumerate(reading.records(place), 1):
                yield place, number, raw
        except DataError as error:
            problems.append(Problem(place, number + 1, reader.files[0], "file", printable(str(error))))


def _strict(encoder: Encoder | None) -> Encoder | None:
    """The encoder with a policy that reports what is too long."""
    if encoder is not None and encoder.too_long != "error":
        raise ValueError("the doctor's encoder must have too_long error")
    return encoder


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


def _hash_chunk(examiner: Examiner, chunk: Sequence[tuple[int, str]]) -> list[bytes]:
    settings = examiner.settings
    return [content_key(Image(path), settings.readers[source].images, settings.limits) for source, path in chunk]


def _exact(
    usable: Sequence[RecordFacts], splits: Sequence[str], settings: Settings, workers: int, stream: TextIO | None
) -> list[RecordFacts]:
    """The records with exact picture keys wherever equal ends leave it open whether two are the same."""
    doubtful = _doubtful(usable, splits)
    if not doubtful:
        return list(usable)
    keys: dict[tuple[int, str], bytes] = {}
    with Progress("comparing pictures", len(doubtful), stream=stream) as progress:
        chunks = _shared(_hash_chunk, doubtful, CHUNK_PICTURES, settings, workers)
        rest = iter(doubtful)
        for hashes in chunks:
            keys.update(zip(islice(rest, len(hashes)), hashes, strict=True))
            progress.advance(len(hashes))

    def settled(source: int, picture: PictureFacts) -> PictureFacts:
        key = None if picture.path is None else keys.get((source, picture.path))
        return picture if key is None else replace(picture, key=key, exact=True)

    return [replace(r, pictures=tuple(settled(r.source, p) for p in r.pictures)) for r in usable]


def _doubtful(usable: Sequence[RecordFacts], splits: Sequence[str]) -> list[tuple[int, str]]:
    """(source, path) of pictures whose ends are those of another picture that matters.

    That is one of a record with the same words, or one on the other side of train and validation.
    """
    groups: dict[tuple[bytes, tuple[bytes, ...]], list[RecordFacts]] = defaultdict(list)
    sides: dict[bytes, set[str]] = defaultdict(set)
    for record in usable:
        groups[_identity(record)].append(record)
        for picture in record.pictures:
            sides[picture.key].add(splits[record.source])
    again = {key for group, records in groups.items() if len(records) > 1 for key in group[1]}
    wanted = again | {key for key, split in sides.items() if len(split) > 1}
    found = {
        (record.source, picture.path)
        for record in usable
        for picture in record.pictures
        if picture.key in wanted and not picture.exact and picture.path is not None
    }
    return sorted(found)


def _identity(record: RecordFacts) -> tuple[bytes, tuple[bytes, ...]]:
    return record.key, tuple(picture.key for picture in record.pictures)


def _repeats(usable: Sequence[RecordFacts], splits: Sequence[str]) -> list[Problem]:
    """Duplicates within a split, and what training shares with validation."""
    first: dict[tuple[str, bytes, tuple[bytes, ...]], RecordFacts] = {}
    held_out: dict[bytes, RecordFacts] = {}
    problems: list[Problem] = []

    def report(record: RecordFacts, code: str, message: str) -> None:
        problems.append(Problem(record.source, record.number, record.where, code, message))

    for record in usable:
        split = splits[record.source]
        known = first.setdefault((split, *_identity(record)), record)
        if known is not record:
            report(record, "duplicate", f"the same as {known.where}")
        if split == "validation":
            for picture in record.pictures:
                held_out.setdefault(picture.key, record)
    for record in usable:
        if splits[record.source] != "train":
            continue
        if (twin := first.get(("validation", *_identity(record)))) is not None:
            report(record, "leak", f"the same as {twin.where}, which is validation data")
            continue
        for picture in record.pictures:
            if (other := held_out.get(picture.key)) is not None:
                report(record, "leaked_picture", f"{picture.name} is a picture of {other.where}")
    return problems
