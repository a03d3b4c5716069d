"""GQA: one word or phrase that must be the right one, by kinds of question; and how a model's answers hang together.

What its evaluation needs beyond answers (which questions follow from which, what may be said at all) is in files that
were not published for every split; what they would give is then left out, and said.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapilli.base.atomic import write_json
from lapilli.base.errors import DataError
from lapilli.data.sample import Image
from lapilli.evaluate.own import mean_scores
from lapilli.evaluate.question_files import llava_questions, with_image
from lapilli.evaluate.records import SHOWN, checked, field, read_json
from lapilli.evaluate.task import Question, Scores, Task

OPTIONS = frozenset({"suffix"})

_SEMANTIC = {"attr": "attribute", "cat": "category", "global": "scene", "obj": "object", "rel": "relation"}
_FINAL_STEPS = ("exist", "query: name", "choose name")
"""Steps of a question's program that only ask and do not reason."""
_COMMON = frozenset({"color", "material", "shape"})
"""What may be said to a question for what two things have in common; its choices list other words."""


def read(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """Questions of LLaVA's file, with the answers of GQA's questions file if it is there; or of GQA's own alone.

    GQA's own file has its answers, and may ask questions outside the balanced set: they count for consistency alone.
    """
    del task
    path = files["questions"]
    if _is_own(path):
        made = _own_questions(path, str(options.get("suffix", "")))
        return [_with_truth(question, question.record) for question in made]
    made = llava_questions(path)
    if "truth" not in files:
        return made
    truths = _records(files["truth"])
    unknown = [question.id for question in made if question.id not in truths]
    if unknown:
        raise DataError(
            f"{files['truth']}: lacks {len(unknown)} of the questions (first: {', '.join(unknown[:SHOWN])}); "
            f"is it of another split?"
        )
    return [_with_truth(question, truths[question.id]) for question in made]


def prediction(answer: str) -> str:
    """An answer as LLaVA submits it: lower case, without the periods at its end."""
    return answer.rstrip(".").lower()


def score(questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]) -> Scores:
    """What GQA's eval.py prints: accuracy, also of binary and open questions, by kinds of question and their length.

    `distribution` is the chi-square distance of the answers' distribution from the true one (lower is better).
    Consistency is given where every question that follows from a balanced one was asked, validity and plausibility
    where the choices file is there.
    """
    said = {question.id: prediction(answers[question.id]) for question in questions}
    balanced = [question for question in questions if question.record.get("isBalanced", True)]
    if not balanced:
        raise DataError("no question of GQA's balanced set among those that were asked")
    items = {question.id: float(said[question.id] == question.truth) for question in balanced}
    made = mean_scores(balanced, items, said)
    values, notes = dict(made.values), []
    for kind, rate in made.groups.get("answers", {}).items():
        values[kind] = rate["accuracy"]
    distance = _distribution(balanced, said)
    if distance is not None:
        values["distribution"] = distance
    for part in (_consistency(questions, balanced, said), _choices(balanced, said, options.get("files", {}))):
        if isinstance(part, str):
            notes.append(part)
        else:
            values.update(part)
    if len(balanced) < len(questions):
        notes.append(f"{len(questions) - len(balanced)} questions outside the balanced set count for consistency alone")
    return replace(made, values=values, notes=tuple(notes))


def submit(
    questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any], folder: Any
) -> list[Path]:
    """The predictions file that GQA's eval.py reads: `questionId` and `prediction`."""
    del options
    path = Path(folder) / "testdev_balanced_predictions.json"
    rows = [{"questionId": q.record["question_id"], "prediction": prediction(answers[q.id])} for q in questions]
    write_json(path, rows)
    return [path]


# ---- beyond accuracy -----------------------------------------------------------------------------------------------


def _distribution(balanced: Sequence[Question], said: Mapping[str, str]) -> float | None:
    """Chi-square distance of answers from truths per global group, weighed by its questions, over 100."""
    true: defaultdict[str, Counter[str]] = defaultdict(Counter)
    given: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in balanced:
        group = (question.record.get("groups") or {}).get("global")
        if group is not None:
            true[group][question.truth] += 1
            given[group][said[question.id]] += 1
    count = sum(names.total() for names in true.values())
    if not count:
        return None
    distances = {
        group: sum((given[group][name] - wanted) ** 2 / wanted for name, wanted in names.items())
        for group, names in true.items()
    }
    return sum(distances[group] * names.total() for group, names in true.items()) / count / 100


def _consistency(
    questions: Sequence[Question], balanced: Sequence[Question], said: Mapping[str, str]
) -> dict[str, float] | str:
    """Of what follows from each right answer, how much is answered right; or why that is not known."""
    right = {question.id: said[question.id] == question.truth for question in questions}
    followed = {q.id: [name for name in q.record.get("entailed", ()) if name != q.id] for q in balanced}
    if not any(followed.values()):
        return "no consistency: the questions file does not say what follows from what"
    lost = {name for names in followed.values() for name in names} - right.keys()
    if lost:
        return (
            f"no consistency: {len(lost)} of the questions that follow from the balanced ones were not asked (they are "
            f"in GQA's file of all questions)"
        )
    shares = [sum(map(right.__getitem__, names)) / len(names) for q, names in followed.items() if names and right[q]]
    return {"consistency": 100 * sum(shares) / len(shares) if shares else 0.0}


def _choices(balanced: Sequence[Question], said: Mapping[str, str], files: Mapping[str, Any]) -> dict[str, float] | str:
    """How many answers are possible at all, and likely; or why that is not known."""
    if "choices" not in files:
        return "no validity and plausibility: no choices file (GQA publishes none for testdev)"
    choices = _records(files["choices"])
    counts = Counter[str]()
    for question in balanced:
        if question.id not in choices:
            raise DataError(f"{files['choices']}: has no question {question.id}")
        common = "Common" in str((question.record.get("types") or {}).get("detailed", ""))
        for name, key in (("validity", "valid"), ("plausibility", "plausible")):
            counts[name] += said[question.id] in (_COMMON if common else choices[question.id].get(key, ()))
    return {name: 100 * counts[name] / len(balanced) for name in ("validity", "plausibility")}


# ---- records -------------------------------------------------------------------------------------------------------


def _is_own(path: Any) -> bool:
    """Whether this is GQA's own file, one object of id to question; LLaVA's has an object with its id per line."""
    try:
        with Path(path).open(encoding="utf-8-sig", errors="replace") as stream:
            return '"question_id"' not in stream.readline(65536)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error


def _records(path: Any) -> dict[str, dict[str, Any]]:
    value = read_json(path)
    if not isinstance(value, dict) or not all(isinstance(one, dict) for one in value.values()):
        raise DataError(f"{path}: must be a JSON object of question id to object, as GQA publishes it")
    return value


def _own_questions(path: Any, suffix: str) -> list[Question]:
    made = []
    for name, record in _records(path).items():
        where = f"{path}: {name}"
        text = with_image(field(record, "question", where) + suffix)
        image = Image(path=f"{field(record, 'imageId', where)}.jpg")
        made.append(Question(id=name, text=text, images=(image,), record={**record, "question_id": name}, where=where))
    return checked(made, str(path))


def _with_truth(question: Question, record: Mapping[str, Any]) -> Question:
    where = f"{question.where}: question {question.id}"
    groups: dict[str, str] = {}
    types = record.get("types")
    if isinstance(types, dict):
        structural = str(types.get("structural"))
        semantic = str(types.get("semantic"))
        groups["answers"] = "open" if structural == "query" else "binary"
        groups["structural"] = structural
        groups["semantic"] = _SEMANTIC.get(semantic, semantic)
    if isinstance(record.get("semantic"), list):
        groups["steps"] = str(_steps(record["semantic"]))
    if isinstance(record.get("question"), str):
        groups["words"] = str(len(record["question"].split()))
    kept = {key: record[key] for key in ("isBalanced", "entailed", "groups", "types") if key in record}
    truth = field(record, "answer", where)
    return replace(question, truth=truth, groups=groups, record={**question.record, **kept})


def _steps(program: Sequence[Mapping[str, Any]]) -> int:
    """Reasoning steps of a question's program."""
    named = (f"{step.get('operation')}: {step.get('argument')}" for step in program)
    return sum(not any(final in step for final in _FINAL_STEPS) for step in named)
