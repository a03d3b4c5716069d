"""Answers files: one JSON object per line, as the original writes them, ours and anybody's.

Every answer is written as it ends, so that a killed evaluation loses nothing but the line it was writing. Files of any
system are read, and joined to the questions by id; what does not join is an error with counts and examples.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from lapilli.base.errors import DataError, RunError
from lapilli.data.sample import IMAGE_PLACEHOLDER
from lapilli.evaluate.records import examples
from lapilli.evaluate.task import Question

log = logging.getLogger(__name__)

_IDS = ("question_id", "questionId", "id", "img_path")  # the last: Q-Bench, whose records are its answers
_TEXTS = ("text", "response", "prediction", "answer")
_SYNC_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an answers file."""

    question_id: str
    text: str
    where: str
    prompt: str | None = None
    round_id: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    model_id: str | None = None


class AnswerLog:
    """The file that a process appends its answers to; a context manager. One process at a time has it.

    A line is handed to the system as it is written, and made durable within a second of the next one. A last line that
    a killed process did not finish is cut off, and said.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: TextIO | None = None
        self._synced = time.monotonic()

    def __enter__(self) -> AnswerLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("a", encoding="utf-8")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._stream.close()
            raise RunError(
                f"{self.path}: another process is writing it; wait for it, or choose another --out"
            ) from error
        cut_torn_line(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None

    def add(self, line: Mapping[str, Any]) -> None:
        """Append one line."""
        assert self._stream is not None
        self._stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._stream.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._stream.fileno())
            self._synced = time.monotonic()


def answer_line(question: Question, text: str, model_id: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """An answer in the original's line format.

    `question_id` is the record's own where it has one, of its own type; `prompt` the record's own where it has one,
    else the question without `<image>`. `answer_fields` of the record are written too (the rounds of MMBench).
    """
    raw = question.record.get("question_id", question.id)
    prompt = question.record.get("prompt")
    if not isinstance(prompt, str):
        prompt = _bare(question.text)
    known = {**metadata} if str(raw) == question.id else {"id": question.id, **metadata}
    line = {"question_id": raw, "prompt": prompt, "text": text, "answer_id": uuid.uuid4().hex, "model_id": model_id}
    return {**line, "metadata": known, **question.record.get("answer_fields", {})}


def read_answers(path: str | Path, *, torn: bool = False) -> list[Line]:
    """Every answer of a file: JSON lines, objects one behind the other, a JSON list, or one object of id to text.

    `torn`: a last line that was not finished is left out, and said. Raises DataError for anything else.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        if not torn:
            raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
        text = path.read_bytes().rpartition(b"\n")[0].decode("utf-8")  # a character of the torn line was cut
    if torn and text and not text.endswith("\n"):
        log.warning("%s: its last line is not finished; it is left out, and its question is asked again", path)
        text = text[: text.rfind("\n") + 1]
    return [_line(value, where) for where, value in _objects(text, path)]


@dataclass(frozen=True, slots=True)
class Joined:
    """Answers by question, and what did not join."""

    answers: dict[str, Line]
    """Question id to its answer."""
    strangers: tuple[Line, ...]
    """Answers to no question."""
    repeated: tuple[Line, ...]
    """Second answers to a question."""

    def check(self, source: str) -> None:
        """Raise DataError with counts and first examples if anything did not join."""
        wrong: list[str] = []
        if self.strangers:
            named = examples((line.question_id for line in self.strangers), "answer", "answers")
            wrong.append(f"{named} without a question (first: {self.strangers[0].where})")
        if self.repeated:
            named = examples((line.question_id for line in self.repeated), "answer", "answers")
            wrong.append(f"{named} to a question that has one already (first: {self.repeated[0].where})")
        if wrong:
            raise DataError(
                f"{source}: {'; '.join(wrong)}; are these answers to another task, split or version of the data?"
            )


def join(questions: Sequence[Question], lines: Iterable[Line]) -> Joined:
    """Join answers to questions by id.

    Where several questions share the id of the answers file (rounds; TextVQA's ids are its pictures'), the round or the
    prompt decides, and of questions alike even in that the order.
    """
    by_id = {question.id: question for question in questions}
    by_raw: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_raw[str(question.record.get("question_id", question.id))].append(question)
    answers: dict[str, Line] = {}
    strangers: list[Line] = []
    repeated: list[Line] = []
    for line in lines:
        own = by_id.get(str(line.metadata["id"])) if "id" in line.metadata else None
        fitting = [own] if own is not None else _fitting(line, by_raw.get(line.question_id, []), by_id)
        if not fitting:
            strangers.append(line)
            continue
        free = next((question for question in fitting if question.id not in answers), None)
        if free is None:
            repeated.append(line)
        else:
            answers[free.id] = line
    return Joined(answers, tuple(strangers), tuple(repeated))


def _fitting(line: Line, same_id: Sequence[Question], by_id: Mapping[str, Question]) -> list[Question]:
    if not same_id:
        return [by_id[line.question_id]] if line.question_id in by_id else []
    if len(same_id) == 1:
        return list(same_id)
    if line.round_id is not None:
        return [q for q in same_id if q.record.get("answer_fields", {}).get("round_id", 0) == line.round_id]
    if line.prompt is None:
        return list(same_id)
    asked = _bare(line.prompt)
    return [q for q in same_id if asked in (_bare(q.text), _bare(str(q.record.get("prompt", ""))))]


def cut_torn_line(path: Path) -> None:
    """Cut off a last line that was not finished, and say so. The file may be open for appending."""
    with path.open("rb+") as stream:
        size = stream.seek(0, os.SEEK_END)
        end = size
        while end:
            start = max(0, end - 65536)
            stream.seek(start)
            found = stream.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            log.warning("%s: its last line is not finished; it is left out, and its question is asked again", path)
            stream.truncate(end)


def _bare(text: str) -> str:
    return text.replace(IMAGE_PLACEHOLDER, "").strip()


def _objects(text: str, path: Path) -> list[tuple[str, Any]]:
    """Every JSON value of a text with its place; lists are opened, and an object of id to text."""
    decoder = json.JSONDecoder()
    made: list[tuple[str, Any]] = []
    place, number = _skip(text, 0), 0
    while place < len(text):
        number += 1
        try:
            value, end = decoder.raw_decode(text, place)
        except ValueError as error:
            line = text.count("\n", 0, place) + 1
            raise DataError(f"{path}: line {line}: not JSON ({error})") from error
        made.append((f"{path}: record {number}", value))
        place = _skip(text, end)
    if len(made) == 1 and isinstance(made[0][1], list):
        made = [(f"{path}: record {i}", value) for i, value in enumerate(made[0][1], 1)]
    elif len(made) == 1 and isinstance(made[0][1], dict) and not set(_IDS) & set(made[0][1]):
        pairs = made[0][1].items()
        made = [(f"{path}: {name}", {"question_id": name, "text": value}) for name, value in pairs]
    return made


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _line(value: Any, where: str) -> Line:
    if not isinstance(value, dict):
        raise DataError(f"{where}: an answer is a JSON object, not {type(value).__name__}")
    name = next((value[key] for key in _IDS if key in value), None)
    text = next((value[key] for key in _TEXTS if key in value), None)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise DataError(f"{where}: an answer needs its question's id: {' or '.join(_IDS)}, a text or a whole number")
    if not isinstance(text, str):
        raise DataError(f"{where}: the answer to {name} needs a text: {' or '.join(_TEXTS)}")
    metadata, turn = value.get("metadata"), value.get("round_id")
    prompt = value.get("prompt", value.get("question") if name == value.get("img_path") else None)
    return Line(
        question_id=str(name),
        text=text,
        where=where,
        prompt=prompt if isinstance(prompt, str) else None,
        round_id=turn if isinstance(turn, int) else None,
        metadata=metadata if isinstance(metadata, dict) else {},
        model_id=value["model_id"] if isinstance(value.get("model_id"), str) else None,
    )
