"""What an evaluation leaves in its folder, one folder per task, and how it is read again.

OUT/<task>/answers.jsonl           every answer, in the original's line format (answers-00-of-04.jsonl for ranks)
OUT/<task>/answers.meta.json       what the answers depend on: model, decoding, questions
OUT/<task>/missing.jsonl           questions without an answer, each with the reason
OUT/<task>/results.json            `Results`
OUT/<task>/task.json               the task as it was evaluated
OUT/<task>/items-<protocol>.jsonl  per scored question: {"id", "score", "parsed"}, score 0 to 1 or null; where a judge
                                   scored, {"ratio", "said"}: parts of the relative score, and the reply
OUT/<task>/judge-<model>/          what the judge was asked and said (see judge.reviews), where the task has one
OUT/<task>/resamples-<protocol>.json  the headline under each bootstrap resample, where it is no mean of items
OUT/<task>/submission/             what the benchmark's server takes, where it takes something
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from lapilli.base.atomic import atomic_write, write_json
from lapilli.base.errors import DataError
from lapilli.evaluate.statistics import interval, mean_percent, ratio_percent, resampled
from lapilli.evaluate.task import Scores, Task

RESULTS = "results.json"
TASK = "task.json"


class Outcome(BaseModel):
    """The scores under one protocol. A value that is not defined (no question of its kind) is null."""

    model_config = ConfigDict(frozen=True)

    values: dict[str, float | None]
    interval: tuple[float, float] | None = None
    """Of the headline: 95 %, by resampling questions; null where there is nothing to resample."""
    groups: dict[str, dict[str, dict[str, float | None]]] = {}
    counts: dict[str, dict[str, int]] = {}
    notes: tuple[str, ...] = ()
    scored: int = 0
    """Questions that the headline is of."""


class Counts(BaseModel):
    """How many questions there were and what became of them."""

    model_config = ConfigDict(frozen=True)

    in_files: int
    asked: int
    """Below `in_files` only where a limit was set."""
    answered: int
    missing: int
    cut: int = 0
    """Answers that ended because they were too long."""
    limit: int | None = None


class Results(BaseModel):
    """results.json: one task, one model."""

    model_config = ConfigDict(frozen=True)

    task: str
    title: str
    headline: str
    higher_is_better: bool
    protocols: dict[str, Outcome]
    """Empty where there is no public truth to score against."""
    model: dict[str, Any]
    """`name` always; `path`, `fingerprint`, `base`, `template`, `dtype`, `device` where lapilli answered."""
    decoding: dict[str, Any] | None
    """Null where the answers came from elsewhere."""
    counts: Counts
    files: dict[str, dict[str, str]]
    """Part of the data: its `path`, and `sha256` where it is a file."""
    answers: dict[str, str]
    """Answers file to its SHA-256."""
    submissions: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    seconds: float | None = None
    """Spent generating, over all calls and ranks; null where the answers came from elsewhere."""
    notes: tuple[str, ...] = ()


def outcome(scores: Scores, task: Task) -> tuple[Outcome, np.ndarray | None]:
    """Scores with the headline's interval, and the headline's resamples (k,) where it is no mean of items.

    Raises DataError if a scorer gave a number for its headline that its items contradict.
    """
    ids = list(scores.items)
    values: np.ndarray | None = None
    if scores.again is not None:
        count = len(scores.order or ids)
        values = resampled(count, scores.again) if count else None
    elif scores.ratio:
        count = len(scores.ratio)
        values = resampled(count, ratio_percent(np.array(list(scores.ratio.values()))))
    elif ids:
        count = len(ids)
        values = resampled(count, mean_percent(np.array([scores.items[name] for name in ids])))
    else:
        count = 0
    bounds = None if values is None else interval(values)
    made = Outcome(
        values={name: _finite(value) for name, value in scores.values.items()},
        interval=None if bounds is None or not all(map(math.isfinite, bounds)) else bounds,
        groups={
            kind: {group: {name: _finite(v) for name, v in named.items()} for group, named in groups.items()}
            for kind, groups in scores.groups.items()
        },
        counts=scores.counts,
        notes=scores.notes,
        scored=count,
    )
    if made.values and task.headline not in made.values:
        known = ", ".join(made.values)
        raise DataError(f'task {task.name}: its headline "{task.headline}" is none of its scores ({known})')
    return made, values if scores.again is not None else None


def write_items(folder: Path, protocol: str, scores: Scores, resamples: np.ndarray | None) -> None:
    """Write what each question was worth under a protocol, and the headline's resamples."""
    lines = [
        json.dumps(_item(name, scores), ensure_ascii=False)
        for name in dict.fromkeys((*scores.items, *scores.order, *scores.parsed, *scores.said))
    ]
    atomic_write(folder / f"items-{protocol}.jsonl", "".join(f"{line}\n" for line in lines))
    place = folder / f"resamples-{protocol}.json"
    place.unlink(missing_ok=True)
    if resamples is not None:
        order = list(scores.order or scores.items)
        write_json(place, {"order": order, "values": [_finite(value) for value in resamples.tolist()]})


def _item(name: str, scores: Scores) -> dict[str, Any]:
    made: dict[str, Any] = {"id": name, "score": scores.items.get(name), "parsed": scores.parsed.get(name)}
    if name in scores.ratio:
        made["ratio"] = list(scores.ratio[name])
    if name in scores.said:
        made["said"] = scores.said[name]
    return made


def write_results(folder: Path, results: Results) -> None:
    """Write results.json, whole or not at all."""
    write_json(folder / RESULTS, results.model_dump(mode="json"))


def read_results(folder: str | Path) -> Results:
    """A task folder's results. Raises DataError for a folder without them."""
    path = Path(folder) / RESULTS
    try:
        return Results.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); `lapilli evaluate` writes it") from error
    except (ValidationError, ValueError) as error:
        raise DataError(f"{path}: not results of lapilli evaluate ({str(error).splitlines()[0]})") from error


def result_folders(out: str | Path) -> dict[str, Path]:
    """Task name to folder of every result in an output folder, or of the one task folder given."""
    out = Path(out)
    folders = [out] if (out / RESULTS).is_file() else sorted(p.parent for p in out.glob(f"*/{RESULTS}"))
    if not folders:
        raise DataError(f"{out}: no {RESULTS} in it or in a folder of it; name what `lapilli evaluate --out` wrote")
    return {read_results(folder).task: folder for folder in folders}


def read_items(folder: Path, protocol: str) -> dict[str, float]:
    """Question id to score, of those that have one; empty if nothing was scored question by question."""
    lines = _item_lines(folder, protocol)
    return {line["id"]: float(line["score"]) for line in lines if line["score"] is not None}


def read_ratios(folder: Path, protocol: str) -> dict[str, tuple[float, float]]:
    """Question id to what it adds above and below; empty where the headline is no ratio of sums."""
    lines = _item_lines(folder, protocol)
    return {line["id"]: (float(line["ratio"][0]), float(line["ratio"][1])) for line in lines if "ratio" in line}


def _item_lines(folder: Path, protocol: str) -> list[dict[str, Any]]:
    path = folder / f"items-{protocol}.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_resamples(folder: Path, protocol: str) -> tuple[Sequence[str], np.ndarray] | None:
    """The questions that were resampled and the headline's values (k,); None where it is a mean of items."""
    path = folder / f"resamples-{protocol}.json"
    if not path.is_file():
        return None
    value: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value["order"], np.array([math.nan if v is None else v for v in value["values"]], dtype=np.float64)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
