"""What a report is made of: every task of some output folders, with its questions and each model's answers.

Questions are read again from the task's own files, which have the pictures, the right answers and the groups. Where
these files are gone or have changed, the answers file alone is shown, and the report says what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from lapilli.base.errors import DataError, LapilliError
from lapilli.evaluate.answers import Line, join, read_answers
from lapilli.evaluate.catalogue import load_task, task_names
from lapilli.evaluate.job import IMAGES
from lapilli.evaluate.readers import READERS
from lapilli.evaluate.records import examples, read_jsonl
from lapilli.evaluate.results import TASK, Results, read_results, result_folders
from lapilli.evaluate.task import Protocol, Question, Task


@dataclass(frozen=True)
class Item:
    """What one answer was worth under a protocol, and how it was read."""

    score: float | None
    parsed: str | None
    said: str | None = None
    """The judge's reply, where a judge scored."""


@dataclass(frozen=True)
class Entry:
    """One model's evaluation of one task."""

    model: str
    """As tables call it: no two models of a report alike."""
    folder: Path
    results: Results
    items: Mapping[str, Mapping[str, Item]]
    """Protocol, question id."""
    missing: Mapping[str, str]
    """Question id to the reason why it has no answer."""
    answers: dict[str, Line] = field(default_factory=dict)
    """Question id to answer."""


@dataclass(frozen=True)
class Gathered:
    """One task: its questions, and what each model made of them."""

    name: str
    title: str
    entries: tuple[Entry, ...]
    questions: Mapping[str, Question]
    root: Path | None
    """Where the pictures' paths start; None where they are not known."""
    notes: tuple[str, ...]
    """What the report can't show, and why."""


def gather(outs: Sequence[str | Path]) -> list[Gathered]:
    """Every task of the output folders (or task folders), in order of first appearance.

    Raises DataError for a folder without results, or one that is named twice.
    """
    folders = [{task: folder.resolve() for task, folder in result_folders(out).items()} for out in outs]
    seen = [folder for found in folders for folder in found.values()]
    twice = [str(folder) for folder in dict.fromkeys(seen) if seen.count(folder) > 1]
    if twice:
        raise DataError(f"{examples(twice, 'folder is', 'folders are')} named more than once")
    labels = _labels(outs, folders)
    tasks: dict[str, list[Entry]] = {}
    for label, found in zip(labels, folders, strict=True):
        for task, folder in found.items():
            tasks.setdefault(task, []).append(_entry(label, folder))
    return [_gathered(name, entries) for name, entries in tasks.items()]


def models_of(tasks: Iterable[Gathered]) -> list[str]:
    """Every model of a report, in order."""
    return list(dict.fromkeys(entry.model for task in tasks for entry in task.entries))


def _labels(outs: Sequence[str | Path], folders: Sequence[Mapping[str, Path]]) -> list[str]:
    """Each output folder's model by name, with the folder where a name alone does not tell two apart."""
    names = [", ".join(dict.fromkeys(str(read_results(f).model.get("name", "?")) for f in m.values())) for m in folders]
    made = [name if names.count(name) == 1 else f"{name} ({out})" for name, out in zip(names, outs, strict=True)]
    return [
        label if made.count(label) == 1 else f"{label} {made[: i + 1].count(label)}" for i, label in enumerate(made)
    ]


def _entry(label: str, folder: Path) -> Entry:
    results = read_results(folder)
    items = {protocol: _items(folder / f"items-{protocol}.jsonl") for protocol in results.protocols}
    path = folder / "missing.jsonl"
    missing = {str(line["id"]): str(line["reason"]) for _, line in read_jsonl(path)} if path.is_file() else {}
    return Entry(label, folder, results, items, missing)


def _items(path: Path) -> dict[str, Item]:
    lines = read_jsonl(path) if path.is_file() else []
    return {str(line["id"]): Item(line.get("score"), line.get("parsed"), line.get("said")) for _, line in lines}


def _gathered(name: str, entries: list[Entry]) -> Gathered:
    notes: list[str] = []
    questions, root = _questions(entries, notes)
    by_id = {question.id: question for question in questions}
    lines = {id(entry): _lines(entry, notes) for entry in entries}
    if not by_id:
        for entry in entries:
            for line in lines[id(entry)]:
                known = str(line.metadata.get("id", line.question_id))
                by_id.setdefault(known, Question(known, line.prompt or ""))
    for entry in entries:
        found = join(list(by_id.values()), lines[id(entry)])
        entry.answers.update(found.answers)
        lost = len(found.strangers) + len(found.repeated)
        if lost:
            notes.append(f"{entry.model}: {lost} answers are not shown: no question, or a second answer to one")
    first = entries[0].results
    return Gathered(name, first.title, tuple(entries), by_id, root, tuple(notes))


def _questions(entries: Sequence[Entry], notes: list[str]) -> tuple[list[Question], Path | None]:
    """The task's questions as the first model whose files are still there was asked; none where no files are."""
    why: list[str] = []
    made: tuple[list[Question], Path | None, Entry] | None = None
    for entry in entries:
        try:
            read, root = _read(entry)
        except LapilliError as error:
            why.append(f"{entry.model}: {error}")
            continue
        made = read, root, entry
        break
    if made is None:
        notes.append(f"questions are shown as the answers files have them, without pictures and truth: {why[0]}")
        return [], None
    for entry in entries:
        other = [
            part
            for part, kept in entry.results.files.items()
            if kept.get("sha256") != made[2].results.files.get(part, {}).get("sha256")
        ]
        if other:
            notes.append(f"{entry.model} was evaluated on other files than {made[2].model}: {', '.join(other)}")
    return made[0], made[1]


def _read(entry: Entry) -> tuple[list[Question], Path | None]:
    """Read a task's questions again. Raises LapilliError if its files or its description are not what they were."""
    files: dict[str, Path] = {}
    for part, kept in entry.results.files.items():
        files[part] = Path(kept["path"])
        if not files[part].exists():
            raise DataError(f"{kept['path']} ({part}) is not there any more")
        if "sha256" in kept and _digest(files[part]) != kept["sha256"]:
            raise DataError(f"{kept['path']} ({part}) has changed since the evaluation")
    task = _task(entry)
    protocol = cast(Protocol, next(iter(entry.results.protocols), "llava"))
    read = READERS[task.reader].call(task, files, task.options_for(protocol))
    return read[: entry.results.counts.asked], files.get(IMAGES)


def _task(entry: Entry) -> Task:
    path = entry.folder / TASK
    if not path.is_file():  # written by a version that did not keep it
        if entry.results.task in task_names():
            return load_task(entry.results.task)
        raise DataError(f"{path}: is not there, and {entry.results.task} is no task of lapilli's own")
    try:
        return Task.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise DataError(f"{path}: not the description of a task ({str(error).splitlines()[0]})") from error


def _lines(entry: Entry, notes: list[str]) -> list[Line]:
    """Every answer that was scored, from where it lay or from the task's own folder if that was moved."""
    made: list[Line] = []
    for name, digest in entry.results.answers.items():
        places = [path for path in (entry.folder / Path(name).name, Path(name)) if path.is_file()]
        same = next((path for path in places if _digest(path) == digest), None)
        if same is None:
            state = "has changed since it was scored" if places else "is not there any more"
            notes.append(f"{entry.model}: {name} {state}; its answers are not shown")
        else:
            made += read_answers(same, torn=True)
    return made


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shown_truth(question: Question) -> str:
    """The right answer in a line: letters with their text, several people's answers with how many gave each."""
    truth: Any = question.truth
    if truth is None:
        return ""
    if question.choices:
        index = truth if isinstance(truth, int) and not isinstance(truth, bool) else None
        if isinstance(truth, str) and len(truth) == 1 and truth.isalpha() and truth.isascii():
            index = ord(truth.upper()) - ord("A")
        if index is not None and 0 <= index < len(question.choices):
            return f"{chr(ord('A') + index)}. {question.choices[index]}"
    if isinstance(truth, list | tuple) and all(isinstance(one, str) for one in truth):
        counts = {one: list(truth).count(one) for one in truth}
        return " / ".join(one if count == 1 else f"{one} ({count})" for one, count in counts.items())
    return truth if isinstance(truth, str) else json.dumps(truth, ensure_ascii=False, default=str)
