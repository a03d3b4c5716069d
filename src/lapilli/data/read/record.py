"""What every format gives: records as the source has them, and the door that they come through.

Reading is two steps, so that one bad record neither hides the others nor stops the listing: `Reader.records` goes
through the source, `Reader.parse` turns one record into a Sample or says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lapilli.data.sample import Sample

if TYPE_CHECKING:
    from lapilli.data.read.position import Spot

Placement = Literal["keep", "front"]
"""Where pictures stand in their turns: as written, or LLaVA's rule (first, a line break after each)."""


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record as the source has it. `number` counts from 1; `problem` is set where it can't even be decoded."""

    file: str
    number: int
    value: Any
    problem: str | None = None

    @property
    def where(self) -> str:
        """File and record for messages, with the record's own id where it has one."""
        name = self.value.get("id") if isinstance(self.value, dict) else None
        if not isinstance(name, str | int):
            return f"{self.file}: record {self.number}"
        return f"{self.file}: record {self.number} (id {printable(str(name))})"


class Reader(Protocol):
    """One data source, opened. Cheap to copy to worker processes; nothing is held open between calls."""

    @property
    def format(self) -> str:
        """Name of the format, for messages and reports."""
        ...

    @property
    def files(self) -> list[str]:
        """The files whose content decides the data, in reading order."""
        ...

    @property
    def images(self) -> str | None:
        """What picture paths are relative to: a folder or an archive."""
        ...

    def records(self, spot: Spot | None = None) -> Iterator[RawRecord]:
        """Every record, in order, unchecked and one at a time; `spot` goes along.

        Raises DataError if a file as a whole can't be read.
        """
        ...

    def parse(self, raw: RawRecord, placement: Placement = "keep") -> Sample:
        """One record as a Sample. Raises DataError with file, record, field and what to do."""
        ...


def printable(text: str) -> str:
    """The text without what a terminal or a UTF-8 file can't take (lone surrogates, control characters)."""
    if text.isprintable():
        return text
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def kind(value: Any) -> str:
    """What a decoded value is, in the words of messages."""
    names = {
        bool: "true/false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        bytes: "bytes",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
