"""The part of a source that a recipe asks for: `0:1000` by record number, `0.0-0.5` by share of the file.

Both are half-open, so neighbouring parts share no record and leave none out. Shares are kept as exact fractions: half
of a file and the other half are the whole file, whatever its length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_NUMBERS = re.compile(r"(\d*):(\d*)")
_SHARES = re.compile(r"(\d*\.?\d+)-(\d*\.?\d+)")
_HINT = 'give record numbers such as "0:1000" (the first thousand) or shares such as "0.0-0.5" (the first half)'


@dataclass(frozen=True)
class Subset:
    """A run of consecutive records. Bounds are record numbers from 0 (int) or shares of all records (Fraction).

    `stop` None is the end of the file.
    """

    start: int | Fraction
    stop: int | Fraction | None

    @property
    def needs_total(self) -> bool:
        """Whether the number of records must be known before the first one can be chosen."""
        return isinstance(self.start, Fraction)

    def bounds(self, total: int) -> tuple[int, int]:
        """First record (from 0) and the one after the last, of a file of `total` records; empty if start == stop."""
        stop = total if self.stop is None else self.stop
        start, stop = (int(b * total) if isinstance(b, Fraction) else min(b, total) for b in (self.start, stop))
        return start, stop


def parse_subset(text: str) -> Subset:
    """Read what a recipe writes. Raises ValueError with the remedy."""
    numbers, shares = _NUMBERS.fullmatch(text.strip()), _SHARES.fullmatch(text.strip())
    start: int | Fraction
    stop: int | Fraction | None
    if numbers is not None and numbers[0] != ":":
        start, stop = int(numbers[1] or 0), int(numbers[2]) if numbers[2] else None
    elif shares is not None:
        start, stop = Fraction(shares[1]), Fraction(shares[2])
        if stop > 1:
            raise ValueError(f'"{text}": a share is at most 1.0; {_HINT}')
    else:
        raise ValueError(f'"{text}" is no part of a file; {_HINT}')
    if stop is not None and start >= stop:
        raise ValueError(f'"{text}" holds no record: it ends before it begins')
    return Subset(start, stop)
