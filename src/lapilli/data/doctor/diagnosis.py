"""What the doctor found, and the numbers a person plans a run with: lengths, pictures, padding.

Everything here is computed from findings alone, so a report in any form says the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lapilli.data.doctor.columns import Columns
from lapilli.data.doctor.findings import Findings
from lapilli.data.doctor.reasons import REASONS
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
    """All findings. `usable` records would train; `with_model` says that their lengths are in tokens."""

    parts: tuple[Part, ...]
    usable: Columns
    findings: Findings
    decode: str
    max_length: int | None
    with_model: bool
    seconds: float
    open_ends: tuple[str, ...] = ()

    @property
    def records(self) -> int:
        return sum(part.records for part in self.parts)

    @property
    def bad(self) -> int:
        """How many records must not be trained on."""
        return self.findings.bad

    @property
    def ok(self) -> bool:
        """Whether training could start with this data as it is."""
        return not self.bad and bool(len(self.usable))

    @property
    def not_checked(self) -> tuple[str, ...]:
        """What this examination leaves open, and how to close it."""
        open_ends = list(self.open_ends)
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
    def trained(self) -> np.ndarray:
        """(n,) bool: the good training records, which the numbers below are about."""
        train = np.array([part.split == "train" for part in self.parts], dtype=bool)
        return train[self.usable.source] & ~self.usable.leaked

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) int64 in `unit`."""
        values = self.usable.length if self.with_model else self.usable.words
        return values[self.trained].astype(np.int64)

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
        values, counts = np.unique(self.usable.pictures[self.trained], return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def modalities(self) -> dict[str, int]:
        """Samples by what they hold."""
        counts = self.pictures_per_sample()
        several = sum(count for pictures, count in counts.items() if pictures > 1)
        named = {"text only": counts.get(0, 0), "one picture": counts.get(1, 0), "several pictures": several}
        return {name: count for name, count in named.items() if count}

    def picture_facts(self) -> dict[str, dict[str, int]]:
        """Pictures of usable training samples by mode and by format."""
        of_trained = self.usable.kind[self.trained[self.usable.record_of_picture]]
        modes, formats = Counter[str](), Counter[str]()
        for (mode, kind), count in zip(self.usable.kinds, np.bincount(of_trained).tolist(), strict=False):
            modes[mode] += count
            formats[kind] += count
        return {
            name: {key: count for key, count in counts.most_common() if count}
            for name, counts in (("modes", modes), ("formats", formats))
        }

    def padding(self, batch_size: int = 16) -> Padding | None:
        """What padding would cost; None without token lengths. Packed batches compute `tokens` positions."""
        if not self.with_model or not len(self.lengths):
            return None
        signed = np.where(self.usable.pictures[self.trained] > 0, self.lengths, -self.lengths)
        n = len(self.lengths)
        grouped = epoch_order(n, 0, 0, "modality_groups_llava", lengths=signed.tolist(), batch_size=batch_size)
        return Padding(
            int(self.lengths.sum()),
            batch_size,
            _padded(self.lengths[epoch_order(n, 0, 0)], batch_size),
            _padded(self.lengths[grouped], batch_size),
        )

    def json_pieces(self, batch_size: int = 16, **more: Any) -> Iterator[str]:
        """One JSON object with everything, for other programs, piece by piece; `more` are further keys.

        `reasons` lists every problem; numbers are about good training records.
        """
        yield json.dumps(self._numbers(batch_size) | more)[:-1] + ', "reasons": {'
        for place, code in enumerate(self.findings.codes):
            reason = REASONS[code]
            about = {"title": reason.title, "level": reason.level, "records": self.findings.records(code)}
            yield (", " if place else "") + f"{json.dumps(code)}: {json.dumps(about)[:-1]}, " + '"list": ['
            for i, problem in enumerate(self.findings.of(code)):
                yield (", " if i else "") + json.dumps({"where": problem.where, "message": problem.message})
            yield "]}"
        yield "}}"

    def _numbers(self, batch_size: int) -> dict[str, Any]:
        padding = self.padding(batch_size)
        return {
            "ok": self.ok,
            "records": self.records,
            "bad": self.bad,
            "decode": self.decode,
            "max_length": self.max_length,
            "seconds": round(self.seconds, 3),
            "not_checked": list(self.not_checked),
            "sources": [
                {"path": p.path, "split": p.split, "format": p.format, "images": p.images, "records": p.records}
                for p in self.parts
            ],
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
