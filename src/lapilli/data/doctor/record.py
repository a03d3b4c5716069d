"""One record at a time: parsed, its pictures opened, its conversation counted; all that is wrong with it is found.

This is what worker processes run. Rows of prepared folders come the same way, but are read as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from lapilli.base.errors import DataError
from lapilli.data.doctor.picture import PictureFacts, look, name_of
from lapilli.data.doctor.reasons import Stage, reason_of
from lapilli.data.doctor.rows import RowReader, row_key
from lapilli.data.image import ImageLimits, ImageSpec
from lapilli.data.read.record import Placement, RawRecord, Reader, printable
from lapilli.data.sample import IMAGE_PLACEHOLDER, Image, Sample, Text

if TYPE_CHECKING:
    from lapilli.data.encode import Encoder

Decode = Literal["header", "full"]

KNOWN_PICTURES = 50_000
"""Pictures whose facts a worker remembers, since data sets ask several questions about one picture."""

Numbered = tuple[int, int, RawRecord]
"""(source, number of the record in it from 1, record)"""


@dataclass(frozen=True)
class Settings:
    """What every record is examined with: a reader and an encoder for each source.

    Encoders and `spec` are None where no model was named.
    """

    readers: Sequence[Reader]
    encoders: Sequence[Encoder | None]
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
    file: str
    """The file that `where` begins with, if it does."""
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


@dataclass
class _One:
    """A record under examination, and where what is found goes."""

    source: int
    number: int
    raw: RawRecord
    found: Found
    where: str = field(init=False)

    def __post_init__(self) -> None:
        self.where = self.raw.where

    def note(self, code: str, message: str) -> None:
        self.found.problems.append(Problem(self.source, self.number, self.where, code, printable(message)))

    def report(self, stage: Stage, error: DataError | str) -> None:
        message = str(error).removeprefix(f"{self.where}: ")
        self.note(reason_of(stage, message), message)

    def use(
        self, where: str, key: bytes, words: int, length: int, supervised: int, pictures: tuple[PictureFacts, ...]
    ) -> None:
        facts = RecordFacts(self.source, self.number, where, self.raw.file, key, words, length, supervised, pictures)
        self.found.usable.append(facts)


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
        reader = self.settings.readers[source]
        one = _One(source, number, raw, found)
        if isinstance(reader, RowReader):
            self._row(reader, one)
            return
        try:
            sample = reader.parse(raw, self.settings.placement)
        except DataError as error:
            one.report("record", error)
            return
        pictures = self._pictures_of(one, sample.images)
        encoder = self.settings.encoders[source]
        length = supervised = -1
        try:
            if not any(m.part_weight(p) for m in sample.messages for p in m.parts if isinstance(p, Text)):
                raise DataError("nothing to learn from this record: no answer is trained on; leave it out")
            if encoder is not None and pictures is not None:
                encoded = encoder.encode_noted(sample, [(p.width, p.height) for p in pictures])
                for left_out in encoded.notes:
                    one.note("dropped" if left_out.startswith("dropped: ") else "cut", left_out)
                if encoded.example is None:
                    return
                length, supervised = encoded.example.length, encoded.example.supervised
        except DataError as error:
            one.report("encode", error)
            return
        if pictures is not None:
            words = sum(len(p.text.split()) for m in sample.messages for p in m.parts if isinstance(p, Text))
            one.use(raw.where, _key(sample), words, length, supervised, pictures)

    def _row(self, reader: RowReader, one: _One) -> None:
        """One row of a prepared folder."""
        place = int(one.raw.value)
        one.where = f"{one.raw.file}: row {place + 1}"
        try:
            example = reader.store.example(place)
        except DataError as error:
            one.report("row", error)
            return
        if example.where and example.where != one.where:
            one.where = f"{one.where} ({example.where})"
        wrong = list(reader.wrong(example, place))
        for code, message in wrong:
            one.note(code, message)
        pictures = self._pictures_of(one, [slot.image for slot in example.images])
        for slot, picture in zip(example.images, pictures or (), strict=pictures is not None):
            if (slot.width, slot.height) not in ((0, 0), (picture.width, picture.height)):
                now, then = f"{picture.width} x {picture.height}", f"{slot.width} x {slot.height}"
                wrong.append(("changed", f"{picture.name} is {now} pixels, but was {then} when it was prepared"))
                one.note(*wrong[-1])
        if pictures is not None and not wrong:
            one.use(one.where, row_key(example), -1, example.length, example.supervised, pictures)

    def _pictures_of(self, one: _One, images: Sequence[Image]) -> tuple[PictureFacts, ...] | None:
        """The facts of all pictures of a record; None if one of them can't be used, which is noted."""
        seen = [self._picture(one.source, image) for image in images]
        for picture in seen:
            if isinstance(picture, str):
                one.report("picture", picture)
            elif picture.animated:
                one.note("animated", picture.name)
        facts = tuple(picture for picture in seen if isinstance(picture, PictureFacts))
        return facts if len(facts) == len(seen) else None

    def _picture(self, source: int, image: Image) -> PictureFacts | str:
        """A picture's facts, or what is wrong with it, without the record's name."""
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
