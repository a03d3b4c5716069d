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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from lapilli.base.errors import LapilliError
from lapilli.data.template import Template
from lapilli.generate.decoding import Decoding
from lapilli.generate.engine import Room
from lapilli.generate.processor import Processor, Prompt
from lapilli.serve.local import running
from lapilli.serve.models import Served, open_models
from lapilli.serve.settings import Limits
from lapilli.serve.worker import Event, Piece, Wanted, Worker

log = logging.getLogger(__name__)

Numbered = tuple[int, Event]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server has to know of a model to check its requests and to write its replies."""

    processor: Processor
    room: Room
    template: Template | None
    takes: int
    """Answers that a replica is given at a time."""
    where: str
    """The machine's name."""
    seconds: float
    """How long it took to load."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Answers to one prompt, on their way to a replica: each with its number, and whether only its end is told."""

    prompt: Prompt
    tiles: tuple[np.ndarray, ...]
    """The prompt's, as arrays: these travel without being copied."""
    answers: tuple[tuple[int, Decoding, bool], ...]

    @classmethod
    def of(cls, prompt: Prompt, answers: Sequence[tuple[int, Decoding, bool]]) -> Asked:
        return cls(replace(prompt, tiles=()), tuple(t.numpy() for t in prompt.tiles), tuple(answers))

    def copied(self) -> Prompt:
        """The prompt, in memory of this process: Ray's object store is free of it once the call has returned."""
        tiles = tuple(torch.from_numpy(array.copy()) for array in self.tiles)
        return replace(self.prompt, tiles=tiles, input_ids=self.prompt.input_ids.copy())


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
        self._facts: Facts | None = None
        self._server = ""
        self._made: asyncio.Queue[Numbered] = asyncio.Queue()
        self._wanted: dict[int, Wanted] = {}
        self._watch: asyncio.Task[None] | None = None

    async def open(self) -> Facts:
        """Load the model, the first time. Raises ModelError naming what is wrong with it."""
        async with self._opening:
            if self._facts is None:
                begun = time.monotonic()
                (self._model,) = (await asyncio.to_thread(self._load)).values()
                await self._life.enter_async_context(running([self._model]))
                self._facts = self._known(self._model, time.monotonic() - begun)
                self._heard = time.monotonic()
                if self._patience is not None:
                    self._watch = asyncio.create_task(self._until_silent(self._patience))
            return self._facts

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
            prompt = one.copied()
            for number, decoding, whole in one.answers:
                wanted = Wanted(prompt, decoding, partial(self._tell, self._made, number), whole)
                self._wanted[number] = wanted
                self._model.worker.want(wanted)
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

    def _known(self, model: Served, seconds: float) -> Facts:
        assert isinstance(model.worker, Worker)
        engine = model.worker.engine
        # A padded batch begins when the one before it has ended, so the next one has to wait here already.
        takes = self._limits.slots * (2 if engine.padded_because else 1)
        return Facts(engine.processor, engine.room, model.template, takes, os.uname().nodename, seconds)

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
