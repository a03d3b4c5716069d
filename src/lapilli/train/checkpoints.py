"""Checkpoints while the run goes on: the state is copied, and written in the background, by all processes together.

One save at a time: the next one waits for the last. A folder is written aside; when all processes have made their
files durable, the first one completes it and gives it its name. What goes wrong meanwhile is raised by `check` at the
next step, or by `wait`, and the checkpoints before stay as they were.
"""

import heapq
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from lapilli.base import atomic
from lapilli.base.errors import RunError
from lapilli.train.device.choose import Device
from lapilli.train.parallel.single import Single
from lapilli.train.parallel.world import WAITING, ProcessLost
from lapilli.train.state import (
    State,
    checkpoint_folder,
    complete_checkpoints,
    random_of_all,
    read_state,
    write_state,
)
from lapilli.train.tensors import Staged, stage, unwarned, write

BEST = "best.json"
"""Says, in the folder of the checkpoints, which one has the smallest validation loss."""

Tensors = Iterable[tuple[str, str, torch.Tensor]]


class Checkpoints:
    """The checkpoints of a run in one folder. While entered, it saves; all processes do the same, together."""

    def __init__(
        self,
        place: Path,
        engine: Single,
        optimizer: torch.optim.Optimizer,
        device: Device,
        *,
        background: bool = True,
        keep: int = 1,
        keep_best: int = 0,
        more: Callable[[], Tensors] = tuple,
    ) -> None:
        """`more` gives further tensors of the state, as `Single.state` does. Of all complete checkpoints the newest
        `keep` stay, and the `keep_best` with the smallest validation loss.
        """
        self.place, self.engine, self.optimizer, self.device = place, engine, optimizer, device
        self.background, self.keep, self.keep_best, self._more = background, keep, keep_best, more
        self.world = engine.world
        self.saved = 0
        """Checkpoints written."""
        self.last: int | None = None
        """Steps in the last one, written or being written; None if that failed."""
        self.waited_seconds = 0.0
        """How long the run stood still for them."""
        self._written: Future[None] | None = None
        self._folder = place
        self._held = ExitStack()

    def __enter__(self) -> "Checkpoints":
        self._held.enter_context(unwarned())
        self._thread = self._held.enter_context(ThreadPoolExecutor(1, thread_name_prefix="checkpoint"))
        # A connection of its own: it is used while the run's other messages are under way.
        self._group: dist.ProcessGroup | None = None
        if self.world.size > 1:
            group = dist.new_group(backend="gloo", timeout=WAITING)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def save(self, state: State) -> float:
        """Save the state of the run; return the seconds that it stood still for that.

        Raises RunError, naming the folder, if this or the save before failed; then nothing is left of it.
        """
        began = time.perf_counter()
        with self.world.together():
            self.wait()
            self._folder = checkpoint_folder(self.place, state.step)
            random = random_of_all(self.world, self.device)
            draft = self._begin() if self.world.first else None
            path = Path(self.world.from_first(lambda: str(draft.path) if draft else ""))
        tensors = chain(self.engine.state(self.optimizer), self._more())
        copy = self.background or self.engine.gathers
        staged = stage(tensors, self.world.rank, self.world.size, copy=copy)
        self.last = state.step
        self._written = self._thread.submit(self._write, path, staged, draft, state, random)
        if not self.background:
            with self.world.together():
                self.wait()
                self.world.exchange(None)
        seconds = time.perf_counter() - began
        self.waited_seconds += seconds
        return seconds

    def would_keep(self, validation_loss: float) -> bool:
        """Whether `keep_best` asks for a checkpoint of a step with this loss, as far as the others' are known."""
        if not (self.keep_best and math.isfinite(validation_loss)):
            return False
        began = time.perf_counter()
        with self.world.together():
            self.wait()
            kept = bool(self.world.from_first(lambda: self._would_keep(validation_loss)))
        self.waited_seconds += time.perf_counter() - began
        return kept

    def _would_keep(self, validation_loss: float) -> bool:
        best = _best(complete_checkpoints(self.place), self.keep_best)
        return len(best) < self.keep_best or validation_loss < best[-1][0]

    def check(self) -> None:
        """Raise what went wrong with the last save, if it has ended; as `wait`, but without waiting."""
        if self._written is not None and self._written.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is complete. Raises RunError, naming its folder, if it could not be written."""
        if self._written is None:
            return
        written, self._written = self._written, None
        last, self.last = self.last, None
        try:
            written.result()
        except (OSError, RunError) as error:
            raise RunError(
                f"{self._folder}: the checkpoint can't be written: {error}; earlier checkpoints are unharmed"
            ) from error
        except RuntimeError as error:  # what torch.distributed raises for closed connections
            raise ProcessLost(f"{self._folder}: another process is gone while it was written: {error}") from error
        self.last = last
        self.saved += 1

    def _begin(self) -> atomic.Draft:
        try:
            return atomic.Draft(self._folder, replace=True, marker=True)
        except OSError as error:
            raise RunError(f"{self._folder}: the checkpoint can't be written: {error}") from error

    def _write(
        self,
        path: Path,
        staged: dict[str, Staged],
        draft: atomic.Draft | None,
        state: State,
        random: dict[str, torch.Tensor],
    ) -> None:
        """In the thread: this process's files; and if it is the first, the rest, once all have written theirs."""
        try:
            for kind, part in staged.items():
                write(path / kind, part, self._group)
            if draft is not None:
                write_state(path, state, random)
                draft.publish()
                prune(self.place, self.keep, self.keep_best)
        finally:
            if draft is not None:
                draft.discard()


def prune(checkpoints: Path, keep: int, keep_best: int = 0) -> None:
    """Delete all complete checkpoints but the newest `keep` and the `keep_best` with the smallest validation loss.

    With `keep_best`, `BEST` then says which one is the best; of equal ones the older.
    """
    complete = complete_checkpoints(checkpoints)
    best = _best(complete, keep_best) if keep_best else []
    if best:
        loss, step, folder = best[0]
        atomic.write_json(checkpoints / BEST, {"folder": folder.name, "step": step, "validation_loss": loss})
    kept = {*complete[-keep:], *(folder for _, _, folder in best)}
    for old in complete:
        if old not in kept:
            atomic.remove(old)


def _best(complete: Iterable[Path], count: int) -> list[tuple[float, int, Path]]:
    """(validation loss, step, folder), the smallest loss first, of those whose loss is known and a number."""
    states = ((folder, read_state(folder)) for folder in complete)
    known = ((s.validation_loss, s.step, folder) for folder, s in states if s.validation_loss is not None)
    return heapq.nsmallest(count, (one for one in known if math.isfinite(one[0])))


def best_checkpoint(checkpoints: Path) -> tuple[float, int, Path] | None:
    """Return (validation loss, step, folder) of the best complete checkpoint; None if none knows its loss."""
    return next(iter(_best(complete_checkpoints(checkpoints), 1)), None)
