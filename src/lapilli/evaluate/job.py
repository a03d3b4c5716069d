"""A task with its data read and checked: what is asked, before a model is there to ask.

Whatever is wrong with the data is said here, in seconds, with counts and first examples.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapilli.base.errors import DataError
from lapilli.data.archive import open_archive, split_path
from lapilli.data.picture import resolve
from lapilli.evaluate.files import locate
from lapilli.evaluate.readers import READERS
from lapilli.evaluate.records import SHOWN
from lapilli.evaluate.task import PROTOCOLS, Protocol, Question, Task

log = logging.getLogger(__name__)

IMAGES = "images"
"""The part of a task's files where the paths of pictures start."""


@dataclass(frozen=True)
class Job:
    """One task over one set of files."""

    task: Task
    files: dict[str, Path]
    read: dict[Protocol, list[Question]]
    """Every question, as each protocol reads it; what is asked is the same for all."""
    limit: int | None = None
    """Only so many of the first questions are asked."""

    @property
    def questions(self) -> list[Question]:
        """Every question of the files."""
        return next(iter(self.read.values()))

    @property
    def asked(self) -> list[Question]:
        """The questions that are asked, in the order of the files."""
        return self.questions[: self.limit]

    @property
    def root(self) -> Path | None:
        return self.files.get(IMAGES)


def open_jobs(
    task: Task,
    data: str | Path,
    protocols: Sequence[Protocol],
    *,
    named: Mapping[str, str] | None = None,
    alone: bool = True,
    limit: int | None = None,
    asking: bool = True,
) -> list[Job]:
    """Find and read a task's files. Raises DataError for whatever is wrong with them.

    One job; but where protocols ask different questions, one for each, of the task's name with the protocol's behind
    it, whichever protocols are wanted. With `asking` false (the answers are there already) always one.
    """
    files = locate(task, data, named, alone)
    differs = asking and _read_by(task, "llava") != _read_by(task, "official")
    read: dict[Protocol, list[Question]] = {}
    for protocol in PROTOCOLS if differs else protocols:
        same = next((found for other, found in read.items() if _read_by(task, other) == _read_by(task, protocol)), None)
        read[protocol] = READERS[task.reader].call(task, files, task.options_for(protocol)) if same is None else same
    first, *others = read.values()
    if not asking or all([_asks(q) for q in first] == [_asks(q) for q in other] for other in others):
        return [Job(task, files, {protocol: read[protocol] for protocol in protocols}, limit)]
    log.warning("task %s: its protocols ask different questions, so each is asked by itself", task.name)
    return [
        Job(task.model_copy(update={"name": f"{task.name}-{protocol}"}), files, {protocol: read[protocol]}, limit)
        for protocol in protocols
    ]


def open_job(
    task: Task,
    data: str | Path,
    protocols: Sequence[Protocol],
    *,
    named: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Job:
    """The one job of a task. Raises DataError for whatever is wrong with its files, and if its protocols want two."""
    jobs = open_jobs(task, data, protocols, named=named, limit=limit)
    if len(jobs) > 1:
        raise DataError(f"task {task.name}: protocols {' and '.join(protocols)} ask different questions; name one")
    return jobs[0]


def _read_by(task: Task, protocol: Protocol) -> dict[str, Any]:
    """What of a protocol's options the reader looks at."""
    known = READERS[task.reader].options
    return {name: value for name, value in task.options_for(protocol).items() if name in known}


def picture_faults(job: Job) -> list[tuple[Question, str]]:
    """Questions whose picture is not there, with the reason; whether a file is whole is found when it is opened."""
    found: dict[str, str | None] = {}
    faults: list[tuple[Question, str]] = []
    for question in job.asked:
        for image in question.images:
            if image.path is None:
                continue
            if image.path not in found:
                found[image.path] = _fault(image.path, job)
            reason = found[image.path]
            if reason is not None:
                faults.append((question, f"{question.where}: {reason}"))
                break
    return faults


def check_pictures(job: Job, allow_missing: int) -> None:
    """Raise DataError if more questions than `allow_missing` lack their picture."""
    faults = picture_faults(job)
    if len(faults) > allow_missing:
        shown = "\n".join(f"  {reason}" for _, reason in faults[:SHOWN])
        get = f"\nget them: {job.task.obtain}" if job.task.obtain else ""
        raise DataError(
            f"task {job.task.name}: {len(faults)} of {len(job.asked)} questions lack their picture; the first:\n{shown}"
            f"{get}\n--allow-missing {len(faults)} leaves them out, counted in the results"
        )


def _asks(question: Question) -> tuple[object, ...]:
    return question.id, question.text, question.images


def _fault(path: str, job: Job) -> str | None:
    if job.root is None:
        return f'image "{path}": the task has no folder of pictures; name it with --files {IMAGES}=FOLDER'
    try:
        real = resolve(path, job.root)
        if os.path.isfile(real):
            return None
        place = split_path(real)
        if place is None:
            return f'image "{path}": there is no file {real}'
        open_archive(place[0]).size(place[1])
    except DataError as error:
        return str(error)
    return None
