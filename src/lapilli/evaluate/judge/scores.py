"""A review file as an evaluation's scores, so that a judge's numbers are compared and reported like any others.

`score` is the ratio of our answers' mean to the reference's, in percent (the LLaVA-Bench score), with both means times
10; of grades their mean in percent. Protocols are those of `summary`; of grades there is one reading only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lapilli.evaluate.judge.options import JUDGED
from lapilli.evaluate.judge.review import Review, read_reviews
from lapilli.evaluate.judge.summary import Table, rounded, summarise, table_notes
from lapilli.evaluate.task import Protocol, Scores

Found = list[tuple[float, ...]]
"""What a question has in the means: pairs of scores, or one grade."""


def review_scores(path: Path, protocol: Protocol, organs: Mapping[str, str] | None = None) -> Scores:
    """The scores of a review file; `organs` (question id to organ) adds means of each.

    Question by question there is our answer's mean score, 0 to 1. Raises DataError as `summarise` does.
    """
    table = summarise(path, protocol, organs=organs) or summarise(path, "official", organs=organs)
    assert table is not None  # grades have a table under protocol official
    reviews = read_reviews(path)
    groups, counts = _groups(table, reviews, organs or {})
    said: dict[str, list[str]] = {}
    for review in reviews:
        said.setdefault(review.id, []).append(review.reply)
    return Scores(
        values=_values(list(table.scores.values()), table.graded),
        items={name: _worth(found, table.graded) for name, found in table.scores.items()},
        groups=groups,
        counts=counts,
        parsed={name: _shown(found, table.graded) for name, found in table.scores.items()},
        notes=tuple(table_notes(table)),
        ratio={} if table.graded else {name: _sums(found) for name, found in table.scores.items()},
        said={name: "\n\n".join(replies) for name, replies in said.items()},
    )


def _groups(
    table: Table, reviews: Sequence[Review], organs: Mapping[str, str]
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, dict[str, int]]]:
    members: dict[str, dict[str, dict[str, Found]]] = {}
    for review in reviews:
        found = table.scores.get(review.id)
        if found is None:
            continue
        kinds = {**review.groups, **({"organ": organs[review.id]} if organs.get(review.id) else {})}
        for kind, group in kinds.items():
            members.setdefault(kind, {}).setdefault(group, {})[review.id] = found
            if table.graded and ", " in group:  # MM-Vet's capabilities: one question is in several
                for part in group.split(", "):
                    members.setdefault(f"any {kind}", {}).setdefault(part, {})[review.id] = found
    groups = {
        kind: {group: _values(list(own.values()), table.graded) for group, own in sorted(found.items())}
        for kind, found in members.items()
    }
    counts = {kind: {group: len(own) for group, own in found.items()} for kind, found in members.items()}
    return groups, counts


def _values(questions: Sequence[Found], graded: bool) -> dict[str, float]:
    scores = np.array([one for found in questions for one in found])
    if graded:
        return {JUDGED: 100 * float(scores.mean()) if len(scores) else math.nan}
    ratio, first, second = rounded(scores) if len(scores) else (None, None, None)
    named = {JUDGED: ratio, "ours": second, "reference": first}
    return {name: math.nan if value is None else value for name, value in named.items()}


def _worth(found: Found, graded: bool) -> float:
    ours = sum(one[-1] for one in found) / len(found)
    return ours if graded else min(1.0, max(0.0, ours / 10))


def _shown(found: Found, graded: bool) -> str:
    if graded:
        return f"grade {found[0][0]:g}"
    first, second = (sum(column) / len(found) for column in zip(*found, strict=True))
    return f"reference {first:g}, ours {second:g}"


def _sums(found: Found) -> tuple[float, float]:
    """Ours and the reference's."""
    return sum(one[1] for one in found), sum(one[0] for one in found)
