"""Every problem that was found, on disk where there are many, and what is counted of them in memory.

Data may be bad in every record, and a report that is a page long must not hold a million messages. Each reason has a
temporary file of its own, in the order of the data; small ones never leave memory.
"""

from __future__ import annotations

import heapq
import json
import tempfile
import weakref
from collections.abc import Iterator
from itertools import islice

from lapilli.data.doctor.reasons import REASONS
from lapilli.data.doctor.record import Problem

IN_MEMORY_BYTES = 1 << 20
"""What a reason's problems take before they go to disk."""
_READ_BYTES = 1 << 16


class Findings:
    """Problems by reason. Those of one reason are added in the order of the data."""

    def __init__(self) -> None:
        self._files: dict[str, tempfile.SpooledTemporaryFile[bytes]] = {}
        self._last: dict[str, tuple[int, int]] = {}
        self._last_bad: tuple[int, int] | None = None
        self._problems: dict[str, int] = {}
        self._records: dict[str, int] = {}
        self.bad = 0
        """Records that must not be trained on."""
        weakref.finalize(self, _close, self._files)

    def __len__(self) -> int:
        return sum(self._problems.values())

    def add(self, problem: Problem) -> None:
        """Add one. All problems of one record that make it bad are added one after the other."""
        code, record = problem.code, (problem.source, problem.number)
        file = self._files.get(code)
        if file is None:
            file = self._files[code] = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115
        file.seek(0, 2)
        line = [problem.source, problem.number, problem.where, code, problem.message]
        file.write(json.dumps(line).encode() + b"\n")
        self._problems[code] = self._problems.get(code, 0) + 1
        if self._last.get(code) != record:
            self._last[code] = record
            self._records[code] = self._records.get(code, 0) + 1
        if REASONS[code].level == "bad" and self._last_bad != record:
            self._last_bad = record
            self.bad += 1

    @property
    def codes(self) -> list[str]:
        """Reasons that have problems, in the order of REASONS."""
        return [code for code in REASONS if code in self._files]

    def problems(self, code: str) -> int:
        return self._problems.get(code, 0)

    def records(self, code: str) -> int:
        """How many records have at least one problem of this kind."""
        return self._records.get(code, 0)

    def of(self, code: str) -> Iterator[Problem]:
        """All problems of one reason, in the order of the data."""
        file, place = self._files.get(code), 0
        while file is not None:
            file.seek(place)
            lines = file.readlines(_READ_BYTES)
            place = file.tell()
            if not lines:
                return
            for line in lines:
                yield Problem(*json.loads(line))

    def first(self, code: str, count: int) -> list[Problem]:
        """The first few problems of one reason."""
        return list(islice(self.of(code), count))

    def in_order(self) -> Iterator[Problem]:
        """All problems of all reasons, record by record in the order of the data."""
        return heapq.merge(*map(self.of, self.codes), key=lambda problem: (problem.source, problem.number))


def _close(files: dict[str, tempfile.SpooledTemporaryFile[bytes]]) -> None:
    for file in files.values():
        file.close()
