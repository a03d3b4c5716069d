"""What the answers of a log depend on, kept beside it.

No log ever mixes two models, two ways of decoding or two sets of questions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lapilli.base.atomic import write_json
from lapilli.base.errors import DataError, RunError
from lapilli.evaluate.job import Job

FILE = "answers.meta.json"

_BESIDE = ("lapilli.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
           "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")  # fmt: skip
"""Files of a model folder that change its answers, besides weights and configuration."""


def describe_model(
    path: str | Path, base: str | Path | None = None, *, template: str | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """What tells a model on disk from another. Raises ModelError for a folder that is none."""
    from lapilli.assemble.source import model_folder

    folder = model_folder(path)
    made = {"name": _name(Path(path)), "path": str(path), **_contents(folder)}
    if base is not None:
        made |= {"base": str(base), "base_fingerprint": _contents(model_folder(base))["fingerprint"]}
    return {**made, "template": template or "the model's own", "dtype": dtype}


def origin(job: Job, model: Mapping[str, Any]) -> dict[str, Any]:
    """What a log of answers to this job by this model depends on."""
    task = job.task
    return {
        "task": task.name,
        "model": dict(model),
        "decoding": task.decoding.model_dump(),
        "follow_up": None if task.follow_up is None else task.follow_up.model_dump(),
        "questions": {"count": len(job.questions), "sha256": _questions(job)},
    }


def hold_to(folder: Path, made: Mapping[str, Any], has_answers: bool) -> None:
    """Keep the origin of a folder's answers, or compare with what is kept.

    Raises RunError with both values if the answers that are there depend on something else.
    """
    path = folder / FILE
    if not path.exists():
        if has_answers:
            raise RunError(
                f"{folder}: there are answers, but no {FILE} that says what they come from; score them with `lapilli "
                "score`, or choose another --out"
            )
        write_json(path, made)
        return
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read ({error}); choose another --out") from error
    before, now = dict(_flat(kept)), dict(_flat(made))
    lines = [
        f"  {key}: {before.get(key, 'not there')} before, {now.get(key, 'not there')} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in ("model.path", "model.name", "model.base")
    ]
    if not lines:
        return
    if not has_answers:
        write_json(path, made)
        return
    listed = "\n".join(lines)
    raise RunError(f"{folder}: its answers come from something else:\n{listed}\nchoose another --out, or remove it")


def _contents(folder: Path) -> dict[str, str]:
    from lapilli.assemble.fingerprint import fingerprint

    if folder.is_file():  # a Cerebras state file, whose size and beginning tell enough
        with folder.open("rb") as stream:
            head = stream.read(1 << 20)
        made = hashlib.sha256(str(folder.stat().st_size).encode() + head).hexdigest()
        return {"fingerprint": made, "settings": ""}
    settings = hashlib.sha256()
    for name in _BESIDE:
        if (folder / name).is_file():
            settings.update(name.encode() + (folder / name).read_bytes())
    return {"fingerprint": fingerprint(folder), "settings": settings.hexdigest()}


def _name(path: Path) -> str:
    """What tables call a model: its folder, with the run's where that is just `model` or a checkpoint."""
    path = path.resolve()
    generic = path.name == "model" or path.name.startswith("checkpoint-")
    return f"{path.parent.name}/{path.name}" if generic else path.name


def _questions(job: Job) -> str:
    made = hashlib.sha256()
    for question in job.questions:
        pictures = [
            image.path if image.data is None else hashlib.sha256(image.data).hexdigest() for image in question.images
        ]
        made.update(json.dumps([question.id, question.text, pictures]).encode())
    return made.hexdigest()


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
