"""The steps of a run, one after the other: learn, validate, evaluate, note, save.

Where several processes train together, each has its share of a step, and what belongs to the whole step (how much it
holds, which records are bad, whether somebody was asked to stop) is exchanged before it begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any, TextIO

from lapilli.base.errors import DataError
from lapilli.base.interrupt import StopWish
from lapilli.base.progress import Progress
from lapilli.data.quarantine import BadRecord
from lapilli.data.steps import Step
from lapilli.train.average import Average
from lapilli.train.checkpoints import Checkpoints
from lapilli.train.left_out import list_left_out
from lapilli.train.metrics import MetricsFile
from lapilli.train.monitor import Monitor, computed_positions
from lapilli.train.non_finite import Guard
from lapilli.train.optimizer import set_learning_rate
from lapilli.train.parallel.asked import AskedWhileWaiting, agree
from lapilli.train.precision import Audit
from lapilli.train.schedule import factor
from lapilli.train.setup import Prepared, Say
from lapilli.train.state import State
from lapilli.train.step import StepTotals
from lapilli.train.validate import validation_loss

Evaluate = Callable[[Prepared, int, bool, Progress, Callable[[], bool]], dict[str, float | None] | None]
"""(run, steps done, whether that was the last, where to say how far it is, whether to stop) to the scores of the tasks
that were due, by name; None if it was stopped before it had them all. It leaves the model as it found it."""


class Loop:
    """The steps of a run. `done` counts them."""

    def __init__(
        self,
        ready: Prepared,
        metrics: MetricsFile | None,
        checkpoints: Checkpoints,
        average: Average | None,
        guard: Guard,
        begin: State,
        evaluate: Evaluate | None,
    ) -> None:
        """`begin` is the state to go on from; its facts are those of this run."""
        self.ready, self.metrics, self.checkpoints, self.evaluate = ready, metrics, checkpoints, evaluate
        self.average, self.guard, self.facts, self.done = average, guard, begin.facts, begin.step
        self.world = ready.engine.world
        self.monitor = Monitor(ready.total_steps)
        checkpoints.last = begin.step
        self.waited = 0.0
        self.validated = begin.validation_loss
        """The validation loss after the last step, if that was computed."""
        self.judged = begin.judged
        """Whether all that is found out about the last step is; a wish to stop may come first."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left but to export the model."""
        return self.done == self.ready.total_steps and self.judged

    def run(self, wish: StopWish, stream: TextIO | None) -> None:
        """Train until the last step, or until asked to stop; the state is saved either way."""
        ready = self.ready
        ready.loader.start_step = self.done
        audit = Audit(ready.loaded.model, ready.stage.run.precision)
        with Progress("step", ready.total_steps, stream=stream) as progress:
            progress.update(self.done)
            self._catch_up(progress, wish)
            began = time.perf_counter()
            for step, whole, positions in self._steps(wish):
                if step.bad:
                    for one in step.bad:
                        progress.write(f"left out: {one.reason}")
                    if self.world.first:
                        list_left_out(ready)
                row = self._step(step, whole, positions, began, progress.write) | self._saving()
                for line in audit.lines():
                    progress.write(line)
                self.done, self.validated = row["step"], None
                row |= self._judge(progress, wish)
                if self.metrics is not None:
                    self.metrics.append(row)
                progress.update(self.done, self.monitor.text())
                if self._to_be_saved():
                    self.save()
                began = time.perf_counter()
        self.finish_saving()

    def _judge(self, progress: Progress, wish: StopWish) -> dict[str, Any]:
        """Validate and evaluate the step just done where that is due; `judged` says whether it came to an end."""
        ready = self.ready
        last = self.done == ready.total_steps
        found: dict[str, Any] = {}
        self.judged = True
        due = ready.validation is not None and (last or _due(self.done, ready.stage.train.validate_every))
        if due and self.validated is None:
            self.validated = validation_loss(ready, wish)
            self.judged = self.validated is not None
            if self.validated is not None:
                found["validation_loss"] = self.validated
                progress.write(f"step {self.done}  validation loss {self.validated:.4f}")
        if self.evaluate is not None and self.judged:
            found |= self._scores(self.evaluate, last, progress, wish)
        if not self.judged:
            agree(self.world, wish)
            what = "validation" if due and self.validated is None else "evaluation"
            progress.write(f"step {self.done}  {what} given up for {wish.signal}; it is done when the run goes on")
        return found

    def _catch_up(self, progress: Progress, wish: StopWish) -> None:
        """Find out about the last step what the run that is gone on with had to leave."""
        if self.judged:
            return
        found = self._judge(progress, wish)
        if self.metrics is not None:
            self.metrics.amend(self.done, found)
        if self.judged and self._to_be_saved():
            self.checkpoints.last = None  # what stands there does not know it
            self.save()

    def _to_be_saved(self) -> bool:
        last = self.done == self.ready.total_steps
        return last or _due(self.done, self.ready.stage.train.save_every) or self._among_the_best()

    def _steps(self, wish: StopWish) -> Iterator[tuple[Step, StepTotals, int]]:
        """The steps to come, what they hold on all processes, and the positions computed for that.

        They end where any process was asked to stop, for all of them after the same step.
        """
        steps = iter(self.ready.loader)
        for _ in range(self.done, self.ready.total_steps):
            if not self.judged or (self.world.size == 1 and wish.signal):
                return
            with self.world.together():
                self.checkpoints.check()
                step = _next(steps, wish)
                shares = self.world.exchange(self._share(step, wish))
            signals = [share["signal"] for share in shares if share["signal"]]
            if signals or step is None:
                wish.signal = signals[0] if signals else wish.signal  # the same for all: it is their exit status
                return
            whole = StepTotals.sum(StepTotals(**share["totals"]) for share in shares)
            if not whole.samples:
                raise DataError(f"step {step.step + 1}: none of its {len(step.samples)} samples can be read")
            bad = self._bad_of_all(step, shares)
            wait_seconds = max(share["wait_seconds"] for share in shares)
            yield replace(step, bad=bad, wait_seconds=wait_seconds), whole, sum(share["positions"] for share in shares)

    def _share(self, step: Step | None, wish: StopWish) -> dict[str, Any]:
        """What the other processes need to know of this one's part of a step."""
        if step is None or wish.signal:
            return {"signal": wish.signal}
        packing = self.ready.loaded.model.config.packing
        return {
            "signal": None,
            "totals": asdict(StepTotals.of(step.batches)),
            "positions": computed_positions(step.batches, packing),
            "wait_seconds": step.wait_seconds,
            "bad": [asdict(one) for one in step.bad],
        }

    def _bad_of_all(self, step: Step, shares: Sequence[dict[str, Any]]) -> tuple[BadRecord, ...]:
        """The records that any process found bad in this step; all of them count towards every process's ceiling."""
        if self.ready.loader.quarantine is None:
            return step.bad
        found = (BadRecord(**one) for share in shares for one in share["bad"])
        return (*step.bad, *self.ready.loader.quarantine.add(found))

    def _scores(
        self, evaluate: Evaluate, last: bool, progress: Progress, wish: StopWish
    ) -> dict[str, dict[str, float | None]]:
        due = any(last or _due(self.done, task.every) for task in self.ready.stage.train.evaluate)
        asked = AskedWhileWaiting(self.world, wish)
        with self.ready.engine.whole_model() if due else nullcontext(), self.world.together():
            scores = self.world.from_first(
                lambda: evaluate(self.ready, self.done, last, progress, asked.heard), meanwhile=asked.tell
            )
        if due and self.world.first:
            asked.forget()
        self.judged = scores is not None
        return {"evaluation": scores} if scores else {}

    def _step(self, step: Step, whole: StepTotals, positions: int, began: float, say: Say) -> dict[str, Any]:
        ready, train = self.ready, self.ready.stage.train
        number = step.step + 1
        scale = factor(number, ready.total_steps, train)
        set_learning_rate(ready.optimizer, scale)
        result = self.guard.step(step, whole, say)
        row = self.monitor.row(
            number,
            step.epoch,
            result,
            learning_rate=train.learning_rate * scale,
            seconds=time.perf_counter() - began,
            wait_seconds=step.wait_seconds,
            padding=1 - whole.tokens / positions,
            memory_bytes=ready.device.peak_memory_bytes(),
        )
        if self.guard.was_skipped(number):
            row["skipped"] = self.guard.skipped[-1].reason
        elif self.average is not None:
            self.average.update(number)
        return row

    def save(self) -> None:
        """Write the state after the last step that was done, if that is not written or being written yet."""
        with self.world.together():
            # A save may have failed in one process alone.
            if all(self.world.exchange(self.checkpoints.last == self.done)):
                return
        ready = self.ready
        if self.metrics is not None:
            self.metrics.make_durable()
        bad = () if ready.loader.quarantine is None else tuple(ready.loader.quarantine.found.values())
        skipped = tuple(self.guard.skipped)
        self.checkpoints.save(State(self.done, self.facts, bad, skipped, self.validated, self.judged))

    def _saving(self) -> dict[str, Any]:
        """How long training stood still for a checkpoint since the row before, if it did."""
        since, self.waited = self.checkpoints.waited_seconds - self.waited, self.checkpoints.waited_seconds
        return {"save_seconds": round(since, 6)} if since else {}

    def _among_the_best(self) -> bool:
        """Whether the step just done is one that `train.keep_best` keeps, as far as losses are known."""
        return self.validated is not None and self.checkpoints.would_keep(self.validated)

    def finish_saving(self) -> None:
        """Write the state after the last step, and wait until it is written."""
        self.save()
        with self.world.together():
            self.checkpoints.wait()
            self.world.exchange(None)


def _next(steps: Iterator[Step], wish: StopWish) -> Step | None:
    """The next step. A signal to the whole process group ends the data's workers too; that is no error then."""
    try:
        return next(steps)
    except DataError:
        if wish.signal is None:
            raise
        return None


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
