"""What one worker does: a run of records in, one finished shard out.

A shard depends on its records and the settings alone, never on who makes it or when, so any number of processes write
the same bytes, and a shard that is there need not be made again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lapilli.base.atomic import write_json
from lapilli.base.errors import DataError
from lapilli.data.encode import Encoder
from lapilli.data.image import ImageLimits, ImageSpec, usable_size
from lapilli.data.prepare import cerebras, ours
from lapilli.data.prepare.batch import BatchEncoder
from lapilli.data.prepare.facts import Facts
from lapilli.data.prepare.params import Statistics
from lapilli.data.prepare.pictures import PictureRoot
from lapilli.data.prepare.rows import Rows
from lapilli.data.read.record import Placement, RawRecord, Reader
from lapilli.data.sample import Example, Sample, Text

Layout = Literal["ours", "cerebras"]
UNFINISHED = ".unfinished"
"""Folder that a preparation keeps in its output folder until it is done."""
BATCH_RECORDS = 256
"""Records that are tokenised with one call."""


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know. `settings` is what is written into the data about it."""

    readers: tuple[Reader, ...]
    encoder: Encoder
    spec: ImageSpec
    placement: Placement
    limits: ImageLimits
    out: Path
    layout: Layout
    shape: cerebras.Shape | None
    pictures: PictureRoot
    settings: dict[str, Any]

    @cached_property
    def batches(self) -> BatchEncoder:
        """The encoder of all shards that one worker makes: what it has learnt of words serves the next."""
        return BatchEncoder(self.encoder)

    @cached_property
    def facts(self) -> Facts:
        return Facts.of(self.encoder)


@dataclass(frozen=True)
class Part:
    """What is known of a finished shard; `file` is None where none of its records could be used."""

    number: int
    file: str | None
    rows: int
    bytes: int
    statistics: Statistics
    quarantine: tuple[dict[str, Any], ...]

    def save(self, out: Path) -> None:
        write_json(part_path(out, self.number), {**vars(self), "statistics": self.statistics.as_json()})

    @classmethod
    def load(cls, out: Path, number: int) -> Part | None:
        """The part with this number if it and its shard are there and whole."""
        try:
            value = json.loads(part_path(out, number).read_text(encoding="utf-8"))
            part = cls(
                **{
                    **value,
                    "statistics": Statistics.from_json(value["statistics"]),
                    "quarantine": tuple(value["quarantine"]),
                }
            )
            if part.file is not None and (out / part.file).stat().st_size != part.bytes:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return part


def part_path(out: Path, number: int) -> Path:
    return out / UNFINISHED / f"part-{number:05d}.json"


def make_shard(job: Job, number: int, records: Sequence[tuple[int, RawRecord]]) -> Part:
    """Encode these records, each with the number of its source, write their shard and say what came of them."""
    with _collector_paused():
        return _make_shard(job, number, records)


def _make_shard(job: Job, number: int, records: Sequence[tuple[int, RawRecord]]) -> Part:
    statistics = Statistics(records=len(records))
    quarantine: list[dict[str, Any]] = []
    examples: list[Example] = []
    encoder = job.batches
    for start in range(0, len(records), BATCH_RECORDS):
        batch = [(source, raw, _parsed(job, source, raw)) for source, raw in records[start : start + BATCH_RECORDS]]
        encoder.read_ahead(found for _, _, found in batch if isinstance(found, Sample))
        for source, raw, found in batch:
            made = found if isinstance(found, DataError) else _encoded(job, encoder, source, found, statistics)
            if isinstance(made, Example):
                assert isinstance(found, Sample)
                statistics.add(found)
                examples.append(made)
                continue
            reason = str(made).removeprefix(f"{raw.where}: ")
            bad = isinstance(made, DataError)
            statistics.left_out(reason, bad)
            quarantine.append(_entry(raw, reason, bad))
    rows = Rows(examples)
    statistics.add_rows(rows)
    file = _write(job, number, rows) if examples else None
    size = (job.out / file).stat().st_size if file else 0
    part = Part(number, file, len(examples), size, statistics, tuple(quarantine))
    part.save(job.out)
    return part


def _parsed(job: Job, source: int, raw: RawRecord) -> Sample | DataError:
    try:
        sample = job.readers[source].parse(raw, job.placement)
        for message in sample.messages:
            for part in message.parts:
                if isinstance(part, Text) and not part.text.isascii():
                    part.text.encode()
    except DataError as error:
        return error
    except UnicodeEncodeError:
        return DataError(f"{raw.where}: the text has half a character (a lone surrogate); write it again as UTF-8")
    return sample


def _encoded(
    job: Job, encoder: Encoder, source: int, sample: Sample, statistics: Statistics
) -> Example | DataError | str:
    """The Example of a Sample, or what is wrong with it, or why a policy leaves it out."""
    try:
        root = job.readers[source].images
        sizes = [usable_size(image, root, job.spec, job.limits, sample.where) for image in sample.images]
        encoded = encoder.encode_noted(sample, sizes)
        if encoded.example is None:
            return "; ".join(encoded.notes)
        example = encoded.example
        if example.images:
            held = [job.pictures.held(slot.image, source, sample.where, job.limits) for slot in example.images]
            slots = (replace(slot, image=image) for slot, image in zip(example.images, held, strict=True))
            example = replace(example, images=tuple(slots))
        if job.shape is not None:
            cerebras.refuse(example, job.shape)
    except DataError as error:
        return error
    statistics.notes.update(encoded.notes)
    return example


def _entry(raw: RawRecord, reason: str, bad: bool) -> dict[str, Any]:
    name = raw.value.get("id") if isinstance(raw.value, dict) else None
    name = name if isinstance(name, str | int) else None
    return {"file": raw.file, "record": raw.number, "id": name, "kind": "bad" if bad else "dropped", "reason": reason}


def _write(job: Job, number: int, rows: Rows) -> str:
    """Write the shard's file, and return its name."""
    if job.shape is None:
        name = f"shard-{number:05d}.h5"
        about = {**job.facts.as_json(), "provenance": _provenance(job), "n_examples": len(rows.examples)}
        with whole_file(job.out / name) as path:
            ours.write_shard(path, rows, about)
        return name
    name = f"output_chunk_0_{number:05d}.h5"
    with (
        whole_file(job.out / name) as path,
        whole_file((job.out / name).with_suffix(cerebras.ROWS)) as rows_path,
    ):
        cerebras.write_shard(path, rows_path, rows, job.shape)
    return name


def _provenance(job: Job) -> dict[str, Any]:
    """The settings as an attribute: a source of thousands of files, which has no room there, as one sum of all."""
    sources = [
        {
            **source,
            "files": len(source["files"]),
            "sha256": hashlib.sha256(json.dumps(source["files"]).encode()).hexdigest(),
        }
        for source in job.settings["sources"]
    ]
    return {**job.settings, "sources": sources}


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause Python's cycle collector, which takes a third of the time here and, among tuples of numbers, finds nothing.

    A shard is small, and what it leaves is collected after it.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write under; the file takes its own name when it is whole and durable."""
    aside = path.parent / f".{path.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        yield aside
        with open(aside, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
