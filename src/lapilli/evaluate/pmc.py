"""PMC-VQA's part on histopathology, as Quilt-LLaVA asks it: four choices about a figure.

The original's reading takes the first capital that stands before any character, so that `I think C` is `I`; the fixed
reading finds the letter that is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lapilli.base.errors import DataError
from lapilli.evaluate import choices
from lapilli.evaluate.own import LETTERS, mean_scores
from lapilli.evaluate.pairing import by_id, picture_question
from lapilli.evaluate.quilt import cut, with_anchors
from lapilli.evaluate.records import checked, field
from lapilli.evaluate.task import Question, Scores, Task

READ_OPTIONS = frozenset({"suffix"})
SCORE_OPTIONS = frozenset({"parse"})

_LABEL = re.compile(r"^\s*[A-D]\s*[:.]\s*")


def read(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """Questions of `[{id, image, conversations, choices?}]`; the second turn is the right letter.

    `suffix` stands on a line behind the choices. Raises DataError for a record that lacks a field or a letter.
    """
    del task
    path, suffix = files["questions"], str(options.get("suffix", ""))
    made = [_question(record, where, suffix) for where, record in by_id(path, "id").values()]
    return with_anchors(checked(made, str(path)), files)


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
