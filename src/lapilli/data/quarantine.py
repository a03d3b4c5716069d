"""Records that turn out bad: how many a run may go on without, and which they were.

Without a policy the first bad record stops everything. With one, a record that can't be used is left out where it
stands: nothing moves up and nothing replaces it, so plan and order stay what they were. The list is part of a run's
state, so that a resumed run leaves out the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lapilli.base.errors import DataError

SHOWN = 3
"""Records that the error at the ceiling spells out; the run folder lists all of them."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A Sample, by its number in the corpus, that could not be read when its turn came."""

    sample: int
    reason: str
    """Names file and record."""


@dataclass
class Quarantine:
    """The bad records of a run over `samples` Samples, which may be at most the part `max_ratio` of them."""

    samples: int
    max_ratio: float
    found: dict[int, BadRecord] = field(default_factory=dict)

    @property
    def ceiling(self) -> int:
        return int(self.samples * self.max_ratio)

    def add(self, bad: Iterable[BadRecord]) -> list[BadRecord]:
        """Take in what was found and return what is new of it. Raises DataError beyond the ceiling."""
        new = list({one.sample: one for one in bad if one.sample not in self.found}.values())
        self.found.update((one.sample, one) for one in new)
        if len(self.found) > self.ceiling:
            raise DataError(too_many([one.reason for one in self.found.values()], self.samples, self.max_ratio))
        return new


def too_many(reasons: list[str], records: int, max_ratio: float) -> str:
    """Word the error of a run, or a check, that found more bad records than its policy allows."""
    last = "\n".join(f"  {reason}" for reason in reasons[-SHOWN:])
    return (
        f"{len(reasons):,} of {records:,} records are bad, more than data.max_bad_ratio {max_ratio:g} allows "
        f"({int(records * max_ratio):,}); the last ones:\n{last}\n"
        "mend the data (`lapilli data check` lists everything), or raise data.max_bad_ratio"
    )
