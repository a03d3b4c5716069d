"""A line of a review file, ours or the originals', and what it says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapilli.base.errors import DataError
from lapilli.evaluate.judge.reading import Unreadable, read_pair
from lapilli.evaluate.records import field, read_jsonl


def read_reviews(path: Path, ignore: Collection[str] = ()) -> list[Review]:
    """The reviews of a file but for those of the questions to ignore. Raises DataError, also where there are none."""
    made = [review for where, line in read_jsonl(path) if (review := Review.read(line, where)).id not in ignore]
    if not made:
        raise DataError(f"{path}: no reviews in it")
    return made


@dataclass(frozen=True, slots=True)
class Review:
    """A line of a review file, of ours or of anybody's."""

    where: str
    id: str
    category: str | None
    order: str
    tuple: tuple[float, float] | None
    content: str | None
    graded: bool
    why: str | None
    groups: Mapping[str, str]
    """Kinds of grouping to the group of its question; the category alone where nothing else is known."""

    @classmethod
    def read(cls, line: Mapping[str, Any], where: str) -> Review:
        """Raises DataError for a line of another form."""
        metadata = line.get("metadata")
        known: Mapping[str, Any] = metadata if isinstance(metadata, dict) else {}
        content = next((line[k] for k in ("content", "text") if isinstance(line.get(k), str)), None)
        category = line.get("category")
        graded = known.get("style") == "grade"
        groups = known.get("groups")
        scores = None if graded else _pair_of(line.get("tuple", line.get("score")), where)
        return cls(
            where=where,
            id=str(field(line, "question_id", where, (str, int))),
            category=category if isinstance(category, str) else None,
            order=str(known.get("order", "12")),
            tuple=scores,
            content=content,
            graded=graded,
            why=known.get("unreadable"),
            groups=groups if isinstance(groups, dict) else {"category": category} if isinstance(category, str) else {},
        )

    @property
    def reply(self) -> str:
        """The judge's words, as a reader is shown them."""
        return f"(answers swapped)\n{self.content or ''}" if self.order == "21" else self.content or ""

    def scores(self) -> tuple[float, float] | Unreadable:
        """The two answers' scores in the order of the files."""
        if self.content is None:
            first, second = self.tuple or (-1.0, -1.0)
            fine = 0 <= first <= 10 and 0 <= second <= 10
            return (first, second) if fine else Unreadable("no reply, and no scores from 0 to 10")
        found = read_pair(self.content)
        if isinstance(found, Unreadable):
            return Unreadable(self.why or found.reason)
        return found if self.order == "12" else (found[1], found[0])


def _pair_of(value: Any, where: str) -> tuple[float, float]:
    good = isinstance(value, list) and len(value) == 2
    if not good or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in value):
        raise DataError(f'{where}: "tuple" (or "score") must be two numbers, not {value!r:.80}')
    return float(value[0]), float(value[1])
