"""ScienceQA's problems as prompts and answers, in every form that the original's conversion knows.

A form is `INPUT-OUTPUT`, such as `CQM-A` or `QCM-LEPA`: the order of context, question and choices, and of answer,
lecture and explanation. As in the original (convert_sqa_to_llava.py), `AL` gives the solution and `AE` the lecture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lapilli.base.atomic import atomic_write
from lapilli.base.errors import DataError, RecipeError, unknown
from lapilli.data.sample import IMAGE_PLACEHOLDER
from lapilli.evaluate.own import LETTERS
from lapilli.evaluate.records import examples, field, read_json

MAX_CHOICES = 5

Style = Literal["llava", "jsonl"]
"""`llava`: conversations in one JSON list; `jsonl`: lines of instruction and output."""

_BECAUSE = "BECAUSE:"


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of problems.json, checked."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: str
    """The right letter."""
    hint: str
    lecture: str
    solution: str
    image: str | None
    """Relative to the folder of the split's pictures."""
    record: Mapping[str, Any]
    where: str

    @property
    def context(self) -> str:
        return self.hint.strip() or "N/A"

    @property
    def options(self) -> str:
        return " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))


_INPUTS: dict[str, str] = {
    "CQM": "Context: {context}\nQuestion: {question}\nOptions: {options}",
    "QCM": "Question: {question}\nContext: {context}\nOptions: {options}",
    "QCML": "Question: {question}\nContext: {context}\nOptions: {options}\nBECAUSE: {lecture}",
    "QCME": "Question: {question}\nContext: {context}\nOptions: {options}\nBECAUSE: {solution}",
    "QCMLE": "Question: {question}\nContext: {context}\nOptions: {options}\nBECAUSE: {lecture} {solution}",
    "QCLM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture}\nOptions: {options}",
    "QCEM": "Question: {question}\nContext: {context}\nBECAUSE: {solution}\nOptions: {options}",
    "QCLEM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture} {solution}\nOptions: {options}",
}
_OUTPUTS: dict[str, str] = {
    "A": "Answer: The answer is {answer}.",
    "AL": "Answer: The answer is {answer}. BECAUSE: {solution}",
    "AE": "Answer: The answer is {answer}. BECAUSE: {lecture}",
    "ALE": "Answer: The answer is {answer}. BECAUSE: {lecture} {solution}",
    "AEL": "Answer: The answer is {answer}. BECAUSE: {solution} {lecture}",
    "LA": "Answer: {lecture} The answer is {answer}.",
    "EA": "Answer: {solution} The answer is {answer}.",
    "LEA": "Answer: {lecture} {solution} The answer is {answer}.",
    "ELA": "Answer: {solution} {lecture} The answer is {answer}.",
    "LEPA": "{lecture_line}{solution_line}###\nANSWER: {answer}.",
}


def form(name: str) -> tuple[str, str]:
    """The input and output form of `QCM-LEPA` and the like. Raises RecipeError naming the nearest."""
    asked, _, told = name.partition("-")
    if asked not in _INPUTS:
        raise RecipeError(f'prompt format "{name}": {unknown("input form", asked, _INPUTS)}')
    if told not in _OUTPUTS:
        raise RecipeError(f'prompt format "{name}": {unknown("output form", told, _OUTPUTS)}')
    return asked, told


def prompt_and_answer(problem: Problem, name: str) -> tuple[str, str]:
    """What a model is asked and what it should answer, to the letter of the original, without the picture's place."""
    asked, told = form(name)
    lecture, solution = _unescaped(problem.lecture), _unescaped(problem.solution)
    fields = {
        "context": problem.context,
        "question": problem.question,
        "options": problem.options,
        "answer": problem.answer,
        "lecture": lecture,
        "solution": solution,
        "lecture_line": f"LECTURE: {lecture}\n" if lecture.strip() else "",
        "solution_line": f"SOLUTION: {solution}\n" if solution.strip() else "",
    }
    prompt, answer = _tidy(_INPUTS[asked].format(**fields) + "\n"), _tidy(_OUTPUTS[told].format(**fields))
    # The original removes the label wherever it stands, if the text begins with it.
    if prompt.startswith("Question: "):
        prompt = prompt.replace("Question: ", "")
    if answer.startswith("Answer: "):
        answer = answer.replace("Answer: ", "")
    return prompt, answer


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n")


def _tidy(text: str) -> str:
    """Double blanks become single ones, once; an empty reason at the end goes, and its label wherever it stands."""
    text = text.replace("  ", " ").strip()
    return text.replace(_BECAUSE, "").strip() if text.endswith(_BECAUSE) else text


# ---- files ---------------------------------------------------------------------------------------------------------


def read_problems(problems: str | Path, splits: str | Path, split: str) -> list[Problem]:
    """The problems of a split, in its order, checked. Raises DataError naming file, problem and field."""
    known, ids = read_json(problems), read_json(splits)
    if not isinstance(known, dict) or not isinstance(ids, dict):
        raise DataError(f"{problems}, {splits}: both must be JSON objects: id to problem, split to ids")
    if split not in ids:
        raise DataError(f"{splits}: {unknown('split', split, ids)}")
    names = [str(name) for name in ids[split]]
    lacking = [name for name in names if name not in known]
    if lacking:
        raise DataError(
            f"{problems}: {examples(lacking, 'problem', 'problems')} of split {split} in {splits} not in it"
        )
    return [_problem(name, known[name], f"{problems}: problem {name}") for name in names]


def _problem(name: str, record: Any, where: str) -> Problem:
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be a JSON object, not {type(record).__name__}")
    choices, answer = field(record, "choices", where, list), field(record, "answer", where, int)
    if not all(isinstance(choice, str) for choice in choices) or not 0 < len(choices) <= MAX_CHOICES:
        raise DataError(f'{where}: "choices" must be 1 to {MAX_CHOICES} texts, not {choices!r:.80}')
    if not 0 <= answer < len(choices):
        raise DataError(f'{where}: "answer" is {answer}; there are choices 0 to {len(choices) - 1}')
    image = record.get("image")
    if image is not None and not isinstance(image, str):
        raise DataError(f'{where}: "image" must be a file name or null, not {image!r:.80}')
    return Problem(
        id=name,
        question=field(record, "question", where),
        choices=tuple(choices),
        answer=LETTERS[answer],
        hint=_text(record, "hint", where),
        lecture=_text(record, "lecture", where),
        solution=_text(record, "solution", where),
        image=None if image is None else f"{name}/{image}",
        record=record,
        where=where,
    )


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    return field(record, key, where) if key in record else ""


def convert(base: str | Path, split: str, name: str, style: Style = "llava", out: str | Path | None = None) -> Path:
    """Write a split in a form, under the original's file name in `base` or as `out`; returns the file.

    Raises DataError for what is wrong in problems.json or pid_splits.json, RecipeError for an unknown form.
    """
    form(name)
    base = Path(base).expanduser()
    problems = read_problems(base / "problems.json", base / "pid_splits.json", split)
    if style == "llava":
        place = base / f"llava_{split}_{name}.json"
        text = json.dumps(list(_conversations(problems, name)), indent=2)
    else:
        place = base / f"scienceqa_{split}_{name}.jsonl"
        text = "".join(json.dumps(line) + "\n" for line in _lines(problems, name))
    place = Path(out).expanduser() if out is not None else place
    atomic_write(place, text)
    return place


def _conversations(problems: Sequence[Problem], name: str) -> Iterator[dict[str, Any]]:
    for problem in problems:
        head, asked, told = _parts(problem, name)
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]
        yield {**head, "conversations": turns}


def _lines(problems: Sequence[Problem], name: str) -> Iterator[dict[str, Any]]:
    for problem in problems:
        head, asked, told = _parts(problem, name)
        yield {**head, "instruction": asked, "output": told}


def _parts(problem: Problem, name: str) -> tuple[dict[str, Any], str, str]:
    asked, told = prompt_and_answer(problem, name)
    if problem.image is None:
        return {"id": problem.id}, asked, told
    return {"id": problem.id, "image": problem.image}, f"{asked}\n{IMAGE_PLACEHOLDER}", told
