"""PMC-VQA's part on histopathology, as Quilt-LLaVA asks it: four choices about a figure.

The original's reading takes the first capital that stands before any character, so that `I think C` is `I`; the fixed
reading finds the letter that is named.
"""

from __future__ import annotations

import codecs
import csv
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapilli.base.errors import DataError
from lapilli.evaluate import choices
from lapilli.evaluate.own import LETTERS, mean_scores
from lapilli.evaluate.pairing import Record, by_id, picture_question
from lapilli.evaluate.quilt import cut, with_anchors
from lapilli.evaluate.records import checked, field
from lapilli.evaluate.task import Question, Scores, Task

log = logging.getLogger(__name__)

READ_OPTIONS = frozenset({"suffix"})
SCORE_OPTIONS = frozenset({"parse"})

_COLUMNS = ("Figure_path", "Question", "Choice A", "Choice B", "Choice C", "Choice D", "Answer", "in_quilt")
_LABEL = re.compile(r"^\s*[A-D]\s*[:.]\s*")


def read(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """Questions of `[{id, image, conversations, choices?}]`, whose second turn is the right letter, or of the table
    that Quilt-LLaVA publishes, whose rows of `in_quilt` false are asked.

    `suffix` stands on a line behind the choices. Raises DataError for a record that lacks a field or a letter.
    """
    del task
    path, suffix = files["questions"], str(options.get("suffix", ""))
    records = list(by_id(path, "id").values()) if _is_json(path) else list(_table(Path(path)))
    made = [_question(record, where, suffix) for where, record in records]
    return with_anchors(checked(made, str(path)), files)


def _is_json(path: Any) -> bool:
    try:
        with Path(path).open("rb") as stream:
            return stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"[", b"{")
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error


def _table(path: Path) -> Iterator[Record]:
    """The rows that Quilt-LLaVA asks, numbered, as its convert_pmcvqa_for_eval.py writes them."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            lacking = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if lacking:
                raise DataError(f"{path}: no column {', '.join(lacking)}; it has: {', '.join(reader.fieldnames or ())}")
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: neither JSON nor a table in UTF-8 ({error})") from error
    kept = [
        (number, row) for number, row in enumerate(rows, 1) if not _is_true(row["in_quilt"], f"{path}: row {number}")
    ]
    log.info("%s: %d of %d rows are asked; the others are in Quilt", path, len(kept), len(rows))
    for place, (number, row) in enumerate(kept):
        listed = [row[f"Choice {letter}"] for letter in "ABCD"]
        text = "\n".join([row["Question"], *listed]).replace("\n ", "\n")
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": row["Answer"]}]
        record = {"id": place, "image": row["Figure_path"], "conversations": turns, "choices": listed}
        yield f"{path}: row {number}", record


def _is_true(cell: str, where: str) -> bool:
    if cell.lower() not in ("true", "false"):
        raise DataError(f'{where}: "in_quilt" is "{cell}"; it must be True or False')
    return cell.lower() == "true"


def _question(record: Mapping[str, Any], where: str, suffix: str) -> Question:
    turns = [
        str(turn.get("value", "")) for turn in field(record, "conversations", where, list) if isinstance(turn, dict)
    ]
    if len(turns) < 2 or not all(turns[:2]):
        raise DataError(f'{where}: "conversations" must hold a question and its answer, {{"from": ..., "value": ...}}')
    listed = tuple(_LABEL.sub("", str(choice)).strip() for choice in record.get("choices", ()))
    image = field(record, "image", where) if "image" in record else None
    made = picture_question(record, where, image=image, text=turns[0], name="id", suffix=suffix)
    letters = LETTERS[: len(listed) or 4]
    if turns[1] not in letters:
        raise DataError(f'{where}: its answer is "{turns[1]:.80}"; it must be one of {", ".join(letters)}')
    kept = {"question_id": record["id"], "prompt": made.text}
    return replace(made, truth=turns[1], choices=listed or tuple(letters), record=kept)


def score(questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]) -> Scores:
    """Accuracy, and `image_accuracy` of the questions with a picture. `parse: llava` is Quilt-LLaVA's rule."""
    llava = options.get("parse", "fixed") == "llava"
    texts = {q.id: cut(q, answers[q.id]) if llava else answers[q.id] for q in questions}
    letters: dict[str, str | None] = {
        q.id: choices.pmc(texts[q.id]) if llava else choices.fixed(texts[q.id], q.choices) for q in questions
    }
    right = {q.id: float(letters[q.id] == q.truth) for q in questions}
    read_as = {name: letter or "" for name, letter in letters.items()}
    made = mean_scores(questions, right, read_as, choices.unread_note(questions, letters, llava))
    pictured = [right[q.id] for q in questions if q.images]
    more = {"image_accuracy": 100 * sum(pictured) / len(pictured)} if pictured else {}
    return replace(made, values={**made.values, **more})
