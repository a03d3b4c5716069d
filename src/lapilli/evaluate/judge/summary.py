"""The table of a review file: for each category both mean scores and their ratio, as the original prints them.

Protocol `llava` is the original's arithmetic (llava/eval/summarize_gpt_review.py, and quilt_gpt_summarize.py of
Quilt-LLaVA), which counts a reply that it could not read as -1 for both. Protocol `official` reads the replies again,
leaves out what can't be read and says how many, and averages a question's two orders.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lapilli.base.errors import DataError, RecipeError
from lapilli.evaluate.judge.reading import Unreadable, read_grade
from lapilli.evaluate.judge.review import Review, read_reviews
from lapilli.evaluate.judge.reviews import FAILED_FILE, reviews_path, side_folder
from lapilli.evaluate.records import examples, read_records
from lapilli.evaluate.records import field as checked_field
from lapilli.evaluate.statistics import draws, interval
from lapilli.evaluate.task import Protocol

ALL = "all"
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One category. Numbers as the original rounds them; None where there is none (a mean of 0 to divide by)."""

    name: str
    questions: int
    ratio: float | None
    """Second answers' mean over the first ones', in percent: the LLaVA-Bench score. None for grades."""
    first: float | None
    """Mean score of the first answers, times 10. None for grades."""
    second: float | None
    """Mean score of the second answers, times 10; of grades, in percent."""
    ratio_interval: Interval | None = None
    second_interval: Interval | None = None

    def text(self) -> str:
        """The original's line."""
        return f"{self.name} {self.ratio} {self.first} {self.second}"


@dataclass(frozen=True, slots=True)
class OrderEffect:
    """What the place of an answer did, over questions judged in both orders."""

    questions: int
    advantage: float
    """Points (of 10) that an answer gets more when it stands first."""
    interval: Interval | None
    changed: int
    """Questions where another answer is better in the other order."""


@dataclass(frozen=True, slots=True)
class Table:
    """One review file under one protocol."""

    name: str
    protocol: Protocol
    rows: list[Row]
    graded: bool = False
    unreadable: dict[str, int] = field(default_factory=dict)
    """Reason: how many reviews."""
    left_out: int = 0
    """Questions that are in no mean because a review of theirs can't be read."""
    order: OrderEffect | None = None
    notes: tuple[str, ...] = ()
    scores: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)
    """Question id to what is in the means: pairs (first, second) of scores of 10, or one grade of 1."""

    def text(self) -> str:
        """What the original prints."""
        return "\n".join([self.name, *(row.text() for row in self.rows), "=" * 33]) + "\n"


def table_notes(table: Table) -> list[str]:
    """What a reader of a table must know, in words."""
    notes = [f"{count} reviews can't be read: {reason}" for reason, count in sorted(table.unreadable.items())]
    if table.left_out:
        notes.append(f"{table.left_out} questions are in no mean")
    if (effect := table.order) is not None:
        between = "-" if effect.interval is None else f"{effect.interval[0]:.2f} to {effect.interval[1]:.2f}"
        notes.append(
            f"order: an answer gets {effect.advantage:+.2f} points of 10 for standing first (95 % interval "
            f"{between}); another answer wins in the other order for {effect.changed} of {effect.questions} questions"
        )
    return [*notes, *table.notes]


def choose_files(
    files: Sequence[str], folder: str | None, version: str | None = None, select: Sequence[str] = ()
) -> list[Path]:
    """The review files that the original's options name. Raises DataError where there are none.

    Of a folder: `*.jsonl` that begin with gpt4_text, reviews_ or review_, or all if the folder's name has `review` in
    it. `version` 0613 takes files with 0613 in the name, any other those without.
    """
    if files:
        chosen = [
            reviews_path(file) if Path(file).is_dir() else Path(folder or "", file).expanduser() for file in files
        ]
    elif folder is not None:
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise DataError(f"{folder}: no such folder")
        heads = ("gpt4_text", "reviews_", "review_", "reviews.")
        chosen = [p for p in root.glob("*.jsonl") if p.name.startswith(heads) or "review" in folder]
    else:
        raise RecipeError("name review files, or their folder with --dir")
    kept = [
        path
        for path in sorted(chosen)
        if all(part in config_name(path) for part in select)
        and (version is None or ("0613" if "0613" in config_name(path) else "0314") == version)
    ]
    if not kept:
        raise DataError(f"{folder or 'files'}: no review files there that --select and --version leave")
    return kept


def config_name(path: Path) -> str:
    """What the original calls a review file."""
    return path.name.replace("gpt4_text_", "").replace(".jsonl", "")


def read_organs(path: str | Path) -> dict[str, str]:
    """Quilt's context file as question id to its `type` of organ. Raises DataError."""
    made: dict[str, str] = {}
    for where, record in read_records(path):
        made[str(checked_field(record, "question_id", where, (str, int)))] = str(record.get("type") or "")
    return made


def summarise(
    path: Path,
    protocol: Protocol,
    *,
    organs: Mapping[str, str] | None = None,
    ignore: Collection[str] = (),
) -> Table | None:
    """A review file's table; None for grades under protocol `llava`, which knows none.

    `organs` adds a row for each, `ignore` leaves out questions by id. Raises DataError for lines of another form, a
    question reviewed twice in an order, and a question that `organs` lacks.
    """
    reviews = read_reviews(path, ignore)
    if organs is not None:
        lacking = [review.id for review in reviews if review.id not in organs]
        if lacking:
            raise DataError(f"{path}: {examples(dict.fromkeys(lacking), 'question', 'questions')} not in --context")
    notes = _notes(path)
    if all(review.graded for review in reviews):
        return None if protocol == "llava" else _graded(path, reviews, notes)
    mixed = [review.where for review in reviews if review.graded]
    if mixed:
        raise DataError(f"{mixed[0]}: a grade among reviews of two answers")
    if protocol == "llava":
        return _as_original(path, reviews, organs, notes)
    return _as_meant(path, reviews, organs, notes)


def _as_original(path: Path, reviews: Sequence[Review], organs: Mapping[str, str] | None, notes: list[str]) -> Table:
    groups = defaultdict[str, list[tuple[float, float]]](list)
    scores = defaultdict[str, list[tuple[float, ...]]](list)
    for review in reviews:
        assert review.tuple is not None
        scores[review.id].append(review.tuple)
        for name in _names(review.category, review.id, organs):
            groups[name].append(review.tuple)
    bad = sum(review.tuple is not None and min(review.tuple) < 0 for review in reviews)
    if bad:
        notes = [*notes, f"{bad} of {len(reviews)} reviews are not read by the original and are in its means as -1"]
    rows = [_row(name, np.array(pairs)) for name, pairs in sorted(groups.items())]
    return Table(config_name(path), "llava", rows, notes=tuple(notes), scores=dict(scores))


def _as_meant(path: Path, reviews: Sequence[Review], organs: Mapping[str, str] | None, notes: list[str]) -> Table:
    sides = defaultdict[str, dict[str, tuple[float, float] | Unreadable]](dict)
    categories: dict[str, str | None] = {}
    twice: list[str] = []
    for review in reviews:
        if review.order in sides[review.id]:
            twice.append(review.id)
        sides[review.id][review.order] = review.scores()
        categories[review.id] = review.category
    if twice:
        raise DataError(f"{path}: {examples(twice, 'question', 'questions')} reviewed twice in the same order")
    both = any("21" in found for found in sides.values())
    unreadable = Counter(
        one.reason for found in sides.values() for one in found.values() if isinstance(one, Unreadable)
    )
    scored: dict[str, list[tuple[float, float]]] = {}
    for name, found in sides.items():
        pairs = [one for _, one in sorted(found.items()) if not isinstance(one, Unreadable)]
        if len(pairs) == (2 if both else 1):
            scored[name] = pairs
    halves = sum(len(found) == 1 for found in sides.values()) if both else 0
    if halves:
        notes = [
            *notes,
            f"{halves} questions are judged in one order only and left out; the same command asks the other",
        ]
    groups = defaultdict[str, list[tuple[float, float]]](list)
    means: dict[str, list[tuple[float, ...]]] = {}
    for name, pairs in scored.items():
        first, second = np.mean(pairs, axis=0).tolist()
        means[name] = [(first, second)]
        for group in _names(categories[name], name, organs):
            groups[group].append((first, second))
    rows = [_row(name, np.array(pairs)) for name, pairs in sorted(groups.items())]
    effect = _order_effect([np.array(pairs) for pairs in scored.values()]) if both and scored else None
    left_out = len(sides) - len(scored)
    return Table(
        config_name(path), "official", rows, False, dict(unreadable), left_out, effect, tuple(notes), means
    )  # fmt: skip


def _graded(path: Path, reviews: Sequence[Review], notes: list[str]) -> Table:
    """Grades in percent: all, by category, and by each part of categories that are joined by commas (MM-Vet's)."""
    groups, unreadable = defaultdict[str, list[float]](list), Counter[str]()
    scores: dict[str, list[tuple[float, ...]]] = {}
    twice = [name for name, count in Counter(review.id for review in reviews).items() if count > 1]
    if twice:
        raise DataError(f"{path}: {examples(twice, 'question', 'questions')} graded twice")
    for review in reviews:
        found = read_grade(review.content or "")
        if isinstance(found, Unreadable):
            unreadable[review.why or found.reason] += 1
            continue
        scores[review.id] = [(found,)]
        category = review.category or ALL
        parts = [f"any {part}" for part in category.split(", ")] if ", " in category or _joined(reviews) else []
        for name in dict.fromkeys((ALL, category, *parts)):
            groups[name].append(100 * found)
    rows = []
    for name, values in sorted(groups.items()):
        array = np.array(values)
        between = _middle(_resampled_means(array))
        rows.append(Row(name, len(values), None, None, round(float(array.mean()), 1), None, between))
    lost = sum(unreadable.values())
    return Table(
        config_name(path), "official", rows, True, dict(unreadable), lost, None, tuple(notes), scores
    )  # fmt: skip


def _joined(reviews: Sequence[Review]) -> bool:
    return any(", " in (review.category or "") for review in reviews)


def _names(category: str | None, name: str, organs: Mapping[str, str] | None) -> Iterable[str]:
    """The rows that a review is in."""
    if category is not None:
        yield category
    yield ALL
    if organs is not None and organs[name]:
        yield organs[name]


def rounded(pairs: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """Ratio in percent and both means times 10, of pairs (n, 2) of scores.

    Rounded as the original does: means to three places, what comes of them to one. None for what is not finite.
    """
    first, second = (round(mean, 3) for mean in pairs.mean(0).tolist())
    ratio = _finite(round(second / first * 100, 1)) if first else None
    return ratio, _finite(round(first * 10, 1)), _finite(round(second * 10, 1))


def _row(name: str, pairs: np.ndarray) -> Row:
    ratio, first, second = rounded(pairs)
    means = _resampled_means(pairs)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = means[:, 1] / means[:, 0] * 100
    return Row(
        name=name,
        questions=len(pairs),
        ratio=ratio,
        first=first,
        second=second,
        ratio_interval=_middle(ratios),
        second_interval=_middle(means[:, 1] * 10),
    )


def _resampled_means(values: np.ndarray) -> np.ndarray:
    """Means (k, ...) of the values (n, ...) of questions drawn with replacement; none of fewer than two questions."""
    if len(values) < 2:
        return np.empty((0, *values.shape[1:]))
    chosen = np.stack(list(draws(len(values))))
    return np.concatenate([values[some].mean(1) for some in np.array_split(chosen, 20)])


def _middle(values: np.ndarray) -> Interval | None:
    """Their 95 % interval, if there is a finite value."""
    low, high = interval(values)
    return None if math.isnan(low) else (low, high)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _order_effect(questions: Sequence[np.ndarray]) -> OrderEffect:
    """From questions' scores (2, 2): order by answer. In order 12 the first answer stands first, in 21 the second."""
    scores = np.stack(questions)
    advantage = ((scores[:, 0, 0] - scores[:, 1, 0]) + (scores[:, 1, 1] - scores[:, 0, 1])) / 2
    better = np.sign(scores[:, :, 0] - scores[:, :, 1])
    between = _middle(_resampled_means(advantage))
    return OrderEffect(len(scores), float(advantage.mean()), between, int((better[:, 0] != better[:, 1]).sum()))


def _notes(path: Path) -> list[str]:
    """What the last run left undone."""
    file = side_folder(path) / FAILED_FILE
    if not file.exists():
        return []
    value = json.loads(file.read_text(encoding="utf-8"))
    count = len(value["failed"]) + value["not_asked"]
    return [f"{count} requests have no reply yet; the same `lapilli judge` goes on with them"] if count else []
