"""What there is to judge: questions, contexts and answers as the originals' files have them, joined by id.

The originals pair the files line by line and check nothing; here what does not join is an error with counts and first
examples, before anything is asked or paid for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapilli.base.errors import DataError, RecipeError, unknown
from lapilli.evaluate.answers import Line, join, read_answers
from lapilli.evaluate.judge.rules import STYLES, Rule, Style, choose_rule, rule_key
from lapilli.evaluate.pairing import Record, by_id, must_match
from lapilli.evaluate.ranks import answer_files
from lapilli.evaluate.records import examples, field, read_records
from lapilli.evaluate.task import Question


@dataclass(frozen=True, slots=True)
class Item:
    """One question to judge, with two answers to compare or one to grade."""

    number: int
    """Its place in the questions file, from 1; what the original calls `id`."""
    question_id: str | int
    category: str | None
    question: str
    style: Style
    rule: Rule
    answers: tuple[str, ...]
    answer_ids: tuple[Any, ...]
    context: str | None = None
    """What the judge reads in place of the picture; of style `grade` the reference answer."""
    image: str | None = None
    groups: Mapping[str, str] | None = None

    @property
    def id(self) -> str:
        return str(self.question_id)

    @property
    def graded(self) -> bool:
        return self.style == "grade"


def read_items(
    questions: str | Path,
    answers: Sequence[str | Path],
    rules: Mapping[str, Rule],
    *,
    context: str | Path | None = None,
    style: str | None = None,
) -> list[Item]:
    """The original's files: questions, two answers files (the reference first) and, for pictures, contexts.

    Contexts are joined by `question_id` where every one has it, else by `image`. Without `style` the contexts' fields
    tell it. Raises DataError for records that lack a field or do not join, and for a category without a rule.
    """
    if len(answers) != 2:
        raise RecipeError(f"--answers: name two files, the reference's answers first, not {len(answers)}")
    asked = by_id(questions, "question_id")
    if not asked:
        raise DataError(f"{questions}: no questions in it")
    sides = [_side(path, asked, questions) for path in answers]
    contexts = _Contexts.read(context) if context is not None else None
    chosen = _choose_style(style, contexts)
    if contexts is not None and chosen != "text":
        contexts.must_hold(asked)
    made = []
    for number, (name, (where, record)) in enumerate(asked.items(), 1):
        category = record.get("category")
        if category is not None and not isinstance(category, str):
            raise DataError(f'{where}: "category" must be a text, not {category!r:.80}')
        (first_where, first), (second_where, second) = (side[name] for side in sides)
        image = record.get("image")
        made.append(
            Item(
                number=number,
                question_id=record["question_id"],
                category=rule_key("bench", category) if chosen == "bench" else category,
                question=field(record, "text", where),
                style=chosen,
                rule=choose_rule(rules, chosen, category, where),
                answers=(field(first, "text", first_where), field(second, "text", second_where)),
                answer_ids=(first.get("answer_id", first["question_id"]), second.get("answer_id", name)),
                context=contexts.of(name, record) if contexts is not None and chosen != "text" else None,
                image=image if isinstance(image, str) else None,
            )
        )
    return made


def task_items(
    task: str, questions: Sequence[Question], answers: str | Path, rules: Mapping[str, Rule], style: str | None = None
) -> list[Item]:
    """A task's questions and one answers file of a model, as `question_items` takes them."""
    lines = _task_answers(task, questions, answers)
    return question_items(task, questions, {name: line.text for name, line in lines.items()}, rules, style)


def question_items(
    task: str, questions: Sequence[Question], answers: Mapping[str, str], rules: Mapping[str, Rule], style: str | None
) -> list[Item]:
    """A task's questions with a model's answers by id.

    Where the task's records hold a `context` and a `reference` (LLaVA-Bench), the reference is the first of two
    answers; else the answer is graded against `reference` or the expected answers. Raises DataError where there is
    neither.
    """
    return [_item(task, n, question, answers[question.id], rules, style) for n, question in enumerate(questions, 1)]


def has_reference(question: Question) -> bool:
    """Whether there is something to judge an answer to this question by."""
    return isinstance(question.record.get("reference"), str) or _expected(question.truth) is not None


def _item(
    task: str, number: int, question: Question, answer: str, rules: Mapping[str, Rule], style: str | None
) -> Item:
    reference, context = question.record.get("reference"), question.record.get("context")
    pair = isinstance(context, str) and isinstance(reference, str)
    chosen = _named(style) if style else ("bench" if pair else "grade")
    category = next(iter(question.groups.values()), None)
    expected = reference if isinstance(reference, str) else _expected(question.truth)
    if expected is None:
        raise DataError(f"{question.where}: task {task} has no reference answer to judge against")
    if chosen in ("bench", "visual", "quilt") and not isinstance(context, str):
        raise DataError(f'{question.where}: style "{chosen}" wants a context, which task {task} does not have')
    raw = question.record.get("question_id", question.id)
    return Item(
        number=number,
        question_id=question.id if str(raw) != question.id else raw,
        category=rule_key("bench", category) if chosen == "bench" else category,
        question=question.text.replace("<image>", "").strip(),
        style=chosen,
        rule=choose_rule(rules, chosen, category, question.where),
        answers=(answer,) if chosen == "grade" else (expected, answer),
        answer_ids=(raw,) if chosen == "grade" else (raw, raw),
        context=expected if chosen == "grade" else (context if chosen != "text" else None),
        image=question.images[0].path if question.images else None,
        groups=question.groups or None,
    )


def _task_answers(task: str, questions: Sequence[Question], answers: str | Path) -> dict[str, Line]:
    path = Path(answers)
    joined = join(questions, [line for file in answers_files(path, task) for line in read_answers(file)])
    joined.check(str(path))
    lacking = [question.id for question in questions if question.id not in joined.answers]
    if lacking:
        raise DataError(f"{path}: {examples(lacking, 'question', 'questions')} of task {task} without an answer")
    return joined.answers


def answers_files(path: str | Path, task: str | None) -> list[Path]:
    """The answers files that a path means: itself, or those of a task in the output of an evaluation.

    Raises DataError for a folder that has none.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return [path]
    found = answer_files(path) or (answer_files(path / task) if task is not None else [])
    if not found:
        raise DataError(f"{path}: no answers in it; name an answers file, or what `lapilli evaluate --out` wrote")
    return found


def answers_name(path: str | Path, task: str | None) -> str:
    """What tables call the model that gave these answers: as its lines do, else the file's name."""
    files = answers_files(path, task)
    named = {line.model_id for file in files for line in read_answers(file) if line.model_id}
    return ", ".join(sorted(named)) or Path(path).stem


def _expected(truth: Any) -> str | None:
    """The expected answers of a user's own question as one text."""
    if isinstance(truth, str):
        return truth
    if isinstance(truth, tuple) and truth and all(isinstance(one, str) for one in truth):
        return " <OR> ".join(truth)
    return None


def _side(path: str | Path, asked: Mapping[str, Record], questions: str | Path) -> dict[str, Record]:
    known = by_id(path, "question_id")
    must_match(asked, known, questions, path)
    return known


def _named(style: str) -> Style:
    for known in STYLES:
        if style == known:
            return known
    raise RecipeError(f"--style: {unknown('style', style, STYLES)}")


def _choose_style(style: str | None, contexts: _Contexts | None) -> Style:
    found: Style = contexts.style if contexts is not None else "text"
    if style is None:
        return found
    named = _named(style)
    if named == "grade":
        raise RecipeError('--style grade: only with --task; files of two answers are compared ("text", "bench", ...)')
    if named not in ("text", found):
        wanted = "has none" if contexts is None else f'looks like "{found}"'
        raise RecipeError(f"--style {named}: the context {wanted}; {_WANTS[named]}")
    return named


_WANTS = {
    "visual": '"visual" wants "captions" (a list) and "instances" (each with "category" and "bbox")',
    "bench": '"bench" wants "caption"',
    "quilt": '"quilt" wants "text" under the question\'s id',
}


@dataclass(frozen=True)
class _Contexts:
    """A context file: its texts by question id or by picture."""

    path: str | Path
    style: Style
    key: str
    texts: dict[str, str]

    @classmethod
    def read(cls, path: str | Path) -> _Contexts:
        records = read_records(path)
        if not records:
            raise DataError(f"{path}: no contexts in it")
        first = records[0][1]
        style: Style | None = next((style for name, style in _FIELDS.items() if name in first), None)
        if style is None:
            raise DataError(f'{path}: contexts have "captions" and "instances", "caption", or "text"; these have: '
                            f"{', '.join(first)}")  # fmt: skip
        key = "question_id" if all("question_id" in record for _, record in records) else "image"
        texts: dict[str, str] = {}
        for where, record in records:
            name = str(field(record, key, where, (str, int)))
            text = _context(record, style, where)
            if texts.setdefault(name, text) != text:
                raise DataError(f'{where}: another context for {key} "{name}" stands before it')
        return cls(path, style, key, texts)

    def must_hold(self, asked: Mapping[str, Record]) -> None:
        """Raise DataError if a question has no context."""
        names = {
            name: name if self.key == "question_id" else str(record.get("image")) for name, (_, record) in asked.items()
        }
        lacking = [name for name, key in names.items() if key not in self.texts]
        if lacking:
            raise DataError(
                f"{self.path}: {examples(lacking, 'question', 'questions')} without a context (by {self.key})"
            )

    def of(self, name: str, record: Mapping[str, Any]) -> str:
        return self.texts[name if self.key == "question_id" else str(record["image"])]


_FIELDS: dict[str, Style] = {"captions": "visual", "caption": "bench", "text": "quilt"}


def _context(record: Mapping[str, Any], style: Style, where: str) -> str:
    """The context as the original writes it into the prompt."""
    if style == "quilt":
        return field(record, "text", where)
    if style == "bench":
        caption = field(record, "caption", where, (str, list))
        return caption if isinstance(caption, str) else "\n".join(map(str, caption))
    captions = "\n".join(map(str, field(record, "captions", where, list)))
    boxes = []
    for one in field(record, "instances", where, list):
        if not isinstance(one, dict) or "category" not in one or "bbox" not in one:
            raise DataError(f'{where}: "instances" must be objects with "category" and "bbox", not {one!r:.80}')
        boxes.append(f"{one['category']}: {one['bbox']}")
    return captions + "\n\n" + "\n".join(boxes)
