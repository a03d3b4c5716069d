"""One stage of training, top to bottom: set up, go on where it stopped, step, save, finish.

What is in a run folder, and when it is refused, is told in `folder.py`; the loop over steps stands in `loop.py`. A run
keeps three promises: a step is in `metrics.jsonl` once; a checkpoint is never ahead of its metrics; and a run that is
stopped, by a signal or a crash, goes on from its newest complete checkpoint as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from traceback import clear_frames
from typing import Any, TextIO

from lapilli.base import atomic
from lapilli.base.errors import LapilliError, RunError
from lapilli.base.interrupt import StopWish
from lapilli.recipe.resolved import resolved_yaml
from lapilli.recipe.schema import Stage
from lapilli.train.average import Average, choose_weights
from lapilli.train.checkpoints import Checkpoints
from lapilli.train.finish import export
from lapilli.train.folder import MANIFEST, only_writer, open_folder, refuse_differences, run_facts
from lapilli.train.left_out import list_left_out
from lapilli.train.loop import Evaluate, Loop
from lapilli.train.manifest import manifest
from lapilli.train.metrics import MetricsFile, read_metrics
from lapilli.train.non_finite import Guard
from lapilli.train.parallel.world import ALONE, ProcessLost, World
from lapilli.train.plan.advice import advise, is_out_of_memory
from lapilli.train.rehearse import rehearse
from lapilli.train.report import write_report
from lapilli.train.setup import Prepared, Say, Survey, prepare
from lapilli.train.state import State, read_state, set_random
from lapilli.train.tensors import Saved
from lapilli.train.trackers import Trackers


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. `stopped_by` names the signal if it was asked to stop: before its last step, or too late for
    that, so that it is for the next stage."""

    step: int
    total_steps: int
    stopped_by: str | None = None
    finished: bool = False
    """Whether all steps are done and `model/` is written."""


def train_stage(
    stage: Stage,
    origins: Mapping[str, str],
    *,
    resume: str = "auto",
    dry_run: bool = False,
    say: Say = lambda _line: None,
    stream: TextIO | None = None,
    evaluate: Evaluate | None = None,
    world: World = ALONE,
) -> Outcome:
    """Train one stage and write its run folder.

    `origins` says where each value of the recipe came from. `resume`: `auto`, `never` or a checkpoint folder. With
    `dry_run` everything is checked and said, nothing written. Live lines go to `stream` (default: standard error).
    `evaluate` is called after every step. The processes of `world` train together; the first one writes and evaluates.
    Raises LapilliError for what can't be trained, before anything is written, and RunError for a non-finite loss, or
    with advice where memory is used up.
    """
    if dry_run:
        found = rehearse(stage, resume, say, stream, world)
        say(_plan(stage, found, world))
        return Outcome(0, found.total_steps)
    lost: BaseException
    try:
        return _train_stage(stage, origins, resume, say, stream, evaluate, world)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        lost = error
    clear_frames(lost.__traceback__)  # what the step held is needed no more
    raise RunError(advise(stage, world.size, lost)) from lost


def _train_stage(
    stage: Stage,
    origins: Mapping[str, str],
    resume: str,
    say: Say,
    stream: TextIO | None,
    evaluate: Evaluate | None,
    world: World,
) -> Outcome:
    with world.together():
        ready = prepare(stage, resume, say, stream, world=world)
    say(_plan(stage, ready, world))

    def take_folder() -> None:
        held.enter_context(only_writer(ready.folder.path, say))
        if open_folder(stage, resume) != ready.folder:
            raise RunError(f"{stage.out}: another process trained here in the meantime; give the command again")

    with ExitStack() as held:
        with world.together():
            world.from_first(take_folder)
        return _train(ready, origins, say, stream, evaluate)


def _train(
    ready: Prepared, origins: Mapping[str, str], say: Say, stream: TextIO | None, evaluate: Evaluate | None
) -> Outcome:
    facts, world = run_facts(ready.stage) | {"data": ready.corpus.index.stamp}, ready.engine.world
    decay = ready.stage.train.average_decay
    average = Average(ready.engine, decay) if decay is not None else None
    guard = Guard(ready)
    with world.together():
        begin = _go_on(ready, average, guard, facts, say)
        world.from_first(lambda: _begin_folder(ready, origins, facts, begin.step))
    with (
        StopWish(for_good=True) as wish,
        _metrics(ready, begin.step, say) if world.first else nullcontext() as metrics,
        _checkpoints(ready, average) as checkpoints,
    ):
        loop = Loop(ready, metrics, checkpoints, average, guard, begin, evaluate)
        try:
            loop.run(wish, stream)
        except ProcessLost:
            raise
        except LapilliError:
            if not world.severed:
                _save_what_is_done(loop, say)
            raise
    if checkpoints.saved:
        say(f"{checkpoints.saved} checkpoints saved; training stood still {checkpoints.waited_seconds:.1f} s for them")
    if not loop.finished:
        say(f"stopped by {wish.signal} after step {loop.done}; the same command goes on from there")
        return Outcome(loop.done, ready.total_steps, wish.signal)

    def finish() -> None:
        write_report(ready, read_metrics(ready.folder.metrics))
        export(ready, say)

    with world.together():
        choose_weights(ready, average, say)
    ready.engine.collect()
    with world.together():
        world.from_first(finish)
    say(f"done: {ready.folder.model}")
    asked = [name for name in world.exchange(wish.signal) if name is not None]
    return Outcome(loop.done, ready.total_steps, asked[0] if asked else None, finished=True)


def _metrics(ready: Prepared, done: int, say: Say) -> MetricsFile:
    trackers = Trackers(ready.stage, ready.folder.path, done, say)
    return MetricsFile(ready.folder.metrics, done, trackers)


def _checkpoints(ready: Prepared, average: Average | None) -> Checkpoints:
    stage = ready.stage
    return Checkpoints(
        ready.folder.checkpoints,
        ready.engine,
        ready.optimizer,
        ready.device,
        background=stage.run.checkpoints == "async",
        keep=stage.train.keep_checkpoints,
        keep_best=stage.train.keep_best,
        more=average.state if average is not None else tuple,
    )


def _save_what_is_done(loop: Loop, say: Say) -> None:
    """Save the last good step of a run that an error ends, if that is still possible."""
    try:
        loop.finish_saving()
    except ProcessLost:
        raise
    except LapilliError as error:  # a full disk, say: what stopped the run is raised, and this is said beside it
        say(str(error))
    else:
        if loop.done:
            say(f"stopped by an error after step {loop.done}, which is saved; the same command goes on from there")


def _plan(stage: Stage, ready: Prepared | Survey, world: World) -> str:
    per_epoch, visited = ready.loader.steps_per_epoch, ready.loader.samples_per_epoch
    mixed = f", {visited:,} samples by weight" if visited != len(ready.corpus) else ""
    engine = ready.engine if isinstance(ready.engine, str) else ready.engine.name
    return (
        f"{ready.total_steps:,} steps of {stage.train.global_batch_size} samples ({per_epoch:,} per epoch{mixed}), "
        f"{stage.run.precision} on {ready.device.describe()}"
        + ("" if world.size == 1 else f", {world.size} processes ({engine})")
    )


def _go_on(ready: Prepared, average: Average | None, guard: Guard, facts: dict[str, Any], say: Say) -> State:
    """Put a checkpoint's state in place if there is one, and return it, or that of a run which begins."""
    folder = ready.folder
    state = State(0, facts)
    if folder.resume_from is not None:
        state = read_state(folder.resume_from)
        refuse_differences(state.facts, facts, str(folder.resume_from))
        ready.engine.load_state(Saved(folder.resume_from), ready.optimizer)
        if average is not None:
            average.load(Saved(folder.resume_from))
        set_random(folder.resume_from, ready.engine.world.rank, ready.device)
        guard.skipped = list(state.skipped)
        if ready.loader.quarantine is not None:
            ready.loader.quarantine.add(state.bad)
        say(f"going on after step {state.step} ({folder.resume_from})")
    return replace(state, facts=facts)


def _begin_folder(ready: Prepared, origins: Mapping[str, str], facts: dict[str, Any], done: int) -> None:
    """Take the run folder, and write down in it what is run."""
    folder = ready.folder
    atomic.remove_leftovers(folder.path)
    atomic.remove_leftovers(folder.checkpoints)
    atomic.atomic_write(folder.path / "recipe.yaml", resolved_yaml(ready.stage, origins))
    list_left_out(ready)
    atomic.write_json(folder.path / MANIFEST, manifest(ready, facts, done))
