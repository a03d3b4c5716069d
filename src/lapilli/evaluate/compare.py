"""Two models on the same questions: how far apart, and whether that could be chance.

Scores that are means are compared question by question, and so are ratios of sums (a judge's relative score); another
headline that is no mean (an F1, a sum over categories) by its values under the same bootstrap resamples, which two
evaluations of the same questions share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lapilli.base.errors import DataError
from lapilli.evaluate.records import examples
from lapilli.evaluate.results import (
    Results,
    read_items,
    read_ratios,
    read_resamples,
    read_results,
    result_folders,
)
from lapilli.evaluate.statistics import Difference, paired, paired_ratios, paired_resamples


@dataclass(frozen=True)
class Comparison:
    """One task under one protocol: both headlines and their difference, or why there is none."""

    task: str
    protocol: str
    headline: str
    higher_is_better: bool
    a: float | None
    b: float | None
    difference: Difference | None
    note: str = ""


def compare(a: str | Path, b: str | Path) -> list[Comparison]:
    """Compare two output folders (or task folders) over the tasks and protocols that both have.

    Raises DataError if they have none in common.
    """
    left, right = result_folders(a), result_folders(b)
    shared = [task for task in left if task in right]
    if not shared:
        raise DataError(f"{a} has {', '.join(left)}, {b} has {', '.join(right)}: no task in common")
    made: list[Comparison] = []
    for task in shared:
        first, second = read_results(left[task]), read_results(right[task])
        for protocol in first.protocols:
            if protocol in second.protocols:
                made.append(_compare(left[task], right[task], first, second, protocol))
    if not made:
        raise DataError(f"{a} and {b}: no scored protocol in common in {', '.join(shared)}")
    return made


def only_in(a: str | Path, b: str | Path) -> tuple[list[str], list[str]]:
    """Tasks that only the first, or only the second folder has."""
    left, right = result_folders(a), result_folders(b)
    return [task for task in left if task not in right], [task for task in right if task not in left]


def _compare(left: Path, right: Path, first: Results, second: Results, protocol: str) -> Comparison:
    headline = first.headline
    a, b = (r.protocols[protocol].values.get(headline) for r in (first, second))
    notes = _other_data(first, second)
    difference: Difference | None = None
    resamples = read_resamples(left, protocol), read_resamples(right, protocol)
    if resamples[0] is not None and resamples[1] is not None:
        (order_a, values_a), (order_b, values_b) = resamples[0], resamples[1]
        if list(order_a) != list(order_b):
            notes.append("not the same questions were scored, and the headline is no mean: not compared")
        elif a is not None and b is not None:
            difference = paired_resamples(a, b, values_a, values_b, len(order_a))
    elif (first_parts := read_ratios(left, protocol)) and (second_parts := read_ratios(right, protocol)):
        difference = _paired(first_parts, second_parts, notes, paired_ratios)
    else:
        difference = _paired(read_items(left, protocol), read_items(right, protocol), notes, paired)
    return Comparison(first.task, protocol, headline, first.higher_is_better, a, b, difference, "; ".join(notes))


def _paired(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    notes: list[str],
    test: Callable[[np.ndarray, np.ndarray], Difference],
) -> Difference | None:
    shared = [name for name in a if name in b]
    if not shared:
        notes.append("no question was scored on both sides: not compared")
        return None
    alone = [name for name in (*a, *b) if name not in a or name not in b]
    if alone:
        notes.append(f"{examples(alone, 'question', 'questions')} scored on one side only, left out of the difference")
    return test(np.array([a[name] for name in shared]), np.array([b[name] for name in shared]))


def _other_data(first: Results, second: Results) -> list[str]:
    """Files that the two evaluations had in different versions."""
    differ = [
        part
        for part in first.files
        if part in second.files and first.files[part].get("sha256") != second.files[part].get("sha256")
    ]
    return [f"the files of {', '.join(differ)} differ"] if differ else []
