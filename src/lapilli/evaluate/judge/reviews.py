"""The output of judging: reviews in the original's line format, and beside them every reply as it came.

    NAME.jsonl                  {"id", "question_id", "answer1_id", "answer2_id", "category", "content", "tuple",
                                "metadata"}
    NAME.judge/replies.jsonl    every attempt: what the server sent, tokens, seconds; written before it is read
    NAME.judge/settings.json    judge, rules, files
    NAME.judge/failed.json      requests without an answer at the end of the last run, with reasons

A reply is found again by the digest of its request, so that nothing is paid for twice.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from lapilli.base.atomic import atomic_write, write_json
from lapilli.base.errors import DataError
from lapilli.evaluate.answers import AnswerLog
from lapilli.evaluate.judge.endpoint import Attempt, read_reply
from lapilli.evaluate.judge.prompt import Request
from lapilli.evaluate.judge.reading import Unreadable, parse_llava, read_grade, read_pair
from lapilli.evaluate.records import examples, read_jsonl

REVIEWS_FILE = "reviews.jsonl"
FAILED_FILE = "failed.json"


def reviews_path(out: str | Path) -> Path:
    """The reviews file that `-o` means: itself, or `reviews.jsonl` in it where it is a folder or has no ending."""
    path = Path(out).expanduser()
    return path / REVIEWS_FILE if path.is_dir() or not path.suffix else path


def side_folder(path: Path) -> Path:
    """Where what belongs to a reviews file lies."""
    return path.with_name(f"{path.stem}.judge")


@dataclass(frozen=True, slots=True)
class Known:
    """What an output holds of the requests, all by digest."""

    replies: dict[str, Attempt]
    reviewed: set[str | None]
    scoreless: set[str | None]
    """Reviewed, but without scores."""

    def without(self, digests: Collection[str | None]) -> Known:
        """The same, as if these had not been asked."""
        kept = {digest: attempt for digest, attempt in self.replies.items() if digest not in digests}
        return Known(kept, self.reviewed.difference(digests), self.scoreless.difference(digests))

    def has(self, request: Request) -> bool:
        """Whether a request need not be asked."""
        return request.digest in self.replies or request.digest in self.reviewed


class Store:
    """The files of one run; a context manager. One process at a time has them."""

    def __init__(self, out: str | Path) -> None:
        self.path = reviews_path(out)
        self.folder = side_folder(self.path)
        self.replies_path = self.folder / "replies.jsonl"
        self._stack = ExitStack()
        self._lock = Lock()

    def __enter__(self) -> Store:
        self._replies = self._stack.enter_context(AnswerLog(self.replies_path))
        self._reviews = self._stack.enter_context(AnswerLog(self.path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def known(self, requests: Iterable[Request], others_too: bool = False) -> Known:
        """What is there already. Raises DataError if the file holds a review of anything else than these requests,
        unless there may be `others_too`."""
        wanted = {request.digest for request in requests}
        reviews = read_jsonl(self.path) if self.path.exists() else []
        foreign = [str(line.get("question_id")) for _, line in reviews if _digest(line) not in wanted]
        if foreign and not others_too:
            raise DataError(
                f"{self.path}: holds {examples(foreign, 'review', 'reviews')} of other answers, questions, rules, "
                "judge or settings than these; choose another --output"
            )
        replies = {digest: attempt for digest, attempt in self._answered().items() if digest in wanted}
        mine = [line for _, line in reviews if _digest(line) in wanted]
        scoreless = {_digest(line) for line in mine if line["metadata"].get("scores") is None}
        return Known(replies, {_digest(line) for line in mine}, scoreless)

    def others(self, requests: Iterable[Request]) -> set[str | None]:
        """Digests of reviews that are of other requests than these."""
        wanted = {request.digest for request in requests}
        return {_digest(line) for _, line in read_jsonl(self.path)} - wanted

    def forget(self, digests: Collection[str | None]) -> None:
        """Take reviews out, to be asked again; their replies stay in the log."""
        if digests:
            lines = [line for _, line in read_jsonl(self.path) if _digest(line) not in digests]
            self._reviews.__exit__(None, None, None)
            atomic_write(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            self._reviews.__enter__()

    def past_attempts(self) -> list[tuple[Mapping[str, int], bool, int]]:
        """Tokens of every attempt so far, whether it is in doubt that they were paid for, and the prompt's estimate."""
        past = [line for _, line in read_jsonl(self.replies_path)]
        return [(line["tokens"], line["billed"] == "perhaps", line["estimate"]) for line in past]

    def keep(self, request: Request, attempt: Attempt, number: int, tokens: Mapping[str, int], read: int) -> None:
        """Write down an attempt, `read` being its prompt's estimated tokens; called from several threads."""
        line = {
            "request": request.digest,
            "question_id": request.item.question_id,
            "order": request.order,
            "attempt": number,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": attempt.seconds,
            "status": attempt.status,
            "outcome": attempt.outcome,
            "reason": attempt.reason,
            "billed": attempt.billed,
            "tokens": dict(tokens),
            "estimate": read,
            "raw": attempt.raw,
        }
        with self._lock:
            self._replies.add(line)

    def review(self, request: Request, attempt: Attempt) -> Unreadable | None:
        """Write the review that a reply is, and return why it has no scores, if it has none."""
        line, wrong = review_line(request, attempt)
        self._reviews.add(line)
        return wrong

    def settings(self, value: Mapping[str, Any]) -> None:
        """Write down what the reviews depend on."""
        write_json(self.folder / "settings.json", value)

    def failed(self, failures: Iterable[tuple[Request, str]], unasked: int) -> None:
        """Write down what has no reply."""
        listed = [{"question_id": r.item.question_id, "order": r.order, "reason": reason} for r, reason in failures]
        write_json(self.folder / FAILED_FILE, {"failed": listed, "not_asked": unasked})

    def _answered(self) -> dict[str, Attempt]:
        made = {}
        for _, line in read_jsonl(self.replies_path):
            if line.get("outcome") == "answered":
                made[line["request"]] = read_reply(line["raw"], line["status"])
        return made


def review_line(request: Request, attempt: Attempt) -> tuple[dict[str, Any], Unreadable | None]:
    """A review in the original's form, with our reading in `metadata`, and why there is none, if there is none.

    `tuple` is what the original would write, [-1, -1] for what it can't read, in the order of the answers files
    whichever stood first; `content` is the reply as it came.
    """
    item = request.item
    line: dict[str, Any] = {"id": item.number, "question_id": item.question_id}
    if item.graded:
        line["answer_id"] = item.answer_ids[0]
    else:
        line |= {"answer1_id": item.answer_ids[0], "answer2_id": item.answer_ids[1]}
    if item.category is not None:
        line["category"] = item.category
    line["content"] = attempt.content
    found = read_grade(attempt.content) if item.graded else read_pair(attempt.content)
    scores: list[float] | None = None
    if isinstance(found, float):
        line["score"] = found
        scores = [found]
    elif isinstance(found, tuple):
        scores = list(found if request.order == "12" else reversed(found))
    if not item.graded:
        first, second = parse_llava(attempt.content)
        line["tuple"] = [first, second] if request.order == "12" else [second, first]
    wrong = _why(found, attempt) if isinstance(found, Unreadable) else None
    line["metadata"] = {
        "request": request.digest,
        "style": item.style,
        "order": request.order,
        "scores": scores,
        **({} if wrong is None else {"unreadable": wrong.reason}),
        **({} if item.groups is None else {"groups": dict(item.groups)}),
        "judge": attempt.model,
        "finish": attempt.finish,
    }
    return line, wrong


def _why(found: Unreadable, attempt: Attempt) -> Unreadable:
    if attempt.finish == "content_filter" or attempt.refusal is not None:
        return Unreadable("refused by the judge")
    return Unreadable(f"{found.reason}, cut by the token limit") if attempt.finish == "length" else found


def _digest(line: Mapping[str, Any]) -> str | None:
    metadata = line.get("metadata")
    return metadata.get("request") if isinstance(metadata, dict) else None
