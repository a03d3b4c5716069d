"""What an earlier scoring of the same answers found stays: `--protocol official` behind `--protocol llava` has both.

Numbers of one results.json are always of the same answers, files and task; what is of others is taken out, and said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from lapilli.base.errors import DataError
from lapilli.evaluate.results import RESULTS, TASK, Results, read_results
from lapilli.evaluate.task import PROTOCOLS, Task


def with_earlier(made: Results, task: Task, folder: Path) -> tuple[Results, Task]:
    """The results with the values of those protocols that were not scored again, where they are of the same answers;
    and the task that they are of.

    What a judge scored stays where a command without a judge had nothing to score. Values of other answers are not
    taken over: the files of their protocols are removed, and a note says so.
    """
    if not (folder / RESULTS).is_file():
        return made, task
    try:
        before = read_results(folder)
        known = Task.model_validate(json.loads((folder / TASK).read_text(encoding="utf-8")))
    except (DataError, OSError, ValueError, ValidationError):  # of another version: nothing there can be relied upon
        gone = [name for name in PROTOCOLS if name not in made.protocols]
        return _without(made, gone, folder, "it can't be read"), task
    others = [name for name in before.protocols if name not in made.protocols]
    if not others:
        return made, task
    why = _other_answers(before, made)
    if why is None and task.scorer is None and known.scorer is not None:
        return before, known
    if why is None and _scored_otherwise(known, task):
        why = "it was scored in another way"
    if why is not None:
        return _without(made, others, folder, why), task
    both = {**before.protocols, **made.protocols}
    submissions = dict.fromkeys((*(path for path in before.submissions if Path(path).is_file()), *made.submissions))
    protocols = {name: both[name] for name in PROTOCOLS if name in both}
    return made.model_copy(update={"protocols": protocols, "submissions": tuple(submissions)}), task


def _other_answers(before: Results, made: Results) -> str | None:
    """Why an earlier scoring was not of the same answers; None where it was."""
    if sorted(before.answers.values()) != sorted(made.answers.values()):
        return "its answers were others"
    if (before.counts.asked, before.counts.missing) != (made.counts.asked, made.counts.missing):
        return "it was of other questions"
    return "its files were others" if before.files != made.files else None


def _scored_otherwise(known: Task, task: Task) -> bool:
    before = (known.scorer, known.headline, known.options, known.protocols)
    return before != (task.scorer, task.headline, task.options, task.protocols)


def _without(made: Results, others: Sequence[str], folder: Path, why: str) -> Results:
    gone = [name for name in others if (folder / f"items-{name}.jsonl").is_file()]
    for name in gone:
        (folder / f"items-{name}.jsonl").unlink()
        (folder / f"resamples-{name}.json").unlink(missing_ok=True)
    if not gone:
        return made
    note = f"an earlier score by protocol {' and '.join(gone)} is taken out: {why}; --protocol both gives it again"
    return made.model_copy(update={"notes": (*made.notes, note)})
