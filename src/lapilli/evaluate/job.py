"""A task with its data read and checked: what is asked, before a model is there to ask.

Whatever is wrong with the data is said here, in seconds, with counts and first examples.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lapilli.base.errors import DataError
from lapilli.data.archive import open_archive, split_path
from lapilli.data.picture import resolve
from lapilli.evaluate.files import locate
from lapilli.evaluate.readers import READERS
from lapilli.evaluate.records import SHOWN
from lapilli.evaluate.task import Protocol, Question, Task

IMAGES = "images"
"""The part of a task's files where the paths of pictures start."""


@dataclass(frozen=True)
class Job:
    """One task over one set of files."""

    task: Task
    files: dict[str, Path]
    read: dict[Protocol, list[Question]]
    """Every question, as each protocol reads it; all protocols ask the same."""
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


def open_job(
    task: Task,
    data: str | Path,
    protocols: Sequence[Protocol],
    *,
    named: Mapping[str, str] | None = None,
    alone: bool = True,
    limit: int | None = None,
) -> Job:
    """Find and read a task's files. Raises DataError for whatever is wrong with them."""
    files = locate(task, data, named, alone)
    entry = READERS[task.reader]
    read: dict[Protocol, list[Question]] = {}
    for protocol in protocols:
        options = task.options_for(protocol)
        same = next((questions for p, questions in read.items() if task.options_for(p) == options), None)
        read[protocol] = entry.call(task, files, options) if same is None else same
    first: Protocol = protocols[0]
    for other, questions in read.items():
        if [_asks(q) for q in read[first]] != [_asks(q) for q in questions]:
            raise DataError(
                f"task {task.name}: protocols {first} and {other} ask different questions; evaluate them one at a "
                "time with --protocol, each into an --out of its own"
            )
    return Job(task, files, read, limit)


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
