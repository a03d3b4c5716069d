"""The report as Markdown: its tables, and the chosen questions with every model's answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lapilli.evaluate.report import tables
from lapilli.evaluate.report.choose import Case, Chosen
from lapilli.evaluate.report.gather import Gathered
from lapilli.evaluate.report.tables import Grid
from lapilli.evaluate.report.words import answer_text, cut, limits, notes, read_text, score_text

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#])")


def to_markdown(tasks: Sequence[Gathered], chosen: Sequence[Chosen], differences: Sequence[Grid | None]) -> str:
    """The tables, and the chosen questions with every model's answer."""
    parts = ["# Evaluation", _grid(tables.summary(tasks)), _grid(tables.counts(tasks))]
    known = [f"- {_plain(line)}" for line in notes(tasks)]
    parts += ["## Notes", "\n".join(known)] if known else []
    for task, own, difference in zip(tasks, chosen, differences, strict=True):
        parts.append(f"## {_plain(task.title)}")
        for grid in (*tables.values(task), difference, *tables.groups(task)):
            if grid is not None:
                parts += [f"### {_plain(grid.title)}", _grid(grid)]
        parts += ["### Answers", "\n".join(f"- {_plain(line)}" for line in limits([task], [own]))]
        parts += [_shown(case) for case in own.cases]
    return "\n\n".join(parts) + "\n"


def _shown(case: Case) -> str:
    pictures = "".join(f"\n\nPicture: {_plain(image.path or 'in the data file')}" for image in case.images)
    expected = f"\n\nExpected: {_plain(cut(case.expected))}" if case.expected else ""
    rows = [(r.model, answer_text(r), read_text(r), score_text(r)) for r in case.replies]
    answers = _grid(Grid("", ("model", "answer", "read as", "score"), tuple(rows)))
    judged = [f"\n\n{_plain(r.model)}, the judge: {_plain(cut(r.said))}" for r in case.replies if r.said is not None]
    return f"**{_plain(case.id)}** {_plain(cut(case.text))}{pictures}{expected}\n\n{answers}{''.join(judged)}"


def _grid(grid: Grid) -> str:
    rows = [grid.header, tuple("---" for _ in grid.header), *(tuple(map(_plain, row)) for row in grid.rows)]
    rows[0] = tuple(map(_plain, grid.header))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(text: str) -> str:
    """Text as Markdown shows it, on one line."""
    return " ".join(_SPECIAL.sub(r"\\\1", text).split())
