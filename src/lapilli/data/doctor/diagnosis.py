"""What the doctor found, and the numbers a person plans a run with: lengths, pictures, padding.

Everything here is computed from findings alone, so a report in any form says the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lapilli.data.doctor.reasons import REASONS
from lapilli.data.doctor.record import Problem, RecordFacts
from lapilli.data.order import epoch_order

BARS = 20
"""Bars that a histogram of lengths has at most."""


@dataclass(frozen=True, slots=True)
class Part:
    """One source: where it is, what it is used for, how it was read."""

    path: str
    split: str
    format: str
    images: str | None
    records: int


@dataclass(frozen=True)
class Padding:
    """Positions that one epoch of training computes, by how batches are made; `tokens` of them are real."""

    tokens: int
    batch_size: int
    shuffled: int
    """Batches of `batch_size` in random order, padded to their longest."""
    grouped: int
    """The same with LLaVA's grouping by length."""

    @property
    def shuffled_waste(self) -> float:
        """Part of the positions that is padding."""
        return 1 - self.tokens / self.shuffled

    @property
    def grouped_waste(self) -> float:
        return 1 - self.tokens / self.grouped


@dataclass(frozen=True)
class Diagnosis:
    """All findings. `usable` records would train; `problems` are in the order of the data."""

    parts: tuple[Part, ...]
    usable: tuple[RecordFacts, ...]
    problems: tuple[Problem, ...]
    decode: str
    max_length: int | None
    with_model: bool
    seconds: float

    @property
    def records(self) -> int:
        return sum(part.records for part in self.parts)

    @cached_property
    def bad(self) -> frozenset[tuple[int, int]]:
        """(source, number) of every record that must not be trained on."""
        return frozenset((p.source, p.number) for p in self.problems if REASONS[p.code].level == "bad")

    @property
    def ok(self) -> bool:
        """Whether training could start with this data as it is."""
        return not self.bad and bool(self.usable)

    @cached_property
    def by_reason(self) -> dict[str, list[Problem]]:
        """Problems by reason, in the order of REASONS; reasons without any are left out."""
        found: dict[str, list[Problem]] = defaultdict(list)
        for problem in self.problems:
            found[problem.code].append(problem)
        return {code: found[code] for code in REASONS if code in found}

    def counted(self, code: str) -> int:
        """How many records have at least one problem of this kind."""
        return len({(p.source, p.number) for p in self.by_reason.get(code, ())})

    @property
    def not_checked(self) -> tuple[str, ...]:
        """What this examination leaves open, and how to close it."""
        open_ends = []
        if not self.with_model:
            open_ends.append(
                "lengths are in words: tokens, max_length and the template are checked with --model FOLDER"
            )
        if self.decode == "header":
            open_ends.append("damage inside a picture that has its start and its end: --decode full finds it")
        if not any(part.split == "validation" for part in self.parts):
            open_ends.append("leakage into validation data: name it with --validation FILE")
        return tuple(open_ends)

    @cached_property
    def trained(self) -> tuple[RecordFacts, ...]:
        """Good training records: those that the numbers below are about."""
        return tuple(
            r for r in self.usable if self.parts[r.source].split == "train" and (r.source, r.number) not in self.bad
        )

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) int64 in `unit`."""
        values = ((r.length if self.with_model else r.words) for r in self.trained)
        return np.fromiter(values, dtype=np.int64, count=len(self.trained))

    @property
    def unit(self) -> str:
        return "tokens" if self.with_model else "words"

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, to, records) in equal steps of a round width; `to` is not in it."""
        if not len(self.lengths):
            return []
        width = _round_up((int(self.lengths.max()) - int(self.lengths.min())) / BARS)
        places = self.lengths // width
        first, counts = int(places.min()), np.bincount(places - places.min())
        return [(i * width, (i + 1) * width, int(count)) for i, count in enumerate(counts, first)]

    def pictures_per_sample(self) -> dict[int, int]:
        return dict(sorted(Counter(len(r.pictures) for r in self.trained).items()))

    def modalities(self) -> dict[str, int]:
        """Samples by what they hold."""
        counts = self.pictures_per_sample()
        several = sum(count for pictures, count in counts.items() if pictures > 1)
        named = {"text only": counts.get(0, 0), "one picture": counts.get(1, 0), "several pictures": several}
        return {name: count for name, count in named.items() if count}

    def picture_facts(self) -> dict[str, dict[str, int]]:
        """Pictures of usable training samples by mode and by format."""
        pictures = [p for r in self.trained for p in r.pictures]
        return {
            "modes": dict(Counter(p.mode for p in pictures).most_common()),
            "formats": dict(Counter(p.format for p in pictures).most_common()),
        }

    def padding(self, batch_size: int = 16) -> Padding | None:
        """What padding would cost; None without token lengths. Packed batches compute `tokens` positions."""
        if not self.with_model or not len(self.lengths):
            return None
        signed = np.where([bool(r.pictures) for r in self.trained], self.lengths, -self.lengths)
        n = len(self.lengths)
        grouped = epoch_order(n, 0, 0, "modality_groups_llava", lengths=signed.tolist(), batch_size=batch_size)
        return Padding(
            int(self.lengths.sum()),
            batch_size,
            _padded(self.lengths[epoch_order(n, 0, 0)], batch_size),
            _padded(self.lengths[grouped], batch_size),
        )

    def as_json(self, batch_size: int = 16) -> dict[str, Any]:
        """Everything, for other programs. `reasons` lists every record; numbers are about good training records."""
        padding = self.padding(batch_size)
        return {
            "ok": self.ok,
            "records": self.records,
            "bad": len(self.bad),
            "decode": self.decode,
            "max_length": self.max_length,
            "seconds": round(self.seconds, 3),
            "not_checked": list(self.not_checked),
            "sources": [
                {"path": p.path, "split": p.split, "format": p.format, "images": p.images, "records": p.records}
                for p in self.parts
            ],
            "reasons": {
                code: {
                    "title": REASONS[code].title,
                    "level": REASONS[code].level,
                    "records": self.counted(code),
                    "list": [{"where": p.where, "message": p.message} for p in problems],
                }
                for code, problems in self.by_reason.items()
            },
            "lengths": {
                "unit": self.unit,
                "total": int(self.lengths.sum()),
                **self.percentiles(),
                "histogram": [{"from": a, "to": b, "records": count} for a, b, count in self.histogram()],
            },
            "pictures_per_sample": {str(k): v for k, v in self.pictures_per_sample().items()},
            "modalities": self.modalities(),
            "pictures": self.picture_facts(),
            "padding": None
            if padding is None
            else {
                "batch_size": padding.batch_size,
                "tokens": padding.tokens,
                "shuffled_positions": padding.shuffled,
                "grouped_positions": padding.grouped,
                "packed_positions": padding.tokens,
            },
        }

    def percentiles(self) -> dict[str, int]:
        """Shortest, typical and longest lengths."""
        if not len(self.lengths):
            return {}
        names = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
        values = np.percentile(self.lengths, list(names.values()), method="nearest")
        return {name: int(value) for name, value in zip(names, values, strict=True)}


def _padded(lengths: np.ndarray, batch_size: int) -> int:
    """Positions of batches of consecutive samples, each padded to its longest."""
    batches = (lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size))
    return int(sum(int(batch.max()) * len(batch) for batch in batches))


def _round_up(value: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not below `value`."""
    unit = 1
    while True:
        for factor in (1, 2, 5):
            if factor * unit >= value:
                return factor * unit
        unit *= 10
