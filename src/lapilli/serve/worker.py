"""One thread per model: it alone touches the model, and all requests' answers grow side by side in it.

Answers wanted come through a queue; what is made leaves in one call per step, so that the event loop is woken once and
not once per answer. The more answers grow, the longer the text of each is gathered before it leaves: what sending costs
is bounded, whatever a step makes. First words and last words never wait. Whoever no longer waits says so by
`Wanted.leave`, and the slot is free after the step under way.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from lapilli.base.errors import LapilliError
from lapilli.generate.decoding import Answer, Decoding, TokenLogprob
from lapilli.generate.engine import Engine
from lapilli.generate.growing import Growing
from lapilli.generate.padding import answer_padded
from lapilli.generate.processor import Prompt

log = logging.getLogger(__name__)

_STEP_ERRORS = (LapilliError, RuntimeError, ValueError, IndexError, TypeError, KeyError)
"""What a step may raise (memory that ran out is a RuntimeError): its answers are lost, the server goes on."""

_GATHER_SECONDS = 0.002
"""For so long, times the other answers that grow, text is gathered: some 500 pieces a second leave at most."""
_LONGEST_GATHER_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of an answer, and the log-probabilities of the tokens since the last piece, if they were asked for."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Lost:
    """An answer that can't be finished, through no fault of its request."""


Event = Piece | Answer | Lost
Post = Callable[[Sequence[tuple["Wanted", Event]]], None]
"""Brings what a step made to the event loop; called in the engine's thread. A Wanted's last event is Answer or Lost."""


@dataclass(eq=False, slots=True)
class Wanted:
    """One answer that somebody waits for."""

    prompt: Prompt
    decoding: Decoding
    take: Callable[[Event], None]
    """Called where events are handed out, not in the engine's thread."""
    whole: bool = False
    """Of the pieces only the first is told, as a sign that the answer has begun."""
    left: bool = False
    row: Growing | None = None
    told: int = 0
    """Tokens whose log-probabilities are posted."""
    gathered: list[str] = field(default_factory=list)
    """Text that is not posted yet."""
    posted: float = 0.0
    """When text was posted last."""

    def leave(self) -> None:
        """Nobody waits any more."""
        self.left = True


class _Steps(Protocol):
    """What slots and padded batches have in common."""

    @property
    def active(self) -> int: ...
    def add(self, row: Growing, prompt: Prompt) -> None: ...
    def drop_ended(self) -> None: ...
    def step(self) -> None: ...


class PaddedBatches:
    """Answers of a model that has no slots: one padded batch at a time, each to its end."""

    def __init__(self, engine: Engine, slots: int) -> None:
        self._engine = engine
        self._size = 1 if engine.alone_because else slots
        self._waiting: deque[tuple[Growing, Prompt]] = deque()
        self.active = 0

    def add(self, row: Growing, prompt: Prompt) -> None:
        self._waiting.append((row, prompt))

    def drop_ended(self) -> None:
        self._waiting = deque(item for item in self._waiting if not item[0].ended)

    def step(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
        if not batch:
            return
        self.active = len(batch)
        try:
            rows, prompts = [row for row, _ in batch], [prompt for _, prompt in batch]
            engine = self._engine
            answer_padded(engine.model, engine.processor, prompts, rows, engine.end_ids, engine.never)
        finally:
            self.active = 0


@dataclass(eq=False)
class Worker:
    """The thread of one model. `slots`: answers that grow at a time."""

    name: str
    engine: Engine
    slots: int
    failures: int = 0
    _inbox: queue.SimpleQueue[Sequence[Wanted] | None] = field(default_factory=queue.SimpleQueue)
    _growing: list[Wanted] = field(default_factory=list)
    _made: list[tuple[Wanted, Event]] = field(default_factory=list)
    _steps: _Steps | None = None
    _post: Post | None = None
    _thread: threading.Thread | None = None
    _stopping: bool = False

    @property
    def alive(self) -> bool:
        """Whether answers are being made."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def active(self) -> int:
        """Answers that grow now."""
        return 0 if self._steps is None else self._steps.active

    def start(self, post: Post) -> None:
        """Begin; `post` is called in the thread."""
        self._post = post
        self._steps = self._new_steps()
        self._thread = threading.Thread(target=self._run, name=f"engine {self.name}", daemon=True)
        self._thread.start()

    def want(self, wanted: Sequence[Wanted]) -> None:
        """Let answers to one prompt wait for their turn."""
        self._inbox.put(wanted)

    def stop(self, wait_seconds: float = 10.0) -> None:
        """End the thread after the step under way; what still grows is lost. Says so if the step takes too long."""
        self._stopping = True
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join(wait_seconds)
            if self._thread.is_alive():
                log.warning("%s: a step has not ended after %.0f s and is left behind", self.name, wait_seconds)

    def _new_steps(self) -> _Steps:
        if self.engine.padded_because:
            return PaddedBatches(self.engine, self.slots)
        return self.engine.scheduler(self.slots)

    @torch.no_grad()
    def _run(self) -> None:
        try:
            while True:
                try:
                    if not self._receive():
                        break
                    self._turn()
                except _STEP_ERRORS:
                    log.exception("%s: a step failed; %d answers are lost", self.name, len(self._growing))
                    self._lose()
                    self._steps = self._new_steps()
        finally:
            self._take_all()
            self._lose()

    def _receive(self) -> bool:
        """Take what has arrived, waiting for it where nothing grows; False once the thread is to end."""
        while True:
            try:
                arrived = self._inbox.get(block=not self._growing)
            except queue.Empty:
                return True
            if arrived is None:
                return False
            self._growing += arrived
            for wanted in arrived:
                wanted.row = self.engine.growing(
                    wanted.prompt, wanted.decoding, partial(self._say, wanted), partial(self._over, wanted)
                )
                assert self._steps is not None
                self._steps.add(wanted.row, wanted.prompt)

    def _turn(self) -> None:
        assert self._steps is not None
        for wanted in self._growing:
            if wanted.row is not None:
                wanted.row.look()
        self._steps.drop_ended()
        self._steps.step()
        ended = [w for w in self._growing if w.row is not None and w.row.ended]
        if ended:
            self._growing = [w for w in self._growing if w.row is not None and not w.row.ended]
            for wanted in ended:
                last = self._ended(wanted)  # what it had not told goes first
                self._made.append((wanted, last))
        now = time.monotonic()
        gather = min(_LONGEST_GATHER_SECONDS, _GATHER_SECONDS * (self.active - 1))
        for wanted in self._growing:
            if wanted.gathered and now - wanted.posted >= gather:
                self._tell(wanted, now)
        self._flush()

    def _over(self, wanted: Wanted) -> bool:
        return wanted.left or self._stopping

    def _ended(self, wanted: Wanted) -> Event:
        assert wanted.row is not None
        if wanted.gathered:
            self._tell(wanted, 0.0)
        row, wanted.row = wanted.row, None  # the row knows the Wanted: no circle may keep pictures in memory
        if row.finish == "cancelled" and not wanted.left:
            self.failures += 1
            return Lost()
        return row.answer()

    def _say(self, wanted: Wanted, text: str) -> None:
        if wanted.whole and wanted.posted:
            return
        wanted.gathered.append(text)
        if isinstance(self._steps, PaddedBatches):  # its step ends only with its last answer
            self._tell(wanted, time.monotonic())
            self._flush()

    def _tell(self, wanted: Wanted, now: float) -> None:
        logprobs = () if wanted.row is None else tuple(wanted.row.logprobs[wanted.told :])
        wanted.told += len(logprobs)
        self._made.append((wanted, Piece("".join(wanted.gathered), logprobs)))
        wanted.gathered.clear()
        wanted.posted = now

    def _flush(self) -> None:
        made, self._made = self._made, []
        if made and self._post is not None:
            self._post(made)

    def _take_all(self) -> None:
        while not self._inbox.empty():
            self._growing += self._inbox.get() or []

    def _lose(self) -> None:
        self.failures += len(self._growing)
        self._made += [(w, Lost()) for w in self._growing]
        for wanted in self._growing:
            wanted.row = None
        self._growing = []
        self._flush()
