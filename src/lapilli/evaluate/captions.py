"""Caption sets: a sentence about each picture, compared with people's sentences.

BLEU-1 to 4, ROUGE-L and CIDEr-D; METEOR and SPICE need word nets and parsers and are not offered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lapilli.base.atomic import write_json
from lapilli.base.errors import DataError
from lapilli.data.sample import Image
from lapilli.evaluate.caption_metrics import ORDERS, Words, bleu, cider_d, rouge_l
from lapilli.evaluate.caption_words import words
from lapilli.evaluate.question_files import with_image
from lapilli.evaluate.records import checked, field, read_json
from lapilli.evaluate.task import Question, Scores, Task

READ_OPTIONS = frozenset({"prompt", "split"})


def read(task: Task, files: Mapping[str, Any], options: Mapping[str, Any]) -> list[Question]:
    """A picture a question, the same `prompt` for all; the truth is its captions.

    Takes files in COCO's form (`images`, `annotations`) and in Karpathy's (`images` with `sentences` and `split`), of
    which `split` is read. Pictures without captions are asked and not scored (`annotations` may be missing). A `domain`
    becomes a group, as in NoCaps.
    """
    path = files["questions"]
    prompt = options.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise DataError(f"task {task.name}: options.prompt must say what the model is asked")
    value = read_json(path)
    listed = value.get("images") if isinstance(value, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise DataError(f'{path}: must be a JSON object with a list "images" of objects')
    if any("sentences" in one for one in listed):
        made = _karpathy(listed, str(path), prompt, options.get("split"))
    else:
        made = _coco(listed, value.get("annotations") or [], str(path), prompt)
    return checked(made, str(path))


def score(questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]) -> Scores:
    """CIDEr-D, BLEU and ROUGE-L times 100, of all and of each group by itself; a caption's score is its CIDEr-D.

    A group's CIDEr-D counts rareness in its own references, as if it were a set alone.
    """
    del options
    said = {question.id: words(answers[question.id]) for question in questions}
    known = {question.id: [words(text) for text in _captions(question)] for question in questions}
    values, items = _measures([q.id for q in questions], said, known)
    groups: dict[str, dict[str, dict[str, float]]] = {}
    counts: dict[str, dict[str, int]] = {}
    for kind in sorted({kind for question in questions for kind in question.groups}):
        named = [(q.id, q.groups[kind]) for q in questions if kind in q.groups]
        counts[kind] = dict(sorted(Counter(group for _, group in named).items()))
        groups[kind] = {
            group: _measures([name for name, its in named if its == group], said, known)[0] for group in counts[kind]
        }
    empty = sum(not found for found in said.values())
    notes = [f"{empty} of {len(questions)} captions have no words; they count as 0"] if empty else []
    if len(questions) == 1:
        notes.append("CIDEr-D of one picture is always 0: it counts in how many pictures' captions words stand")
    parsed = {name: " ".join(found) for name, found in said.items()}
    return Scores(values, dict(zip(said, items, strict=True)), groups, counts, parsed, tuple(notes))


def submit(
    questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any], folder: Any
) -> list[Path]:
    """A results file in COCO's form: `image_id` and `caption`, one line each."""
    del options
    path = Path(folder) / "captions.json"
    rows = [{"image_id": q.record["question_id"], "caption": " ".join(answers[q.id].split())} for q in questions]
    write_json(path, rows)
    return [path]


def _measures(
    names: Sequence[str], said: Mapping[str, Words], known: Mapping[str, Sequence[Words]]
) -> tuple[dict[str, float], list[float]]:
    """The values of a set of captions, and each one's CIDEr-D."""
    captions, references = [said[name] for name in names], [known[name] for name in names]
    ciders = cider_d(captions, references)
    rouges = [rouge_l(caption, listed) for caption, listed in zip(captions, references, strict=True)]
    bleus = bleu(captions, references)
    values = {"cider": 100 * sum(ciders) / len(ciders), "rouge_l": 100 * sum(rouges) / len(rouges)}
    return {**values, **{f"bleu_{i + 1}": 100 * bleus[i] for i in range(ORDERS)}}, ciders


def _captions(question: Question) -> Sequence[str]:
    truth = question.truth
    listed = (truth,) if isinstance(truth, str) else truth
    if not listed:
        raise DataError(f"{question.where}: question {question.id} has no captions to compare with")
    return listed


def _coco(listed: Sequence[dict[str, Any]], annotations: Any, path: str, prompt: str) -> list[Question]:
    captions: dict[Any, list[str]] = {}
    for i, record in enumerate(annotations):
        where = f"{path}: annotations[{i}]"
        name = field(record, "image_id", where, (int, str))
        captions.setdefault(name, []).append(field(record, "caption", where))
    made = []
    for i, record in enumerate(listed):
        where = f"{path}: images[{i}]"
        name = field(record, "id", where, (int, str))
        made.append(_question(name, field(record, "file_name", where), captions.pop(name, None), record, prompt, where))
    if captions:
        name = next(iter(captions))
        raise DataError(f"{path}: captions of {len(captions)} pictures that it does not list (first: {name})")
    return made


def _karpathy(listed: Sequence[dict[str, Any]], path: str, prompt: str, split: Any) -> list[Question]:
    splits = sorted({str(record.get("split")) for record in listed})
    if split not in splits:
        raise DataError(f'{path}: has the splits {", ".join(splits)}; options.split is "{split}"')
    made = []
    for i, record in enumerate(listed):
        if record.get("split") != split:
            continue
        where = f"{path}: images[{i}]"
        name = record.get("cocoid", record.get("imgid"))
        if not isinstance(name, int):
            raise DataError(f'{where}: has no number "cocoid" or "imgid"')
        image = "/".join(filter(None, (record.get("filepath"), field(record, "filename", where))))
        captions = [field(sentence, "raw", where) for sentence in field(record, "sentences", where, list)]
        made.append(_question(name, image, captions, {"split": split}, prompt, where))
    return made


def _question(
    name: int | str, image: str, captions: list[str] | None, record: Mapping[str, Any], prompt: str, where: str
) -> Question:
    domain = record.get("domain")
    return Question(
        id=str(name),
        text=with_image(prompt),
        images=(Image(path=image),),
        truth=tuple(captions) if captions else None,
        groups={"domain": domain} if isinstance(domain, str) else {},
        record={**record, "question_id": name},
        where=where,
    )
