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


def with_earlier(made: Results, task: Task, folder: Path) -> Results:
    """The results with the values of those protocols that were not scored again, where they are of the same answers.

    Otherwise the files of these protocols are removed, and a note says so.
    """
    if not (folder / RESULTS).is_file():
        return made
    try:
        before = read_results(folder)
        known = Task.model_validate(json.loads((folder / TASK).read_text(encoding="utf-8")))
    except (DataError, OSError, ValueError, ValidationError):  # of another version: nothing there can be relied upon
        return _without(made, [name for name in PROTOCOLS if name not in made.protocols], folder, "can't be read")
    others = [name for name in before.protocols if name not in made.protocols]
    if not others:
        return made
    why = _differs(before, made, known, task, others)
    if why is not None:
        return _without(made, others, folder, why)
    both = {**before.protocols, **made.protocols}
    submissions = dict.fromkeys((*(path for path in before.submissions if Path(path).is_file()), *made.submissions))
    return made.model_copy(
        update={
            "protocols": {name: both[name] for name in PROTOCOLS if name in both},
            "submissions": tuple(submissions),
        }
    )


def _differs(before: Results, made: Results, known: Task, task: Task, others: Sequence[str]) -> str | None:
    """Why numbers of an earlier scoring are not of the same thing; None where they are."""
    if sorted(before.answers.values()) != sorted(made.answers.values()):
        return "its answers were others"
    if (before.counts.asked, before.counts.missing) != (made.counts.asked, made.counts.missing):
        return "it was of other questions"
    if before.files != made.files:
        return "its files were others"
    same = (known.scorer, known.headline, known.options) == (task.scorer, task.headline, task.options)
    if not same or known.protocols != task.protocols:
        return "it was scored in another way"
    return None


def _without(made: Results, others: Sequence[str], folder: Path, why: str) -> Results:
    gone = [name for name in others if (folder / f"items-{name}.jsonl").is_file()]
    for name in gone:
        (folder / f"items-{name}.jsonl").unlink()
        (folder / f"resamples-{name}.json").unlink(missing_ok=True)
    if not gone:
        return made
    note = f"an earlier score by protocol {' and '.join(gone)} is taken out: {why}; --protocol both gives it again"
    return made.model_copy(update={"notes": (*made.notes, note)})
