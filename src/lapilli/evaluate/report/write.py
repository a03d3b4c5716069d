"""One report in up to three forms: a page, Markdown, JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lapilli.base.atomic import atomic_write, write_json
from lapilli.evaluate.report import tables
from lapilli.evaluate.report.choose import Case, Chosen, choose
from lapilli.evaluate.report.gather import Gathered, gather, models_of
from lapilli.evaluate.report.html import render
from lapilli.evaluate.report.markdown import to_markdown
from lapilli.evaluate.report.pictures import Thumbnails
from lapilli.evaluate.report.tables import Grid
from lapilli.evaluate.report.words import limits

SHOWN = 60
"""Questions of a task that are shown, unless the user says otherwise."""
MAX_BYTES = 20_000_000
"""Bytes of pictures in a page."""


@dataclass(frozen=True)
class Written:
    """What a report holds and where it lies."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def write_report(
    outs: Sequence[str | Path],
    *,
    html: str | Path | None = None,
    markdown: str | Path | None = None,
    json: str | Path | None = None,
    shown: int = SHOWN,
    max_bytes: int = MAX_BYTES,
) -> Written:
    """Write a report of output folders of `lapilli evaluate` and `lapilli score`, each of one model.

    At most `shown` questions of a task, and `max_bytes` of pictures before they are encoded as text. Raises DataError
    for a folder without results.
    """
    tasks = gather(outs)
    chosen = [choose(task, shown) for task in tasks]
    differences = [tables.differences(task) for task in tasks]
    thumbnails = Thumbnails(max_bytes)
    files: list[Path] = []
    if html is not None:
        atomic_write(html, render(tasks, chosen, differences, thumbnails))
        files.append(Path(html))
    if markdown is not None:
        atomic_write(markdown, to_markdown(tasks, chosen, differences))
        files.append(Path(markdown))
    if json is not None:
        write_json(json, to_json(tasks, chosen, differences))
        files.append(Path(json))
    notes = limits(tasks, chosen)
    if thumbnails.over:
        notes.append(f"{thumbnails.over:,} pictures are left out: --picture-mb is reached")
    notes += [f"picture not shown: {reason}" for reason in list(thumbnails.faults.values())[:3]]
    return Written(tuple(files), tuple(notes))


def to_json(tasks: Sequence[Gathered], chosen: Sequence[Chosen], differences: Sequence[Grid | None]) -> dict[str, Any]:
    """Everything of a report as JSON values; pictures as their paths, no text cut."""
    return {
        "models": models_of(tasks),
        "tasks": [
            {
                "task": task.name,
                "title": task.title,
                "results": {entry.model: entry.results.model_dump(mode="json") for entry in task.entries},
                "differences": _records(difference),
                "notes": list(task.notes),
                "questions": own.found,
                "shown": [_case(case) for case in own.cases],
            }
            for task, own, difference in zip(tasks, chosen, differences, strict=True)
        ],
    }


def _case(case: Case) -> dict[str, Any]:
    made = asdict(case)
    made["images"] = [image.path for image in case.images]
    return made


def _records(grid: Grid | None) -> list[dict[str, str]]:
    return [] if grid is None else [dict(zip(grid.header, row, strict=True)) for row in grid.rows]
