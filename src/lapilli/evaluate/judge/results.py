"""Reviews as the results of an evaluation, for `lapilli compare` and `lapilli report`.

Beside results.json lie the questions and answers that were judged, so that a report shows them, whatever files they
came from and wherever these are by then.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lapilli.base.atomic import atomic_write, write_json
from lapilli.base.version import VERSION
from lapilli.evaluate.files import digests
from lapilli.evaluate.job import IMAGES
from lapilli.evaluate.judge.items import Item
from lapilli.evaluate.judge.options import JUDGED
from lapilli.evaluate.judge.review import read_reviews
from lapilli.evaluate.judge.scores import review_scores
from lapilli.evaluate.judge.summary import summarise
from lapilli.evaluate.results import RESULTS, TASK, Counts, Results, outcome, write_items, write_results
from lapilli.evaluate.task import PROTOCOLS, Task

REVIEWED = "reviews"
"""What a task is called whose name is not known, so that two review files can be compared."""
ANSWERS = "answers.jsonl"


def write_judged(
    reviews: Path,
    folder: Path,
    *,
    task: str,
    model: Mapping[str, Any],
    items: Sequence[Item] = (),
    root: str | Path | None = None,
    organs: Mapping[str, str] | None = None,
) -> Results:
    """Write `folder/results.json` and what a report needs besides; `root` is where the items' pictures lie.

    Without items (a review file of others) a report shows the judge's replies alone. Raises DataError for reviews that
    can't be summarised.
    """
    described = _describe(task, items, root)
    folder.mkdir(parents=True, exist_ok=True)
    found = read_reviews(reviews)
    ids = list(dict.fromkeys(review.id for review in found))
    shown = [_question(item, root is not None) for item in items] if items else [_bare(name) for name in ids]
    _write_lines(folder / "questions.jsonl", shown)
    _write_lines(folder / ANSWERS, [_answer(item) for item in items])
    outcomes = {}
    for protocol in PROTOCOLS:
        scores = review_scores(reviews, protocol, organs)
        outcomes[protocol], resamples = outcome(scores, described)
        write_items(folder, protocol, scores, resamples)
    files = {"questions": folder / "questions.jsonl"} | ({} if root is None else {IMAGES: Path(root)})
    table = summarise(reviews, "official", organs=organs)
    read = len(ids) - (0 if table is None else table.left_out)
    counts = Counts(in_files=len(shown), asked=len(shown), answered=read, missing=len(shown) - read)
    notes = [f"{counts.missing} of {len(shown)} questions have no readable review"] if counts.missing else []
    made = Results(
        task=described.name,
        title=described.title,
        headline=JUDGED,
        higher_is_better=True,
        protocols=outcomes,
        model=dict(model),
        decoding=None,
        counts=counts,
        files=digests(files),
        answers={str(folder / ANSWERS): digests({ANSWERS: folder / ANSWERS})[ANSWERS]["sha256"]} if items else {},
        versions={"lapilli": VERSION},
        notes=tuple(notes),
    )
    write_json(folder / TASK, described.model_dump(mode="json"))
    write_results(folder, made)
    return made


def forget_judged(folder: Path) -> None:
    """Take away results of an earlier run that are not of all the reviews there will be."""
    (folder / RESULTS).unlink(missing_ok=True)


def _describe(task: str, items: Sequence[Item], root: str | Path | None) -> Task:
    kinds = sorted({kind for item in items for kind in _groups(item)})
    return Task(
        name=task,
        title=f"{task}: reviews by a judge" if task != REVIEWED else "Reviews by a judge",
        about="Answers that a judge model scored; score is ours relative to the reference's, or the mean grade.",
        source=("lapilli judge",),
        files={"questions": "questions.jsonl", **({} if root is None else {IMAGES: str(root)})},
        reader="own",
        options={"groups": kinds} if all(set(_groups(item)) == set(kinds) for item in items) else {},
        headline=JUDGED,
    )


def _groups(item: Item) -> Mapping[str, str]:
    return item.groups or ({} if item.category is None else {"category": item.category})


def _question(item: Item, pictured: bool) -> dict[str, Any]:
    """A question as the reader of a user's own questions takes it; the expected answer is the reference."""
    made: dict[str, Any] = {"question_id": item.question_id, "text": item.question.replace("<image>", "").strip()}
    if pictured and item.image is not None:
        made["image"] = item.image
    elif item.image is not None:
        made["picture"] = item.image
    return {**made, "answer": item.context if item.graded else item.answers[0], **_groups(item)}


def _answer(item: Item) -> dict[str, Any]:
    return {"question_id": item.question_id, "text": item.answers[-1], "metadata": {}}


def _bare(name: str) -> dict[str, Any]:
    return {"question_id": name, "text": f"question {name} (its text is not in the review file)"}


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
