"""Which of the conversation formats a decoded record has, by its fields; the same for every kind of file."""

from __future__ import annotations

from typing import Any

from lapilli.base.errors import DataError
from lapilli.data.read import llava, openai, pairs, sda
from lapilli.data.read.record import Placement, RawRecord, kind, printable
from lapilli.data.sample import Sample

ACCEPTED = (
    "`conversations`, `messages`, a semantic data array, a picture with its `caption`, or `question` and `answer`"
)


def shape_of(value: Any) -> str | None:
    """`llava`, `openai`, `sda` or `pairs`; None if the record has no such fields."""
    if isinstance(value, dict):
        if value.get("conversations") is not None:
            return "llava"
        if value.get("messages") is not None:
            return "openai"
        if sda.find(value) is not None:
            return "sda"
        return "pairs" if pairs.fits(value) else None
    return "sda" if sda.find(value) is not None else None


def parse(record: RawRecord, placement: Placement = "keep") -> Sample:
    """One record of any format as a Sample. Raises DataError with file, record, field and what to do."""
    if record.problem is not None:
        raise DataError(f"{record.where}: {record.problem}")
    shape = shape_of(record.value)
    if shape == "llava":
        return llava.parse(record, placement)
    if shape == "openai":
        return openai.parse(record, placement)
    if shape == "sda":
        return sda.parse(record, placement)
    if shape == "pairs":
        return pairs.parse(record, placement)
    if not isinstance(record.value, dict):
        raise DataError(f"{record.where}: a record must be an object with {ACCEPTED}, not {kind(record.value)}")
    fields = ", ".join(printable(str(key)) for key in list(record.value)[:10]) or "nothing"
    raise DataError(f"{record.where}: `conversations` is missing: the record has {fields}, but needs {ACCEPTED}")
