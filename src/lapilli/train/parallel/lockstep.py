"""Engines that split weights over the processes: all of them must run the same layers in the same order.

A process gets the weights it lacks from the others in the middle of a pass, so each has to make as many passes as the
others, and to send its own weights, whatever its part of a step is: a pass without anything to learn keeps it in step.
For the same reason an error in the middle of a pass can't be told in the usual way: the others wait for weights, not
for words. The process that has it leaves a note and ends; the others find their connections closed, and read it.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from lapilli.base.errors import LapilliError
from lapilli.data.sample import Batch
from lapilli.train.loss import LossModule
from lapilli.train.parallel.single import Single
from lapilli.train.parallel.world import EndedElsewhere, ProcessLost, World

_NOTE = "lapilli/failed"


class Lockstep(Single):
    """What the engines of split weights share."""

    def __init__(self, module: LossModule, world: World) -> None:
        super().__init__(module, world)
        self._idle = module.idle_batch()

    def level(self, batches: Sequence[Batch]) -> list[tuple[Batch, bool | None]]:
        shares = self.world.exchange([bool(batch.images) for batch in batches])
        passes = max(len(share) for share in shares)
        filled = [*batches, *[self._idle] * (passes - len(batches))]
        return [
            (batch, any(number < len(share) and share[number] for share in shares))
            for number, batch in enumerate(filled)
        ]

    def passing(self) -> "_Passing":
        return _Passing(self.world)


class _Passing:
    """An error inside ends this process with it, and the others with its first line."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._world.size == 1 or not isinstance(error, Exception):
            return
        if isinstance(error, EndedElsewhere | ProcessLost):
            return
        self._world.severed = True
        if not _connection_failed(error):
            leave_note(self._world, error)
            return
        raise reason_of_loss(self._world, error) from error


def _connection_failed(error: Exception) -> bool:
    """Whether torch.distributed raised this because another process is gone; Gloo has no class for it."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "/gloo/" in str(error))


def leave_note(world: World, error: Exception) -> None:
    """Write the first line of the error where the others look when they miss this process; the first note stays."""
    orderly = isinstance(error, LapilliError)
    line = (str(error).splitlines() or [""])[0]
    note = {"rank": world.rank, "said": line if orderly else f"{type(error).__name__}: {line}"}
    with suppress(dist.DistError):  # whoever keeps the notes may be gone too, and the others see that
        _get_default_store().compare_set(_NOTE, "", json.dumps(note))


def reason_of_loss(world: World, error: Exception) -> EndedElsewhere | ProcessLost:
    """The error of a process that misses another one: with the other's own words, if it left any."""
    me = f"process {world.rank} of {world.size}"
    with suppress(dist.DistError):
        store = _get_default_store()
        if store.check([_NOTE]):
            note = json.loads(store.get(_NOTE))
            return EndedElsewhere(f"{me} ends, because process {note['rank']} did: {note['said']}")
    line = (str(error).splitlines() or [""])[0]
    return ProcessLost(
        f"{me}: another process of this run is gone or does not answer; its own last words, or the launcher's, say why "
        f"({line})"
    )
