"""Models in another process of this machine, as the server sees them: in place of engine threads of its own.

The way there is two threads: one sends answers wanted and tells of those that nobody waits for, one hears what is made.
"""

from __future__ import annotations

import itertools
import logging
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from threading import Lock, Thread
from typing import Any

import torch

from lapilli.base.errors import LapilliError, RunError
from lapilli.serve.apart.message import Asked, Left, Made, Opening
from lapilli.serve.models import Served
from lapilli.serve.passing import Facts, Numbered, Packed
from lapilli.serve.remote import RemotePictures
from lapilli.serve.settings import Limits
from lapilli.serve.worker import Event, Lost, Piece, Post, Wanted

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
"""How often it is looked for answers that nobody waits for any more."""
_END_SECONDS = 15.0
"""From asking the process to end to ending it."""


class Link:
    """The way to the process and back."""

    def __init__(self, connection: Connection, process: subprocess.Popen[bytes], names: Sequence[str]) -> None:
        self._connection, self._process = connection, process
        self.models = {name: Apart(name, self) for name in names}
        self._outbox: queue.SimpleQueue[tuple[Apart, dict[int, Wanted]] | None] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._threads: list[Thread] = []
        self._stopping = False

    def open(self, opening: Opening) -> Mapping[str, Facts]:
        """Let the process open its models. Raises what it says is wrong, or RunError if it ends before."""
        try:
            self._connection.send(opening)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            ending, what = _ending(self._process.wait()), ", ".join(opening.named.values())
            raise RunError(
                f"the models' process has ended ({ending}) before it had opened {what}; what it wrote above says why"
            ) from error
        if isinstance(answer, LapilliError):
            raise answer
        return answer

    def start(self) -> None:
        """Begin to send and to hear; called again, it does nothing."""
        if not self._threads:
            self._threads = [
                Thread(target=run, name=name, daemon=True)
                for run, name in ((self._send, "to the models"), (self._hear, "from the models"))
            ]
            for thread in self._threads:
                thread.start()

    def numbered(self, wanted: Sequence[Wanted]) -> dict[int, Wanted]:
        """Answers, by numbers that none had before."""
        return {next(self._numbers): one for one in wanted}

    def want(self, model: Apart, wanted: dict[int, Wanted]) -> None:
        """Send answers wanted, in a thread: pictures take a moment."""
        self._outbox.put((model, wanted))

    def stop(self) -> None:
        """End the process; what still grows is lost. Says so if it has to be killed."""
        if self._stopping:
            return
        self._stopping = True
        self._outbox.put(None)
        for thread in self._threads[:1]:
            thread.join(_END_SECONDS)
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("the models' process has not ended after %.0f s and is killed", _END_SECONDS)
            self._process.kill()
        for thread in self._threads[1:]:
            thread.join(_END_SECONDS)

    def close(self) -> None:
        """End the process at once, if it still runs."""
        self._stopping = True
        self._process.kill()
        self._process.wait()

    def _send(self) -> None:
        looked = 0.0
        try:
            while True:
                busy = any(model.waits for model in self.models.values())
                with suppress(queue.Empty):
                    item = self._outbox.get(timeout=_LOOK_SECONDS if busy else None)
                    if item is None:
                        self._connection.send(None)
                        return
                    model, wanted = item
                    answers = tuple((number, one.decoding, one.whole) for number, one in wanted.items())
                    prompt = next(iter(wanted.values())).prompt
                    self._connection.send(Asked(model.name, Packed.of(prompt), answers))
                if time.monotonic() - looked >= _LOOK_SECONDS:
                    looked = time.monotonic()
                    gone = tuple(number for model in self.models.values() for number in model.newly_left())
                    if gone:
                        self._connection.send(Left(gone))
        except OSError:
            return  # the process is gone, and the other thread hears of it

    def _hear(self) -> None:
        try:
            while True:
                made: Made = self._connection.recv()
                self.models[made.name].hear(made.active, made.events)
        except (EOFError, OSError):
            pass
        status = self._process.wait()
        lost = sum(model.end() for model in self.models.values())
        if not self._stopping:
            log.error("the models' process has ended (%s), %d answers are lost; start the server anew",
                      _ending(status), lost)  # fmt: skip


class Apart:
    """One model of the other process; to everything in front it looks like `Worker`."""

    def __init__(self, name: str, link: Link) -> None:
        self.name = name
        self._link = link
        self._given: dict[int, Wanted] = {}
        self._told: set[int] = set()
        """Of those given, what the process knows to be left."""
        self._active = 0
        self._ended = False
        self._lock = Lock()
        self._post: Post | None = None
        self.failures = 0

    @property
    def alive(self) -> bool:
        """Whether answers are being made."""
        return not self._ended

    @property
    def active(self) -> int:
        """Answers that grow now."""
        return self._active if self._given else 0

    @property
    def waits(self) -> bool:
        """Whether answers are on their way."""
        return bool(self._given)

    def start(self, post: Post) -> None:
        """Begin; `post` is called in the thread that hears."""
        self._post = post
        self._link.start()

    def want(self, wanted: Sequence[Wanted]) -> None:
        """Let answers to one prompt wait for their turn."""
        given = self._link.numbered(wanted)
        with self._lock:
            self._given |= given
            ended = self._ended
        if ended:
            self.hear(0, [(number, Lost()) for number in given])
        else:
            self._link.want(self, given)

    def stop(self) -> None:
        """End the process, for all of its models."""
        self._link.stop()

    def newly_left(self) -> list[int]:
        """Answers that nobody waits for since this was asked last."""
        with self._lock:
            gone = [n for n, wanted in self._given.items() if wanted.left and n not in self._told]
            self._told.update(gone)
        return gone

    def hear(self, active: int | None, events: Sequence[Numbered]) -> None:
        """Hand out what a step made."""
        if active is None:
            self.end()
            return
        heard: list[tuple[Wanted, Event]] = []
        with self._lock:
            self._active = active
            for number, event in events:
                heard.append((self._given[number], event))
                if not isinstance(event, Piece):
                    del self._given[number]
                    self._told.discard(number)
                    self.failures += isinstance(event, Lost)
        if heard and self._post is not None:
            self._post(heard)

    def end(self) -> int:
        """Nothing more is made; how many answers are lost by it."""
        with self._lock:
            self._ended = True
            lost = list(self._given)
        self.hear(0, [(number, Lost()) for number in lost])
        return len(lost)


@contextmanager
def open_apart(
    named: Mapping[str, str], limits: Limits, *, remote: RemotePictures | None = None, **how: Any
) -> Iterator[dict[str, Served]]:
    """Inside, a process of its own holds every model. `how` and what is raised as of `open_models`.

    Raises RunError too, if the process ends before it has opened them.
    """
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", "-m", "lapilli.serve.apart.process", str(theirs.fileno())]
    with theirs:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
    with Connection(ours.detach()) as connection:
        link = Link(connection, process, list(named))
        try:
            facts = link.open(Opening(dict(named), limits, how))
            torch.set_num_threads(1)  # four threads open pictures here; the processors are the models'
            yield {name: one.served(name, link.models[name], limits, remote) for name, one in facts.items()}
        finally:
            link.close()


def _ending(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"status {status}"
    hint = "; the system does so where memory runs out" if status == -signal.SIGKILL else ""
    return f"killed by signal {-status}{hint}"
