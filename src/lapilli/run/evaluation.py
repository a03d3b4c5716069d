"""Tasks that are asked and scored while a model learns.

Training knows nothing of benchmarks; this is what it calls after every step. The model answers as it stands, with the
template that the finished model will carry, and goes on learning as if nothing had happened: dropout, the state of
random numbers and attention are what they were.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapilli.base.errors import RecipeError
from lapilli.base.progress import Progress
from lapilli.evaluate.answers import AnswerLog, answer_line
from lapilli.evaluate.catalogue import is_own, load_task
from lapilli.evaluate.job import Job, check_pictures, open_job
from lapilli.evaluate.judge.options import JUDGE
from lapilli.evaluate.ranks import answer_files
from lapilli.evaluate.results import Results
from lapilli.evaluate.run import answer_metadata, joined, versions
from lapilli.evaluate.scoring import finish, known_truth
from lapilli.evaluate.task import Protocol, Question
from lapilli.recipe.schema import Evaluation, Stage

if TYPE_CHECKING:
    from lapilli.generate.assistant import Assistant
    from lapilli.generate.decoding import Answer
    from lapilli.train.setup import Prepared, Say

FOLDER = "evaluation"
"""In a run folder: a folder per step, which `lapilli report` and `lapilli compare` read."""
PROTOCOL: Protocol = "llava"
_BATCH_SIZE = 32


@dataclass(frozen=True)
class Followed:
    """One task of a recipe, its data read and checked."""

    wanted: Evaluation
    job: Job

    def due(self, step: int, last: bool) -> bool:
        """Whether the task is asked after this step."""
        return last or (self.wanted.every is not None and step % self.wanted.every == 0)


def follow(stage: Stage, say: Say = lambda _line: None) -> Follower | None:
    """Read and check the data of a stage's tasks; None where it has none.

    Raises RecipeError for a task that can't be scored or is named twice, DataError for whatever is wrong with its data.
    """
    made: list[Followed] = []
    for wanted in stage.train.evaluate:
        task = load_task(wanted.task)
        if any(task.name == other.job.task.name for other in made):
            raise RecipeError(f"stage {stage.name}: train.evaluate: task {task.name} is named twice")
        if wanted.data is None and not is_own(wanted.task):
            raise RecipeError(f"stage {stage.name}: train.evaluate: task {task.name}: data: name its folder")
        if task.scorer == JUDGE:
            raise RecipeError(
                f"stage {stage.name}: train.evaluate: task {task.name} is scored by a judge, whom training does not "
                "ask; evaluate it afterwards"
            )
        folder = wanted.data or str(Path(wanted.task).resolve().parent)
        job = open_job(task, folder, (PROTOCOL,), limit=wanted.limit)
        if task.scorer is None or not known_truth(job.asked):
            raise RecipeError(
                f"stage {stage.name}: train.evaluate: task {task.name} can't be scored here: its right answers are not "
                "public, or their file is not there"
            )
        check_pictures(job, 0)
        often = "after the last step" if wanted.every is None else f"every {wanted.every:,} steps, and after the last"
        say(f"stage {stage.name} is evaluated on {task.name}: {len(job.asked):,} questions, {often}")
        made.append(Followed(wanted, job))
    return Follower(made) if made else None


class Follower:
    """What training calls after every step; see `lapilli.train.loop.Evaluate`."""

    def __init__(self, followed: Sequence[Followed]) -> None:
        self.followed = tuple(followed)

    def __call__(
        self, ready: Prepared, step: int, last: bool, progress: Progress, stopped: Callable[[], bool]
    ) -> dict[str, float | None] | None:
        """Scores of the tasks that are due; None where a wish to stop came first.

        Raises LapilliError for answers that can't be scored.
        """
        import torch

        from lapilli.generate.assistant import Assistant
        from lapilli.train.setup import training_mode

        due = [one.job for one in self.followed if one.due(step, last)]
        if not due:
            return {}
        loaded = ready.loaded
        place = ready.folder.path / FOLDER / f"step-{step:06d}"
        scores: dict[str, float | None] = {}
        loaded.model.eval()
        try:
            with torch.random.fork_rng(), ready.device.autocast(ready.stage.run.precision):
                assistant = Assistant(loaded.model, loaded.tokenizer, ready.how.exported, loaded.path)
                for job in due:
                    name = job.task.name
                    model = {"name": f"{ready.stage.name}, step {step}", "path": str(ready.folder.path), "step": step}
                    made = _measure(job, assistant, place / name, model, progress, stopped)
                    if made is None:
                        progress.write(f"step {step}  {name}: given up, because the run was asked to stop")
                        return None
                    scores[name] = _headline(made)
                    progress.write(f"step {step}  {_line(made, scores[name])}")
        finally:
            training_mode(loaded.model)
        return scores


def _measure(
    job: Job,
    assistant: Assistant,
    folder: Path,
    model: dict[str, Any],
    progress: Progress,
    stopped: Callable[[], bool],
) -> Results | None:
    """Ask and score a task into its folder; None if it was stopped. Answers of a step that was lost are removed."""
    from lapilli.evaluate.asking import ask, by_pictures

    shutil.rmtree(folder, ignore_errors=True)
    missing: dict[str, str] = {}
    began = last = time.monotonic()
    steps = progress.done
    with AnswerLog(folder / "answers.jsonl") as log:
        asked = 0

        def on_answer(question: Question, answer: Answer, text: str) -> None:
            nonlocal last, asked
            now = time.monotonic()
            log.add(answer_line(question, text, model["name"], answer_metadata(answer, now - last)))
            last, asked = now, asked + 1
            progress.update(steps, f"{job.task.name}: {asked} of {len(job.asked)}, {asked / (now - began):.1f}/s")

        def on_missing(question: Question, reason: str) -> None:
            missing[question.id] = reason

        ask(
            assistant,
            by_pictures(job.asked),
            job.root,
            job.task.decoding,
            job.task.follow_up,
            batch_size=_BATCH_SIZE,
            on_answer=on_answer,
            on_missing=on_missing,
            stopped=stopped,
        )
    if stopped():
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return finish(
        job,
        joined(job, folder).answers,
        missing,
        answer_files=answer_files(folder),
        model=model,
        decoding=job.task.decoding.model_dump(),
        versions=versions(),
        allow_missing=len(job.asked),  # a question that can't be asked is counted, and stops no training
        folder=folder,
    )


def _headline(made: Results) -> float | None:
    found = made.protocols.get(PROTOCOL)
    return None if found is None else found.values.get(made.headline)


def _line(made: Results, score: float | None) -> str:
    shown = "no score" if score is None else f"{score:.2f}"
    missing = (
        f", {made.counts.missing} of {made.counts.asked} questions without an answer" if made.counts.missing else ""
    )
    return f"{made.task} {made.headline} {shown}{missing}"
