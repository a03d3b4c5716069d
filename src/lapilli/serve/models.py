"""The models of a server: their names, and how many answers of each may be on their way."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lapilli.base.errors import RunError
from lapilli.data.template import Template
from lapilli.generate.assistant import Assistant, load_together
from lapilli.generate.engine import Engine
from lapilli.generate.processor import Processor
from lapilli.generate.text import Vocabulary
from lapilli.serve.reading import Reader, image_limits
from lapilli.serve.refusal import ApiError
from lapilli.serve.remote import RemotePictures
from lapilli.serve.settings import Limits
from lapilli.serve.worker import Post, Wanted, Worker

log = logging.getLogger(__name__)

_LONGEST_WAIT_SECONDS = 60.0
_NEWEST = 0.2
"""Weight of the newest answer in how long an answer usually takes."""


def name_models(given: Sequence[str]) -> dict[str, str]:
    """Name and folder of each model: `NAME=PATH`, or a path, whose last part is the name.

    Raises RunError for two of the same name, or a name that an address can't carry.
    """
    named: dict[str, str] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not equals or Path(one).exists():
            name, path = Path(one).resolve().name, one
        if not name or not path or not name.isprintable() or len(name) > 300:
            raise RunError(f'"{one}": give a model as PATH, or as NAME=PATH')
        if name in named:
            raise RunError(f'two models are called "{name}" ({named[name]}, {path}); name one of them: NAME={path}')
        named[name] = path
    return named


class Works(Protocol):
    """What makes a model's answers: a thread of this process (`Worker`), another process, or replicas elsewhere."""

    failures: int

    @property
    def alive(self) -> bool: ...
    @property
    def active(self) -> int: ...
    def start(self, post: Post) -> None: ...
    def want(self, wanted: Sequence[Wanted]) -> None: ...
    def stop(self) -> None: ...


@dataclass(eq=False)
class Served:
    """One model, and the answers of it that are on their way. Touched by the event loop alone."""

    name: str
    worker: Works
    reader: Reader
    vocabulary: Vocabulary
    limits: Limits
    template: Template | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    taken: int = 0
    """Answers that wait or grow."""
    _usual_seconds: float = 1.0

    @property
    def room(self) -> int:
        """Answers that may be on their way at a time."""
        return self.limits.slots + self.limits.queue

    def admit(self, answers: int) -> None:
        """Take places for answers. Raises ApiError if there are none now, or never are."""
        if not self.worker.alive:
            raise ApiError(503, f"{self.name}: the model does not answer any more", code="engine_stopped")
        if answers > self.room:
            raise ApiError(400, f"n: {answers}; this server makes {self.room} answers at a time at most", param="n")
        over = self.taken + answers - self.room
        if over > 0:
            wait = min(_LONGEST_WAIT_SECONDS, self._usual_seconds * max(1.0, over / self.limits.slots))
            raise ApiError(429, f"{self.name}: the queue is full", code="queue_full", retry_seconds=wait)
        self.taken += answers

    def release(self, answers: int, seconds: float | None = None) -> None:
        """Give places back; `seconds`: how long the answers took, if they were finished."""
        self.taken -= answers
        if seconds is not None:
            self._usual_seconds += _NEWEST * (seconds - self._usual_seconds)


def open_models(
    named: Mapping[str, str],
    limits: Limits,
    *,
    device: str = "cpu",
    remote: RemotePictures | None = None,
    **how: Any,
) -> dict[str, Served]:
    """Load every model, `how` as `load_together` takes it; with `remote`, pictures may be given by their address.

    Raises ModelError naming what is wrong with a folder.
    """
    begun = time.monotonic()
    assistants = load_together(named, device=device, **how)
    said = ", ".join(f"{name} ({path})" for name, path in named.items())
    log.info("%s on %s, loaded in %.1f s", said, device, time.monotonic() - begun)
    return {name: served(name, assistant, limits, remote) for name, assistant in assistants.items()}


def served(name: str, assistant: Assistant, limits: Limits, remote: RemotePictures | None = None) -> Served:
    """A loaded model, ready to be served."""
    processor = Processor(assistant, image_limits(limits))
    engine = Engine(assistant, processor)
    return Served(
        name,
        Worker(name, engine, limits.slots),
        Reader(engine, processor, limits, remote),
        Vocabulary(assistant.tokenizer),
        limits,
        assistant.template.bind(assistant.tokenizer),
    )
