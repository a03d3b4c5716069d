"""What is good, written anew; what is not, written aside with its reasons.

The clean data is LLaVA JSON, one file per source in the order of the original. Pictures stay where they are, except
those that stand inside their records, which become files. Nothing is repaired by guessing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import IO, Any, TextIO

import PIL.Image

from lapilli.base.atomic import atomic_folder
from lapilli.base.errors import DataError
from lapilli.base.progress import Progress
from lapilli.data.doctor.diagnosis import Diagnosis
from lapilli.data.doctor.reasons import REASONS
from lapilli.data.doctor.record import Problem
from lapilli.data.read import llava
from lapilli.data.read.open import open_source
from lapilli.data.read.record import Placement, RawRecord
from lapilli.data.sample import IMAGE_PLACEHOLDER, Image, Sample, Text
from lapilli.recipe.schema import Source

QUARANTINE = "quarantine.jsonl"
PICTURES = "images"
ALLOWED = ({0}, {1})
"""Weights that an answer may have in LLaVA's files."""
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


@dataclass(frozen=True)
class CleanFile:
    """One file of clean data, the root that its picture paths are relative to, and how many records it holds."""

    path: str
    images: str | None
    records: int


@dataclass(frozen=True)
class Fixed:
    """What was written, one file per source, and how many records stand aside."""

    files: tuple[CleanFile, ...]
    quarantined: int


def write_clean(
    diagnosis: Diagnosis,
    sources: Sequence[Source],
    out: str | Path,
    *,
    placement: Placement = "keep",
    keep_duplicates: bool = False,
    stream: TextIO | None = None,
) -> Fixed:
    """Write the good records of `sources`, which `diagnosis` is about, into the new folder `out`.

    Raises RunError if `out` exists, DataError if a source can't be read again.
    """
    aside = _Aside(
        problem
        for problem in diagnosis.findings.in_order()
        if REASONS[problem.code].level == "bad" or (problem.code == "duplicate" and not keep_duplicates)
    )
    names = _names(sources)
    with (
        atomic_folder(out) as folder,
        open(folder / QUARANTINE, "w", encoding="utf-8") as quarantine,
        Progress("writing clean data", diagnosis.records, stream=stream) as progress,
    ):
        files, quarantined = [], 0
        for place, (source, name) in enumerate(zip(sources, names, strict=True)):
            writer = _Writer(folder, name, place, aside, quarantine)
            writer.copy(source, placement, progress)
            quarantined += writer.quarantined
            images = str(Path(out) / PICTURES / name) if writer.pictures_inside else open_source(source).images
            files.append(CleanFile(str(Path(out) / f"{name}.json"), images, writer.written))
    return Fixed(tuple(files), quarantined)


class _Aside:
    """The problems of records that are set aside, taken in the order of the data."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self._records = groupby(problems, key=lambda problem: (problem.source, problem.number))
        self._next: tuple[tuple[int, int], list[Problem]] | None = None
        self._advance()

    def take(self, source: int, number: int) -> list[Problem]:
        """The problems of this record; none if it is good."""
        if self._next is None or self._next[0] != (source, number):
            return []
        problems = self._next[1]
        self._advance()
        return problems

    def _advance(self) -> None:
        record = next(self._records, None)
        self._next = None if record is None else (record[0], list(record[1]))


class _Writer:
    """Writes the clean file of one source, the `place`th."""

    def __init__(self, folder: Path, name: str, place: int, aside: _Aside, quarantine: IO[str]) -> None:
        self.folder, self.name, self.place, self.aside, self.quarantine = folder, name, place, aside, quarantine
        self.written = 0
        self.quarantined = 0
        self.pictures_inside: bool | None = None
        """Whether this source's pictures stand in its records; None before the first."""

    def copy(self, source: Source, placement: Placement, progress: Progress) -> None:
        reader, number = open_source(source), 0
        self.placement: Placement = placement
        with open(self.folder / f"{self.name}.json", "w", encoding="utf-8") as file:
            file.write("[")
            try:
                for number, raw in enumerate(reader.records(), 1):
                    problems = self.aside.take(self.place, number)
                    if problems:
                        self._put_aside(raw, problems)
                    else:
                        self._record(number, raw, file, reader.parse(raw, placement))
                    progress.advance()
            except DataError as error:
                problems = self.aside.take(self.place, number + 1)
                if not problems:
                    raise DataError(f"{error}; it was readable a moment ago: check again") from error
                self._put_aside(None, problems)
            file.write("\n]\n")

    def _record(self, number: int, raw: RawRecord, file: IO[str], sample: Sample) -> None:
        try:
            text = _dumps(self._value(raw, sample))
        except DataError as error:
            self._put_aside(raw, [Problem(self.place, number, raw.where, "record", str(error))])
            return
        file.write((",\n" if self.written else "\n") + text)
        self.written += 1

    def _put_aside(self, raw: RawRecord | None, problems: Sequence[Problem]) -> None:
        entry = {
            "where": problems[0].where,
            "reasons": [{"code": p.code, "title": REASONS[p.code].title, "message": p.message} for p in problems],
            "record": None if raw is None else raw.value,
        }
        self.quarantine.write(_dumps(entry) + "\n")
        self.quarantined += 1

    def _value(self, raw: RawRecord, sample: Sample) -> Any:
        """The record as LLaVA has it: as it stands where it says the same, so that its other fields are kept."""
        try:
            if llava.parse(raw, self.placement) == sample:
                return raw.value
        except DataError:
            pass  # another format: written from what was read of it
        turns = []
        for message in sample.messages:
            texts = [part for part in message.parts if isinstance(part, Text)]
            if any(IMAGE_PLACEHOLDER in part.text for part in texts):
                raise DataError(f"its text contains {IMAGE_PLACEHOLDER} itself, which LLaVA's files can't hold")
            weights = {message.part_weight(part) for part in texts}
            if weights not in (ALLOWED if message.role == "assistant" else ({0}, set())):
                raise DataError(
                    "it trains on parts of turns or on questions, or by halves; LLaVA's files can't hold it"
                )
            turn: dict[str, Any] = {"from": SPEAKERS[message.role], "value": message.text}
            turns.append(turn | {"weight": 0} if message.role == "assistant" and weights == {0} else turn)
        paths = [self._path(image) for image in sample.images]
        held = {"image": paths[0] if len(paths) == 1 else paths} if paths else {}
        return {"id": sample.id, **held, "conversations": turns}

    def _path(self, image: Image) -> str:
        inside = image.path is None
        if self.pictures_inside is None:
            self.pictures_inside = inside
        if self.pictures_inside is not inside:
            raise DataError("some pictures of its source are files and some stand in records; LLaVA's have one root")
        if image.path is not None:
            return image.path
        assert image.data is not None  # a record without either is never usable
        kind = PIL.Image.open(io.BytesIO(image.data)).format or "bin"
        name = f"{blake2b(image.data, digest_size=16).hexdigest()}.{kind.lower()}"
        place = self.folder / PICTURES / self.name
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(image.data)
        return name


def _dumps(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=_described)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can express
        return json.dumps(value, default=_described)
    return text


def _described(value: Any) -> str:
    return f"({len(value):,} bytes)" if isinstance(value, bytes) else str(value)


def _names(sources: Sequence[Source]) -> list[str]:
    """A file name for each source: its own, with a number where that is taken."""
    names: list[str] = []
    for source in sources:
        stem = Path(source.path).stem or "data"
        taken = sum(name == stem or name.rpartition("-")[0] == stem for name in names)
        names.append(f"{stem}-{taken + 1}" if taken else stem)
    return names
