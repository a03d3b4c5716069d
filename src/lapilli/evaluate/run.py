"""`lapilli evaluate`: every task's questions asked, each answer written as it ends, then scored.

A call that was stopped or killed goes on with the same command; several processes share the work (`ranks`). Results do
not depend on either.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapilli.base.errors import LapilliError, RunError
from lapilli.base.interrupt import StopWish
from lapilli.base.progress import Progress
from lapilli.evaluate.answers import AnswerLog, Joined, answer_line, join, read_answers
from lapilli.evaluate.job import Job, check_pictures
from lapilli.evaluate.origin import hold_to, origin
from lapilli.evaluate.ranks import WAIT_SECONDS, Rank, answer_files
from lapilli.evaluate.results import Results
from lapilli.evaluate.scoring import check_scorer, finish
from lapilli.evaluate.stopped import Stopped
from lapilli.evaluate.task import Question

if TYPE_CHECKING:
    from lapilli.generate.assistant import Assistant
    from lapilli.generate.decoding import Answer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How tasks are worked through; none of it changes an answer."""

    batch_size: int = 32
    allow_missing: int = 0
    wait_seconds: float = WAIT_SECONDS
    rank: Rank = field(default_factory=Rank)


def evaluate(
    jobs: Sequence[Job],
    out: str | Path,
    model: Mapping[str, Any],
    assistant: Callable[[], Assistant],
    settings: Settings | None = None,
    on_results: Callable[[Results], None] = lambda results: None,
) -> list[Results]:
    """Ask, log and score every job; results lie in `out/<task>/` (see `results`), and are returned.

    `model` is what tells the model from others (`origin.describe_model`), `assistant` brings it, and is called only if
    a question is open. `on_results` gets each task's results as they are there. Of several ranks only rank 0 scores;
    the others return nothing. Raises DataError or RunError before anything is asked if pictures are missing, the
    folder's answers come from something else or a judge could not be asked; at the end, if a task lacks answers or
    can't be scored; Stopped if the user stops it.
    """
    settings, out = settings or Settings(), Path(out)
    for job in jobs:
        check_scorer(job)
        check_pictures(job, settings.allow_missing)
        folder = out / job.task.name
        folder.mkdir(parents=True, exist_ok=True)
        hold_to(folder, origin(job, model), any(path.stat().st_size for path in answer_files(folder)))
        settings.rank.begin(folder)
    results: list[Results] = []
    failed: list[str] = []
    brought: list[Assistant] = []

    def bring() -> Assistant:
        if not brought:
            brought.append(assistant())
        return brought[0]

    with StopWish() as stop:
        waiting: list[tuple[Job, dict[str, str]]] = []
        for job in jobs:
            folder = out / job.task.name
            missing = _answer(job, folder, model, bring, settings, stop)
            settings.rank.finish(folder, missing)
            waiting.append((job, missing))
            # Alone, each task's numbers are there before the next one begins; with others, their work comes first.
            ready = settings.rank.rank == 0 and (settings.rank.world == 1 or job is jobs[-1])
            while ready and waiting:
                try:
                    results.append(_gather(*waiting.pop(0), out, model, brought, settings, stop))
                except Stopped:
                    raise
                except LapilliError as error:  # the other tasks have their numbers all the same
                    failed.append(str(error))
                else:
                    on_results(results[-1])
    if failed:
        raise RunError("\n".join(failed))
    return results


def _answer(
    job: Job,
    folder: Path,
    model: Mapping[str, Any],
    bring: Callable[[], Assistant],
    settings: Settings,
    stop: StopWish,
) -> dict[str, str]:
    """Ask what this process has to ask and has no answer yet; returns the questions that got none, with reasons."""
    from lapilli.evaluate.asking import ask, by_pictures

    missing: dict[str, str] = {}
    with AnswerLog(folder / settings.rank.answers) as written:
        before = joined(job, folder).answers
        mine = settings.rank.share(by_pictures(job.asked))
        groups = [rest for group in mine if (rest := [q for q in group if q.id not in before])]
        total = sum(map(len, groups))
        known = sum(map(len, mine)) - total
        if known:
            log.warning("%s: %d questions are answered already; %d are left", job.task.name, known, total)
        if not total:
            return missing
        assistant = bring()
        with Progress(job.task.name, total) as progress:
            start = last = time.monotonic()

            def show() -> None:
                rate = (progress.done + 1) / max(1e-9, time.monotonic() - start)
                lost = f"  {len(missing)} missing" if missing else ""
                progress.advance(1, f"{rate:.1f} answers/s{lost}")

            def on_answer(question: Question, answer: Answer, text: str) -> None:
                nonlocal last
                now = time.monotonic()
                metadata = answer_metadata(answer, now - last)
                last = now
                written.add(answer_line(question, text, str(model["name"]), metadata))
                show()

            def on_missing(question: Question, reason: str) -> None:
                missing[question.id] = reason
                show()

            ask(
                assistant,
                groups,
                job.root,
                job.task.decoding,
                job.task.follow_up,
                batch_size=settings.batch_size,
                on_answer=on_answer,
                on_missing=on_missing,
                stopped=lambda: stop.signal is not None,
            )
            _raise_if_stopped(stop, job, progress.done - len(missing) + known, total + known)
    return missing


def joined(job: Job, folder: Path) -> Joined:
    """Every answer in a task's folder, whichever process wrote it. Raises DataError if one does not belong."""
    made = join(job.questions, [line for path in answer_files(folder) for line in read_answers(path, torn=True)])
    made.check(str(folder))
    return made


def _gather(
    job: Job,
    missing: dict[str, str],
    out: Path,
    model: Mapping[str, Any],
    brought: Sequence[Assistant],
    settings: Settings,
    stop: StopWish,
) -> Results:
    folder = out / job.task.name
    missing |= settings.rank.gather(folder, lambda: stop.signal is not None, settings.wait_seconds)
    answers = joined(job, folder).answers
    _raise_if_stopped(stop, job, len(answers), len(job.asked))
    device = {"device": str(next(brought[0].model.parameters()).device)} if brought else {}
    return finish(
        job,
        answers,
        missing,
        answer_files=answer_files(folder),
        model={**model, **device},
        decoding=job.task.decoding.model_dump(),
        versions=versions(),
        allow_missing=settings.allow_missing,
        folder=folder,
    )


def versions() -> dict[str, str]:
    """Versions of what makes the answers."""
    import torch
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def answer_metadata(answer: Answer, seconds: float) -> dict[str, Any]:
    """What an answers file keeps of how an answer was made."""
    made: dict[str, Any] = {
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": len(answer.token_ids),
        "seconds": round(seconds, 4),
    }
    return {**made, "thinking": answer.thinking} if answer.thinking else made


def _raise_if_stopped(stop: StopWish, job: Job, done: int, total: int) -> None:
    if stop.signal is not None:
        raise Stopped(
            f"{job.task.name}: stopped by {stop.signal} after {done} of {total} answers; the same command goes on",
            stop.signal,
        )


def score(
    job: Job, files: Sequence[Path], out: str | Path | None = None, allow_missing: int = 0, name: str | None = None
) -> Results:
    """Score answers files of any system; with `out`, results are written into `out/<task>/`.

    Raises DataError for answers that belong to no question or are given twice, RunError if more than `allow_missing`
    questions have no answer.
    """
    check_scorer(job)
    lines = [line for path in files for line in read_answers(path)]
    made = join(job.questions, lines)
    made.check(", ".join(str(path) for path in files))
    named = {line.model_id for line in lines if line.model_id}
    folder = None if out is None else Path(out) / job.task.name
    if folder is not None:
        if any(answer_files(folder)):
            raise RunError(f"{folder}: has answers of an evaluation; choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
    return finish(
        job,
        made.answers,
        {},
        answer_files=files,
        model={"name": name or ", ".join(sorted(named)) or Path(files[0]).stem},
        decoding=None,
        versions={},
        allow_missing=allow_missing,
        folder=folder,
    )
