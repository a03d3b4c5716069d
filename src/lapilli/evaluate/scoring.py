"""Answers to results: what is missing is counted and decides, each protocol scores, submission files are written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lapilli.base.atomic import atomic_write, write_json
from lapilli.base.errors import RunError
from lapilli.base.version import VERSION
from lapilli.evaluate.answers import Line
from lapilli.evaluate.files import digests
from lapilli.evaluate.job import Job
from lapilli.evaluate.judge.items import has_reference
from lapilli.evaluate.merging import with_earlier
from lapilli.evaluate.records import SHOWN
from lapilli.evaluate.results import TASK, Counts, Outcome, Results, outcome, write_items, write_results
from lapilli.evaluate.scorers import SCORERS
from lapilli.evaluate.submissions import SUBMISSIONS
from lapilli.evaluate.task import Protocol, Question, Scores, Task


def finish(
    job: Job,
    answers: Mapping[str, Line],
    reasons: Mapping[str, str],
    *,
    answer_files: Sequence[Path],
    model: Mapping[str, Any],
    decoding: Mapping[str, Any] | None,
    versions: Mapping[str, str],
    allow_missing: int = 0,
    folder: Path | None = None,
) -> Results:
    """Score the answers under every protocol of the job, and write everything into `folder` if there is one.

    `reasons` say why a question has no answer. Raises RunError if more than `allow_missing` have none.
    """
    missing = {q.id: reasons.get(q.id, "no answer to it") for q in job.asked if q.id not in answers}
    if folder is not None:
        _write_missing(folder, missing)
    if len(missing) > allow_missing:
        shown = "\n".join(f"  {name}: {reason}" for name, reason in list(missing.items())[:SHOWN])
        where = f" (all: {folder / 'missing.jsonl'})" if folder is not None else ""
        raise RunError(
            f"task {job.task.name}: {len(missing)} of {len(job.asked)} questions have no answer; the first{where}:\n"
            f"{shown}\n--allow-missing {len(missing)} scores the others, and says so"
        )
    texts = {question.id: answers[question.id].text for question in job.asked if question.id in answers}
    notes = _notes(job, missing)
    scored = {protocol: _score(job, protocol, texts, folder) for protocol in job.read}
    outcomes: dict[str, Outcome] = {}
    for protocol, scores in scored.items():
        if scores is None:
            continue
        outcomes[protocol], resamples = outcome(scores, job.task)
        if folder is not None:
            write_items(folder, protocol, scores, resamples)
    if not outcomes:
        notes.append("nothing to score here: " + _why_unscored(job))
    written = [] if folder is None else _submissions(job, texts, folder, notes)
    used = [answers[name] for name in texts]
    cut = sum(line.metadata.get("finish") in ("length", "context") for line in used)
    if cut:
        notes.append(f"{cut} of {len(used)} answers were cut at their longest")
    made = Results(
        task=job.task.name,
        title=job.task.title,
        headline=job.task.headline,
        higher_is_better=job.task.higher_is_better,
        protocols=outcomes,
        model=dict(model),
        decoding=None if decoding is None else dict(decoding),
        counts=Counts(
            in_files=len(job.questions),
            asked=len(job.asked),
            answered=len(texts),
            missing=len(missing),
            cut=cut,
            limit=job.limit,
        ),
        files=digests(job.files),
        answers={str(path): _digest(path) for path in answer_files},
        submissions=tuple(str(path) for path in written),
        versions={"lapilli": VERSION, **versions},
        seconds=_seconds(used),
        notes=tuple(notes),
    )
    if folder is not None:
        made, task = with_earlier(made, job.task, folder)
        write_json(folder / TASK, task.model_dump(mode="json"))
        write_results(folder, made)
    return made


def check_scorer(job: Job) -> None:
    """Raise LapilliError for what would make a task's scorer fail only after its questions are answered."""
    entry = None if job.task.scorer is None else SCORERS[job.task.scorer]
    if entry is not None and entry.before is not None:
        entry.before(job.asked, {**job.task.options, "task": job.task.name, "files": job.files})


def known_truth(questions: Sequence[Question]) -> list[Question]:
    """Those of the questions whose right answer is known."""
    return [question for question in questions if question.truth is not None]


def _score(job: Job, protocol: Protocol, texts: Mapping[str, str], folder: Path | None) -> Scores | None:
    if job.task.scorer is None:
        return None
    known = _scorable(job.task, job.read[protocol][: job.limit])
    scorable = [q for q in known if q.id in texts]
    if not scorable:
        return None
    given: dict[str, Any] = {"task": job.task.name, "protocol": protocol, "files": job.files, "folder": folder}
    given["missing"] = [q for q in known if q.id not in texts]
    options = {**job.task.options_for(protocol), **given}
    return SCORERS[job.task.scorer].call(scorable, {q.id: texts[q.id] for q in scorable}, options)


def _scorable(task: Task, questions: Sequence[Question]) -> list[Question]:
    """Those of the questions that the task's scorer can score."""
    needs_truth = task.scorer is None or SCORERS[task.scorer].needs_truth
    return known_truth(questions) if needs_truth else list(questions)


def _why_unscored(job: Job) -> str:
    if job.task.scorer is None:
        if job.asked and all(map(has_reference, job.asked)):
            return "free text is for a judge (--judge model=NAME, or lapilli judge)"
        return "the task is scored elsewhere"
    return "the right answers are not public, or their file is not there"


def _notes(job: Job, missing: Mapping[str, str]) -> list[str]:
    notes: list[str] = []
    if len(job.asked) < len(job.questions):
        notes.append(f"limited to the first {len(job.asked)} of {len(job.questions)} questions: not the task's number")
    if missing:
        notes.append(f"{len(missing)} of {len(job.asked)} questions have no answer and are left out of the scores")
    unknown = len(job.asked) - len(_scorable(job.task, job.asked))
    if job.task.scorer is not None and 0 < unknown < len(job.asked):
        notes.append(f"{unknown} of {len(job.asked)} questions have no public answer and are left out of the scores")
    return notes


def _submissions(job: Job, texts: Mapping[str, str], folder: Path, notes: list[str]) -> list[Path]:
    task = job.task
    if task.submission is None:
        return []
    if len(job.asked) < len(job.questions):
        notes.append("no submission file: the questions were limited")
        return []
    kinds: list[tuple[Protocol, dict[str, Any]]] = []
    for protocol in job.read:
        if all(options != task.options_for(protocol) for _, options in kinds):
            kinds.append((protocol, task.options_for(protocol)))
    apart = task.options_for("llava") != task.options_for("official")
    written: list[Path] = []
    for protocol, options in kinds:
        place = folder / "submission" / (protocol if apart else "")
        place.mkdir(parents=True, exist_ok=True)
        answered = [question for question in job.read[protocol] if question.id in texts]
        given = {**options, "files": job.files}
        written += map(Path, SUBMISSIONS[task.submission].call(answered, texts, given, place))
    return written


def _write_missing(folder: Path, missing: Mapping[str, str]) -> None:
    path = folder / "missing.jsonl"
    if not missing:
        path.unlink(missing_ok=True)
        return
    lines = (json.dumps({"id": name, "reason": why}, ensure_ascii=False) + "\n" for name, why in missing.items())
    atomic_write(path, "".join(lines))


def _seconds(lines: Sequence[Line]) -> float | None:
    found = [line.metadata["seconds"] for line in lines if isinstance(line.metadata.get("seconds"), int | float)]
    return round(float(np.sum(found)), 3) if found else None


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
