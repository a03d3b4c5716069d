"""One stage of training, top to bottom: set up, go on where it stopped, step, save, finish.

What is in a run folder, and when it is refused, is told in `folder.py`; what a step is, in `step.py`. The loop below
keeps three promises: a step is in `metrics.jsonl` once; a checkpoint is never ahead of its metrics; and a run that is
stopped, by a signal or a crash, goes on from its newest complete checkpoint as if nothing had happened.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

import torch
import transformers

from lapilli.base import atomic
from lapilli.base.errors import DataError, LapilliError, RunError
from lapilli.base.interrupt import StopWish
from lapilli.base.progress import Progress
from lapilli.base.version import VERSION
from lapilli.data.loader import Step
from lapilli.data.quarantine import BadRecord
from lapilli.data.stamp import kind_of
from lapilli.recipe.resolved import resolved_yaml
from lapilli.recipe.schema import Stage
from lapilli.train.finish import export
from lapilli.train.folder import LEFT_OUT, MANIFEST, only_writer, open_folder, refuse_differences, run_facts
from lapilli.train.metrics import MetricsFile, read_metrics
from lapilli.train.monitor import Monitor, padding_share
from lapilli.train.optimizer import set_learning_rate
from lapilli.train.report import write_report
from lapilli.train.schedule import factor
from lapilli.train.setup import Prepared, Say, prepare
from lapilli.train.state import State, checkpoint_folder, load_tensors, prune, read_state, save_state
from lapilli.train.step import train_step
from lapilli.train.validate import validation_loss

Evaluate = Callable[[Prepared, int, bool, Progress, Callable[[], bool]], dict[str, float | None]]
"""(run, steps done, whether that was the last, where to say how far it is, whether to stop) to the scores of the tasks
that were due, by name. It leaves the model as it found it; a task that is not due, or was stopped, has no score."""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: `stopped_by` names the signal if it was asked to stop before its last step."""

    step: int
    total_steps: int
    stopped_by: str | None = None


def train_stage(
    stage: Stage,
    origins: Mapping[str, str],
    *,
    resume: str = "auto",
    dry_run: bool = False,
    say: Say = lambda _line: None,
    stream: TextIO | None = None,
    evaluate: Evaluate | None = None,
) -> Outcome:
    """Train one stage and write its run folder.

    `origins` says where each value of the recipe came from. `resume`: `auto`, `never` or a checkpoint folder. With
    `dry_run` everything is checked and said, nothing written. Live lines go to `stream` (default: standard error).
    `evaluate` is called after every step. Raises LapilliError for what can't be trained, before anything is written,
    and RunError for a non-finite loss.
    """
    ready = prepare(stage, resume, say, stream, write_index=not dry_run)
    say(_plan(ready))
    if dry_run:
        return Outcome(0, ready.total_steps)
    with only_writer(ready.folder.path, say):
        if open_folder(stage, resume) != ready.folder:
            raise RunError(f"{stage.out}: another process trained here in the meantime; give the command again")
        return _train(ready, origins, say, stream, evaluate)


def _train(
    ready: Prepared, origins: Mapping[str, str], say: Say, stream: TextIO | None, evaluate: Evaluate | None
) -> Outcome:
    facts = run_facts(ready.stage) | {"data": ready.corpus.index.stamp}
    done = _start(ready, origins, facts, say)
    with StopWish() as wish, MetricsFile(ready.folder.metrics, done) as metrics:
        loop = _Loop(ready, metrics, facts, done, evaluate)
        try:
            loop.run(wish, stream)
        except LapilliError:
            loop.save()
            if loop.done:
                say(f"stopped by an error after step {loop.done}, which is saved; the same command goes on from there")
            raise
    if loop.done < ready.total_steps:
        say(f"stopped by {wish.signal} after step {loop.done}; the same command goes on from there")
        return Outcome(loop.done, ready.total_steps, wish.signal)
    write_report(ready, read_metrics(ready.folder.metrics))
    export(ready, say)
    say(f"done: {ready.folder.model}")
    return Outcome(loop.done, ready.total_steps)


def _plan(ready: Prepared) -> str:
    train, per_epoch = ready.stage.train, ready.loader.steps_per_epoch
    visited = ready.loader.samples_per_epoch
    mixed = f", {visited:,} samples by weight" if visited != len(ready.corpus) else ""
    return (
        f"{ready.total_steps:,} steps of {train.global_batch_size} samples ({per_epoch:,} per epoch{mixed}), "
        f"{ready.stage.run.precision} on {ready.device.describe()}"
    )


def _start(ready: Prepared, origins: Mapping[str, str], facts: dict[str, Any], say: Say) -> int:
    """Take the run folder, put a checkpoint's state in place if there is one, and return the steps done."""
    folder = ready.folder
    done = 0
    if folder.resume_from is not None:
        state = read_state(folder.resume_from)
        refuse_differences(state.facts, facts, str(folder.resume_from))
        load_tensors(folder.resume_from, ready.engine, ready.optimizer, ready.device)
        done = state.step
        if ready.loader.quarantine is not None:
            ready.loader.quarantine.add(state.bad)
        say(f"going on after step {done} ({folder.resume_from})")
    atomic.remove_leftovers(folder.path)
    atomic.remove_leftovers(folder.checkpoints)
    atomic.atomic_write(folder.path / "recipe.yaml", resolved_yaml(ready.stage, origins))
    _list_left_out(ready)
    atomic.write_json(
        folder.path / MANIFEST,
        {
            "facts": facts,
            "data": ready.corpus.index.summary(),
            "total_steps": ready.total_steps,
            "device": ready.device.describe(),
            "made_with": {
                "lapilli": VERSION,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        },
    )
    return done


def _list_left_out(ready: Prepared) -> None:
    """Name every record that a policy dropped or shortened. What a template leaves out of all of them is not listed."""
    index = ready.corpus.index
    everywhere = {kind for kind, count in index.note_counts().items() if count == index.records}
    notes = [(note.where, note.reason) for note in index.notes if kind_of(note.reason) not in everywhere]
    if ready.loader.quarantine is not None:
        notes += [_noted(ready, one) for one in ready.loader.quarantine.found.values()]
    if notes:
        lines = [json.dumps({"record": where, "what": what}, ensure_ascii=False) for where, what in notes]
        atomic.atomic_write(ready.folder.path / LEFT_OUT, "\n".join(lines) + "\n")


def _noted(ready: Prepared, bad: BadRecord) -> tuple[str, str]:
    """Record and reason of a bad record, as the list of what was left out has them."""
    where = ready.corpus.where(bad.sample)
    return where, f"left out as bad: {bad.reason.removeprefix(f'{where}: ')}"


class _Loop:
    """The steps of a run. `done` counts them."""

    def __init__(
        self, ready: Prepared, metrics: MetricsFile, facts: dict[str, Any], done: int, evaluate: Evaluate | None
    ) -> None:
        self.ready, self.metrics, self.facts, self.done, self.evaluate = ready, metrics, facts, done, evaluate
        self.monitor = Monitor(ready.total_steps)
        self.saved = done

    def run(self, wish: StopWish, stream: TextIO | None) -> None:
        """Train until the last step, or until asked to stop; the state is saved either way."""
        ready, train = self.ready, self.ready.stage.train
        ready.loader.start_step = self.done
        with Progress("step", ready.total_steps, stream=stream) as progress:
            progress.update(self.done)
            began = time.perf_counter()
            for step in self._steps(wish):
                if step.bad:
                    for one in step.bad:
                        progress.write(f"left out: {one.reason}")
                    _list_left_out(ready)
                row = self._step(step, began)
                self.done = row["step"]
                last = self.done == ready.total_steps
                if ready.validation is not None and (last or _due(self.done, train.validate_every)):
                    row["validation_loss"] = validation_loss(ready)
                    progress.write(f"step {self.done}  validation loss {row['validation_loss']:.4f}")
                if self.evaluate is not None:
                    scores = self.evaluate(ready, self.done, last, progress, lambda: wish.signal is not None)
                    row |= {"evaluation": scores} if scores else {}
                self.metrics.append(row)
                progress.update(self.done, self.monitor.text())
                if last or _due(self.done, train.save_every):
                    self.save()
                if wish.signal:
                    break
                began = time.perf_counter()
        self.save()

    def _steps(self, wish: StopWish) -> Iterator[Step]:
        """The steps to come. A signal to the whole process group ends the data's workers too; that is no error then."""
        try:
            yield from self.ready.loader
        except DataError:
            if wish.signal is None:
                raise

    def _step(self, step: Step, began: float) -> dict[str, Any]:
        ready, train = self.ready, self.ready.stage.train
        number = step.step + 1
        scale = factor(number, ready.total_steps, train)
        set_learning_rate(ready.optimizer, scale)
        result = train_step(
            ready.engine,
            ready.optimizer,
            step.batches,
            train,
            ready.device.device,
            autocast=ready.device.autocast(ready.stage.run.precision),
            where=f"step {number}",
        )
        return self.monitor.row(
            number,
            step.epoch,
            result,
            learning_rate=train.learning_rate * scale,
            samples=sum(len(batch.ids) for batch in step.batches),
            seconds=time.perf_counter() - began,
            wait_seconds=step.wait_seconds,
            padding=padding_share(step.batches, ready.loaded.model.config.packing),
            memory_bytes=ready.device.peak_memory_bytes(),
        )

    def save(self) -> None:
        """Write the state after the last step that was done, if it is not written yet."""
        if self.saved == self.done:
            return
        ready = self.ready
        self.metrics.make_durable()
        folder = checkpoint_folder(ready.folder.checkpoints, self.done)
        bad = () if ready.loader.quarantine is None else tuple(ready.loader.quarantine.found.values())
        save_state(folder, State(self.done, self.facts, bad), ready.engine, ready.optimizer, ready.device)
        prune(ready.folder.checkpoints, ready.stage.train.keep_checkpoints)
        self.saved = self.done


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
