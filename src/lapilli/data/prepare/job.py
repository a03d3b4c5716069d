"""Running a preparation: records dealt out to processes, shards collected, and what a kill left taken up again.

Shard k is records [k * n, (k + 1) * n) of all sources in order. A finished shard has a note beside it until the whole
folder is done; then the notes become `data_params.json`, whose presence says that the folder is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from lapilli.base.atomic import remove_leftovers, write_json
from lapilli.base.errors import DataError
from lapilli.base.progress import Progress
from lapilli.base.version import VERSION
from lapilli.data.encode import Encoder
from lapilli.data.image import ImageLimits, ImageSpec
from lapilli.data.prepare import cerebras, params
from lapilli.data.prepare.engine import Engine, make_parts
from lapilli.data.prepare.params import Statistics
from lapilli.data.prepare.pictures import PictureRoot
from lapilli.data.prepare.work import UNFINISHED, Job, Layout, Part, whole_file
from lapilli.data.read.open import open_source
from lapilli.data.read.position import Reading
from lapilli.data.read.record import Placement, RawRecord, Reader
from lapilli.recipe.schema import Source

QUARANTINE = "quarantine.jsonl"
SHARD_RECORDS = 4096
EMBEDDED_SHARD_RECORDS = 512
"""With pictures inside, a shard of 4,096 records would be hundreds of megabytes."""
SHOWN = 3
"""Records that the error spells out where all are bad."""


@dataclass(frozen=True)
class Outcome:
    """A finished folder. `kept_shards` were there already; `params` is what `data_params.json` holds."""

    out: Path
    statistics: Statistics
    shards: int
    kept_shards: int
    params: dict[str, Any]


def prepare(
    sources: Sequence[Source],
    encoder: Encoder,
    spec: ImageSpec,
    out: str | Path,
    *,
    placement: Placement = "keep",
    limits: ImageLimits | None = None,
    layout: Layout = "ours",
    max_images: int = 1,
    embed_images: bool = False,
    shard_records: int | None = None,
    engine: Engine = "local",
    processes: int = 1,
    address: str | None = None,
    stream: TextIO | None = None,
) -> Outcome:
    """Tokenise every record of `sources` once and write the folder `out`; what a kill left there is gone on with.

    `max_images` and the encoder's `max_length` are the fixed sizes of the cerebras layout. Records that can't be used
    go to `quarantine.jsonl`, each with its reason. `engine`, `processes` and `address` say who does the work
    (see `make_parts`) and change nothing in the files. Raises DataError if a source can't be read, nothing is left, or
    `out` holds something else.
    """
    out, embedded = Path(out), SHARD_RECORDS if not embed_images else EMBEDDED_SHARD_RECORDS
    shard_records = embedded if shard_records is None else shard_records
    readers = tuple(_reader(source) for source in sources)
    shape = _shape(encoder, max_images, embed_images) if layout == "cerebras" else None
    pictures = PictureRoot.of([reader.images for reader in readers], embed_images, plain_files=shape is not None)
    settings = {
        "lapilli": VERSION,
        "layout": layout,
        "sources": [_provenance(reader) for reader in readers],
        "images": pictures.root,
        "images_inside": embed_images,
        "placement": placement,
        "max_images": max_images if shape else None,
        "shard_records": shard_records,
    }
    job = Job(
        readers, encoder, spec, placement, limits or ImageLimits(), out, layout, shape, pictures, settings
    )  # fmt: skip
    with _claimed(out, {**settings, "facts": job.facts.as_json()}):
        reading = Reading(readers)
        made = make_parts(job, _chunks(reading, len(readers), shard_records), engine, processes, address)
        parts, kept = _make_all(made, reading, stream)
        return _finish(job, parts, kept)


def _reader(source: Source) -> Reader:
    for name, default in (("subset", None), ("template", None)):
        if getattr(source, name) != default:
            raise DataError(f"{source.path}: `{name}` belongs in the recipe that trains on the prepared data")
    return open_source(source)


def _shape(encoder: Encoder, max_images: int, embed_images: bool) -> cerebras.Shape:
    """The fixed sizes of the cerebras layout. Raises DataError for what it can't hold."""
    if embed_images:
        raise DataError("the cerebras layout holds picture paths only; leave out --embed-images")
    if encoder.max_length is None:
        raise DataError("every row of the cerebras layout has the same length: give --max-length")
    if encoder.layout is None or encoder.layout.mode == "anyres":
        raise DataError("the cerebras layout has a fixed number of places per picture; use image mode square or pad")
    tokenizer: Any = encoder.tokenizer
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_id is None:
        raise DataError("the cerebras layout pads, and the tokenizer has neither a pad token nor an end token")
    return cerebras.Shape(encoder.max_length, max_images, encoder.layout.tokens_per_tile, pad_id)


def _provenance(reader: Reader) -> dict[str, Any]:
    return {"format": reader.format, "images": reader.images, "files": [[f, _hash(f)] for f in reader.files]}


def _hash(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: can't read it ({error.strerror})") from error


@contextmanager
def _claimed(out: Path, wanted: Mapping[str, Any]) -> Iterator[None]:
    """Hold the folder for this preparation; what an earlier one left must be of the same settings."""
    done, work = out / params.FILE, out / UNFINISHED
    if done.is_file() and not work.is_dir():
        raise DataError(f"{out}: holds prepared data already; remove the folder or choose another --out")
    if out.is_dir() and not work.is_dir() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty; choose a new folder for --out")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: its workers do not hold it
        except OSError as error:
            raise DataError(f"{out}: another process is preparing data here") from error
        _same_settings(work / "job.json", wanted, out)
        remove_leftovers(out)
        remove_leftovers(work)
        yield
    shutil.rmtree(work, ignore_errors=True)


def _same_settings(file: Path, wanted: Mapping[str, Any], out: Path) -> None:
    """Write the settings down, or raise DataError with the differences from those that stand there."""
    wanted = json.loads(json.dumps(wanted))
    if not file.is_file():
        write_json(file, wanted)
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    differences = [
        f"{name} was {_short(before)}, is {_short(now)}"
        for name, before, now in _differences(found, wanted)
    ]  # fmt: skip
    if differences:
        raise DataError(
            f"{out}: holds an unfinished preparation with other settings: {'; '.join(differences)}. "
            "Give the same ones to go on with it, or remove the folder"
        )


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield name, found, wanted


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def _make_all(made: Iterator[tuple[Part, bool]], reading: Reading, stream: TextIO | None) -> tuple[list[Part], int]:
    """Every shard in order, and how many of them were there already."""
    parts: list[Part] = []
    kept = bad = 0
    with Progress("preparing data", reading=reading, stream=stream) as progress:
        for part, was_there in made:
            parts.append(replace(part, quarantine=()))  # its note has them, and they may be many
            kept += was_there
            bad += part.statistics.bad
            texts = [f"{len(parts):,} shards", f"{kept:,} were there" if kept else "", f"{bad:,} bad" if bad else ""]
            progress.advance(part.statistics.records, "  ".join(filter(None, texts)))
    return parts, kept


def _chunks(reading: Reading, readers: int, shard_records: int) -> Iterator[tuple[int, list[tuple[int, RawRecord]]]]:
    """The records of each shard, each with the number of its source, and the shard's number."""
    records = ((i, raw) for i in range(readers) for raw in reading.records(i))
    return enumerate(iter(lambda: list(islice(records, shard_records)), []))


def _left_out(job: Job, parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
    """What the notes of the shards say of records that are not in the data, in order."""
    for part in parts:
        if part.statistics.bad or part.statistics.dropped:
            noted = Part.load(job.out, part.number)
            if noted is None:
                raise DataError(f"{job.out}: the note of shard {part.number} was changed meanwhile; start again")
            yield from noted.quarantine


def _nothing_left(total: Statistics, entries: Iterable[Mapping[str, Any]]) -> str:
    lines = [f"nothing is left to prepare: {total.records:,} records"]
    lines += [f"  {count:,} x {kind}" for kind, count in total.reasons.most_common()]
    lines += [f"      {e['file']}: record {e['record']}: {e['reason']}" for e in islice(entries, SHOWN)]
    return "\n".join(lines)


def _finish(job: Job, parts: Sequence[Part], kept: int) -> Outcome:
    """Write the quarantine and the statistics: with these the folder is whole."""
    total = Statistics()
    for part in parts:
        total.merge(part.statistics)
    if not total.samples:
        message = _nothing_left(total, _left_out(job, parts))
        shutil.rmtree(job.out / UNFINISHED)  # the remedy is another command, which must not meet this one's remains
        job.out.rmdir()
        raise DataError(message)
    with whole_file(job.out / QUARANTINE) as path, open(path, "w", encoding="ascii") as stream:
        stream.writelines(json.dumps(entry, ensure_ascii=True) + "\n" for entry in _left_out(job, parts))
    shards = [{"file": part.file, "rows": part.rows, "bytes": part.bytes} for part in parts if part.file]
    padded = job.shape.length if job.shape else None
    made = params.data_params(total, job.facts, job.settings, job.encoder.tokenizer, shards, padded)
    write_json(job.out / params.FILE, made)
    return Outcome(job.out, total, len(parts), kept, made)
