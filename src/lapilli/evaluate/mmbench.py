"""MMBench and MMBench-CN: choices among up to four, each question asked with its choices in every rotation.

A question counts as right if the model is right in every rotation (CircularEval, Liu et al., 2023). The benchmark's TSV
files may hold the rotations already, as rows whose index is a million or more above the question's; where they don't,
the rotations are made here.
"""

from __future__ import annotations

import base64
import binascii
import csv
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lapilli.base.errors import DataError, RecipeError, RunError, unknown
from lapilli.data.sample import IMAGE_PLACEHOLDER, Image
from lapilli.evaluate import choices
from lapilli.evaluate.own import mean_scores
from lapilli.evaluate.records import checked
from lapilli.evaluate.task import Question, Scores, Task

log = logging.getLogger(__name__)

READ_OPTIONS = frozenset({"suffix", "rounds"})

OPTIONS = "ABCD"
ROUND = 1_000_000
"""Index of a rotated row: the question's, plus a multiple of this."""

_EMPTY = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"}
    | {"NULL", "NaN", "None", "n/a", "nan", "null"}
)
"""Cells that pandas, which the original reads with, takes for empty. It stops at `nan` and `none` in any case too."""

_DROPPED = frozenset({"hint", "category", "source", "image", "comment", "l2-category"})
_PREDICTION = 6
"""Columns that a submission lacks, and the place of the answers in it (convert_mmbench_for_submission.py)."""


def read(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """Questions of a TSV file with pictures in base64.

    `rounds: single` asks every row once; `rounds: all` asks every question in all rotations of its choices, letters
    staying in place (the original's --all-rounds). `suffix` stands on a line behind the choices. Raises DataError
    naming the row, RunError if the writer of the submission is not installed.
    """
    if find_spec("openpyxl") is None:
        raise RunError("MMBench is submitted as an Excel file: pip install 'lapilli[eval]'")
    rounds = options.get("rounds", "single")
    if rounds not in ("single", "all"):
        raise RecipeError(f"options.rounds: {unknown('value', str(rounds), ('single', 'all'))}")
    path, suffix = Path(files["questions"]), str(options.get("suffix", ""))
    rows = list(_rows(path))
    pictures = _pictures(rows, path)
    if rounds == "all":
        given = len(rows)
        rows = [row for row in rows if _index(row, path) < ROUND]
        if len(rows) < given:
            log.warning("%s: %d rows rotate others; the rotations are made here instead", path, given - len(rows))
    made: list[Question] = []
    for row in rows:
        count = len(_choices(row, path)) if rounds == "all" else 1
        made += [_question(row, path, pictures[row["index"]], turn, suffix) for turn in range(count)]
    return checked(made, str(path))


def _rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream, _long_cells():
            reader = csv.DictReader(stream, delimiter="\t")
            columns = reader.fieldnames or []
            lacking = [name for name in ("index", "question", "A", "B", "image") if name not in columns]
            if lacking:
                raise DataError(f"{path}: no column {', '.join(lacking)}; it has: {', '.join(columns)}")
            for number, row in enumerate(reader, 2):
                if None in row:
                    raise DataError(f"{path}: line {number}: more cells than the header has columns")
                yield {name: cell or "" for name, cell in row.items()}
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a TSV file in UTF-8 ({error})") from error


@contextmanager
def _long_cells() -> Iterator[None]:
    """Let the csv module take cells as long as a picture, for as long as a file is read."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _index(row: Mapping[str, str], path: Path) -> int:
    try:
        return int(row["index"])
    except ValueError as error:
        raise DataError(f'{path}: index "{row["index"]}" must be a whole number') from error


def _pictures(rows: Sequence[Mapping[str, str]], path: Path) -> dict[str, bytes]:
    """Index to its encoded picture; rows of one picture share its bytes. A cell may name another row's index."""
    cells = {row["index"]: row["image"] for row in rows}
    decoded: dict[str, bytes] = {}
    made: dict[str, bytes] = {}
    for name, own in cells.items():
        cell = cells.get(own, own)
        if cell not in decoded:
            try:
                decoded[cell] = base64.b64decode(cell, validate=True)
            except (binascii.Error, ValueError) as error:
                raise DataError(f"{path}: index {name}: its image is not base64 ({error})") from error
        if not decoded[cell]:
            raise DataError(f"{path}: index {name}: has no image")
        made[name] = decoded[cell]
    return made


def _is_empty(cell: str | None) -> bool:
    return cell is None or cell in _EMPTY or cell.lower() in ("nan", "none")


def _choices(row: Mapping[str, str], path: Path) -> tuple[str, ...]:
    """The choices before the first empty one."""
    made: list[str] = []
    for letter in OPTIONS:
        if _is_empty(row.get(letter)):
            break
        made.append(row[letter])
    if not made:
        raise DataError(f"{path}: index {row['index']}: has no choices")
    return tuple(made)


def _question(row: Mapping[str, str], path: Path, picture: bytes, turn: int, suffix: str) -> Question:
    """A row's question with its choices rotated `turn` places to the front."""
    index, plain = _index(row, path), _choices(row, path)
    rotated = plain[turn:] + plain[:turn]
    text = row["question"] if _is_empty(row.get("hint")) else f"{row['hint']}\n{row['question']}"
    prompt = "\n".join([text, *(f"{letter}. {choice}" for letter, choice in zip(OPTIONS, rotated, strict=False))])
    if IMAGE_PLACEHOLDER in prompt:
        raise DataError(f"{path}: index {index}: its text holds {IMAGE_PLACEHOLDER}, which marks a picture's place")
    truth = None
    if not _is_empty(row.get("answer")):
        letters = OPTIONS[: len(plain)]
        if row["answer"] not in letters:
            raise DataError(f'{path}: index {index}: answer "{row["answer"]}" must be one of {", ".join(letters)}')
        truth = OPTIONS[(OPTIONS.index(row["answer"]) - turn) % len(plain)]
    letters = OPTIONS[: len(plain)]
    kept = {name: cell for name, cell in row.items() if name != "image"}
    logged = {"round_id": turn, "options": list(rotated), "option_char": list(letters[turn:] + letters[:turn])}
    return Question(
        id=f"{index}-{turn}" if turn else str(index),
        text=f"{IMAGE_PLACEHOLDER}\n{prompt}" + (f"\n{suffix}" if suffix else ""),
        images=(Image(data=picture),),
        truth=truth,
        choices=rotated,
        groups={kind: row[kind] for kind in ("category", "l2-category") if not _is_empty(row.get(kind))},
        record={"question_id": index, "prompt": prompt, "answer_fields": logged, "row": kept},
        where=f"{path}: index {index}",
    )


def score(questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]) -> Scores:
    """`accuracy`: questions right in every rotation that was asked; `single_accuracy`: in their first one.

    Answers are read as MMBench's own evaluation reads them before it asks ChatGPT about the rest.
    """
    letters = {q.id: choices.mmbench(answers[q.id], q.choices) for q in questions}
    right = {q.id: letters[q.id] == q.truth for q in questions}
    passes: dict[int, list[Question]] = {}
    for question in questions:
        passes.setdefault(question.record["question_id"] % ROUND, []).append(question)
    incomplete = {q.record["question_id"] % ROUND for q in options.get("missing", ())} & set(passes)
    firsts = [min(same, key=_order) for same in passes.values()]
    items = {
        first.id: float(index not in incomplete and all(right[q.id] for q in same))
        for first, (index, same) in zip(firsts, passes.items(), strict=True)
    }
    made = mean_scores(firsts, items, {name: letter or "" for name, letter in letters.items()})
    single = 100 * sum(right[first.id] for first in firsts) / len(firsts)
    notes = [*choices.unread_note(questions, letters, False)]
    rotated = sum(len(same) > 1 for same in passes.values())
    if rotated:
        notes.append(f"CircularEval: {len(questions)} rotations of {len(passes)} questions")
    else:
        notes.append("every question was asked in one order of its choices: not the CircularEval of the leaderboard")
    if incomplete:
        notes.append(f"{len(incomplete)} questions lack the answer to a rotation; they count as wrong")
    return replace(made, values={**made.values, "single_accuracy": single}, notes=tuple(notes))


def _order(question: Question) -> tuple[int, int]:
    return question.record["question_id"], question.record["answer_fields"]["round_id"]


def submit(
    questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any], folder: Any
) -> list[Path]:
    """Write `mmbench.xlsx` for the evaluation server: the original's columns, with `prediction` the seventh.

    A rotation made here is a row of its own, with its index and its order of choices as the server's files have them;
    the original keeps the last rotation's letter beside the first one's choices.
    """
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    del options
    columns = [name for name in questions[0].record["row"] if name not in _DROPPED]
    columns.insert(min(_PREDICTION, len(columns)), "prediction")
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(columns)
    removed = 0
    for question in questions:
        cells: list[Any] = []
        for name, value in _row(question, answers[question.id]).items():
            text, count = ILLEGAL_CHARACTERS_RE.subn("", value) if isinstance(value, str) else (value, 0)
            removed += count
            cell = WriteOnlyCell(sheet, value=text)
            if isinstance(text, str):
                cell.data_type = "s"  # an answer such as `=1` is no formula
            cells.append((columns.index(name), cell))
        sheet.append([cell for _, cell in sorted(cells, key=lambda pair: pair[0])])
    if removed:
        log.warning("mmbench.xlsx: %d control characters that Excel can't hold were left out", removed)
    path = Path(folder) / "mmbench.xlsx"
    book.save(path)
    return [path]


def _row(question: Question, answer: str) -> dict[str, Any]:
    turn = question.record["answer_fields"]["round_id"]
    made: dict[str, Any] = {
        name: None if cell in _EMPTY else cell for name, cell in question.record["row"].items() if name not in _DROPPED
    }
    made["index"] = question.record["question_id"] + turn * ROUND
    if turn:
        made |= dict(zip(OPTIONS, question.choices, strict=False))
        if question.truth is not None:
            made["answer"] = question.truth
    return {**made, "prediction": answer}
