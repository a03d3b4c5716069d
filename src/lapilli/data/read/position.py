"""How far the reading of sources is, in bytes of their files: what gives work on streams a bar with an end.

How many records a JSON file or a tar shard holds is known only at its end; how many bytes it has is known before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import TYPE_CHECKING

from lapilli.base.errors import DataError

if TYPE_CHECKING:
    from lapilli.data.read.record import RawRecord, Reader


class Spot:
    """Where one reader is in its files: `bytes` of `total`. Moved by `Reader.records`; of no files, it stays at 0."""

    def __init__(self, files: Sequence[str] = ()) -> None:
        self._starts = [0, *accumulate(map(_size, files))]
        self.bytes = 0

    @property
    def total(self) -> int:
        return self._starts[-1]

    def at(self, file: int, share: float) -> None:
        """The part `share` (0 to 1) of file number `file` has been read."""
        if file + 1 < len(self._starts):
            start, end = self._starts[file : file + 2]
            self.bytes = max(self.bytes, start + round(min(share, 1.0) * (end - start)))

    def reach(self, file: int, offset: int) -> None:
        """Everything before byte `offset` of file number `file` has been read."""
        if file + 1 < len(self._starts):
            start, end = self._starts[file : file + 2]
            self.bytes = min(start + offset, end)

    def end(self) -> int:
        """Go to the end; returns the bytes that were left."""
        left, self.bytes = self.total - self.bytes, self.total
        return left


class Reading:
    """The records of some readers, source by source, and how many bytes of their files lie behind them."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self._readers = tuple(readers)
        self._spots = tuple(Spot(reader.files) for reader in readers)
        self._given = 0
        self._passed = 0
        """Bytes of records that nobody asked for; they count neither as done nor as to be done."""

    def records(self, place: int, start: int = 0, stop: int | None = None) -> Iterator[RawRecord]:
        """Records [start, stop) of reader number `place`. Raises DataError as its `records` does."""
        spot = self._spots[place]
        records = self._readers[place].records(spot)
        try:
            if start:
                for _ in islice(records, start):
                    pass
                self._passed += spot.bytes
            for raw in islice(records, None if stop is None else max(0, stop - start)):
                self._given += 1
                yield raw
        except DataError:
            self._passed += spot.end()
            raise
        self._passed += spot.end()

    @property
    def total(self) -> int:
        """Bytes to be read."""
        return sum(spot.total for spot in self._spots) - self._passed

    def done(self, records: int) -> int:
        """Bytes of the first `records` records: those that were read, less what waits to be worked on."""
        behind = sum(spot.bytes for spot in self._spots) - self._passed
        waiting = max(0, self._given - records) * behind / self._given if self._given else 0.0
        return min(max(0, behind - round(waiting)), self.total)


def _size(file: str) -> int:
    try:
        return os.path.getsize(file)
    except OSError:
        return 0  # reading it will say why
