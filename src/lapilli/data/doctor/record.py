"""One record at a time: parsed, its pictures opened, its conversation counted; all that is wrong with it is found.

This is what worker processes run, so what it returns is small: columns of numbers, and words only for problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from lapilli.base.errors import DataError
from lapilli.data.doctor.picture import PictureFacts, look, name_of
from lapilli.data.doctor.reasons import Stage, reason_of
from lapilli.data.image import ImageLimits, ImageSpec
from lapilli.data.read.record import Placement, RawRecord, Reader, printable
from lapilli.data.sample import IMAGE_PLACEHOLDER, Sample, Text

if TYPE_CHECKING:
    from lapilli.data.encode import Encoder

Decode = Literal["header", "full"]

KNOWN_PICTURES = 50_000
"""Pictures whose facts a worker remembers, since data sets ask several questions about one picture."""

Numbered = tuple[int, int, RawRecord]
"""(source, number of the record in it from 1, record)"""


@dataclass(frozen=True)
class Settings:
    """What every record is examined with. `encoder` and `spec` are None where no model was named."""

    readers: Sequence[Reader]
    encoder: Encoder | None
    spec: ImageSpec | None
    placement: Placement
    limits: ImageLimits
    decode: Decode


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about one record; `code` is a key of REASONS, `message` is without the record's name."""

    source: int
    number: int
    where: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class RecordFacts:
    """A usable record. `length` and `supervised` are in tokens, -1 without a model; `key` is of its words alone."""

    source: int
    number: int
    where: str
    key: bytes
    words: int
    length: int
    supervised: int
    pictures: tuple[PictureFacts, ...]


@dataclass
class Found:
    """What some records gave; `counts` is how many records each source had."""

    counts: dict[int, int] = field(default_factory=dict)
    usable: list[RecordFacts] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


class Examiner:
    """Examines records with one set of settings and remembers pictures it has seen. One per process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._pictures: dict[tuple[int, str], PictureFacts | str] = {}

    def chunk(self, records: Sequence[Numbered]) -> Found:
        """Examine some records. Never raises DataError: that is a finding."""
        found = Found()
        for source, number, raw in records:
            found.counts[source] = found.counts.get(source, 0) + 1
            self._record(source, number, raw, found)
        return found

    def _record(self, source: int, number: int, raw: RawRecord, found: Found) -> None:
        where = raw.where

        def note(code: str, message: str) -> None:
            found.problems.append(Problem(source, number, where, code, printable(message)))

        def report(stage: Stage, error: DataError | str) -> None:
            message = str(error).removeprefix(f"{where}: ")
            note(reason_of(stage, message), message)

        try:
            sample = self.settings.readers[source].parse(raw, self.settings.placement)
        except DataError as error:
            report("record", error)
            return
        seen = [self._picture(source, place, sample) for place in range(len(sample.images))]
        facts = tuple(picture for picture in seen if isinstance(picture, PictureFacts))
        for picture in seen:
            if isinstance(picture, str):
                report("picture", picture)
            elif picture.animated:
                note("animated", picture.name)
        length = supervised = -1
        try:
            if not any(m.part_weight(p) for m in sample.messages for p in m.parts if isinstance(p, Text)):
                raise DataError("nothing to learn from this record: no answer is trained on; leave it out")
            if self.settings.encoder is not None and len(facts) == len(seen):
                encoded = self.settings.encoder.encode_noted(sample, [(f.width, f.height) for f in facts])
                for left_out in encoded.notes:
                    note("cut", left_out)
                assert encoded.example is not None  # the doctor's encoder refuses what is too long
                length, supervised = encoded.example.length, encoded.example.supervised
        except DataError as error:
            report("encode", error)
            return
        if len(facts) == len(seen):
            words = sum(len(p.text.split()) for m in sample.messages for p in m.parts if isinstance(p, Text))
            found.usable.append(RecordFacts(source, number, where, _key(sample), words, length, supervised, facts))

    def _picture(self, source: int, place: int, sample: Sample) -> PictureFacts | str:
        """A picture's facts, or what is wrong with it, without the record's name."""
        image = sample.images[place]
        known = None if image.path is None else self._pictures.get((source, image.path))
        if known is not None:
            return known
        facts: PictureFacts | str
        try:
            root = self.settings.readers[source].images
            facts = look(image, root, self.settings.limits, whole=self.settings.decode == "full")
            if self.settings.spec is not None:
                self.settings.spec.check_size(facts.width, facts.height)
        except DataError as error:
            message = str(error)
            facts = message if message.startswith("image") else f"{name_of(image.path)}: {message}"
        if image.path is not None:
            if len(self._pictures) >= KNOWN_PICTURES:
                self._pictures.clear()
            self._pictures[source, image.path] = facts
        return facts


def _key(sample: Sample) -> bytes:
    """A hash of who says what, with the places of pictures but not the pictures."""
    hashed = blake2b(digest_size=16)
    for message in sample.messages:
        hashed.update(f"\0{message.role}".encode())
        for part in message.parts:
            weight = f"{message.part_weight(part)}" if isinstance(part, Text) else ""
            text = part.text if isinstance(part, Text) else IMAGE_PLACEHOLDER
            hashed.update(f"\1{weight}\2{text}".encode("utf-8", "surrogatepass"))
    return hashed.digest()
