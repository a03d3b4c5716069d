"""What runs in a process of a Ray cluster: one model with its engine thread, for a server elsewhere.

The server reads requests and writes replies; here come prompts, and from here go the engine's events, those of all
answers in one stream, so that a step costs one message however many answers grow in it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from lapilli.base.errors import LapilliError
from lapilli.generate.decoding import Decoding
from lapilli.serve.local import running
from lapilli.serve.models import Served, open_models
from lapilli.serve.passing import Facts, Numbered, Packed
from lapilli.serve.settings import Limits
from lapilli.serve.worker import Event, Piece, Wanted

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Opened:
    """What a replica says of the model that it holds."""

    facts: Facts
    takes: int
    """Answers that it is given at a time."""
    where: str
    """The machine's name."""
    seconds: float
    """How long it took to load."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Answers to one prompt, on their way to a replica: each with its number, and whether only its end is told."""

    packed: Packed
    """Its arrays travel without being copied; Ray's object store is free of them once the call has returned."""
    answers: tuple[tuple[int, Decoding, bool], ...]


class Replica:
    """A model in a process of its own. Its methods are called through Ray, all in one event loop.

    `how` as `open_models` takes it. A server that was silent for `patience_seconds` is taken for dead, and the replica
    goes too: a cluster that others use must not be left with it.
    """

    def __init__(
        self, name: str, path: str, limits: Limits, how: Mapping[str, Any], patience_seconds: float | None = None
    ) -> None:
        _log()
        self._name, self._path, self._limits, self._how = name, path, limits, dict(how)
        self._patience = patience_seconds
        self._heard = time.monotonic()
        self._life = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._model: Served | None = None
        self._opened: Opened | None = None
        self._server = ""
        self._made: asyncio.Queue[Numbered] = asyncio.Queue()
        self._wanted: dict[int, Wanted] = {}
        self._watch: asyncio.Task[None] | None = None

    async def open(self) -> Opened:
        """Load the model, the first time. Raises ModelError naming what is wrong with it."""
        async with self._opening:
            if self._opened is None:
                begun = time.monotonic()
                (self._model,) = (await asyncio.to_thread(self._load)).values()
                await self._life.enter_async_context(running([self._model]))
                self._opened = self._known(self._model, time.monotonic() - begun)
                self._heard = time.monotonic()
                if self._patience is not None:
                    self._watch = asyncio.create_task(self._until_silent(self._patience))
            return self._opened

    async def events(self, server: str) -> AsyncIterator[list[Numbered]]:
        """All that is made for `server` from now on; first an empty list. What others have asked for is dropped."""
        await self.open()
        for wanted in self._wanted.values():
            wanted.leave()
        self._server, self._wanted, self._made = server, {}, asyncio.Queue()
        made = self._made
        yield []
        while True:
            batch = [await made.get()]
            while not made.empty():
                batch.append(made.get_nowait())
            yield batch

    async def want(self, server: str, asked: Sequence[Asked]) -> bool:
        """Let answers grow. False if it is not `server` that listens to `events`: nobody would hear them."""
        self._heard = time.monotonic()
        if self._model is None or server != self._server:
            return False
        for one in asked:
            prompt = one.packed.copied()
            wanted = {
                number: Wanted(prompt, decoding, partial(self._tell, self._made, number), whole)
                for number, decoding, whole in one.answers
            }
            self._wanted |= wanted
            self._model.worker.want(list(wanted.values()))
        return True

    async def leave(self, server: str, numbers: Sequence[int]) -> None:
        """Nobody waits for these any more, or for nothing at all: the server is there."""
        self._heard = time.monotonic()
        if server == self._server:
            for number in numbers:
                if number in self._wanted:
                    self._wanted[number].leave()

    def check_health(self) -> None:
        """Asked by Ray, which ends a replica that raises and starts another one."""
        if self._model is not None and not self._model.worker.alive:
            raise LapilliError(f"{self._name}: the engine's thread has ended")

    def _load(self) -> dict[str, Served]:
        return open_models({self._name: self._path}, self._limits, **self._how)

    def _known(self, model: Served, seconds: float) -> Opened:
        facts = Facts.of(model)
        # A padded batch begins when the one before it has ended, so the next one has to wait here already.
        takes = self._limits.slots * (2 if facts.padded else 1)
        return Opened(facts, takes, os.uname().nodename, seconds)

    def _tell(self, made: asyncio.Queue[Numbered], number: int, event: Event) -> None:
        if not isinstance(event, Piece):
            self._wanted.pop(number, None)
        made.put_nowait((number, event))

    async def _until_silent(self, patience: float) -> None:
        while time.monotonic() - self._heard < patience:
            await asyncio.sleep(patience / 10)
        await asyncio.to_thread(_delete_own_app)


def _delete_own_app() -> None:
    from ray import serve

    app = serve.get_replica_context().app_name
    log.warning("%s: the server that asked for this replica is silent; the replica goes", app)
    serve.delete(app, _blocking=False)


def _log() -> None:
    """What is logged here goes to standard error, from where Ray brings it to the server's log."""
    logger = logging.getLogger("lapilli")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
