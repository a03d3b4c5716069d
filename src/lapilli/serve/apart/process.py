"""The process that holds the models: it opens them, and makes the answers that the server asks for.

`python -m lapilli.serve.apart.process DESCRIPTOR`, by `open_apart` alone; it ends when the server is gone, however that
went. All messages go over one connection: names and bounds come first, `Facts` or what is wrong with a folder go back,
and then answers wanted come and what each step makes goes.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from threading import Lock, Thread
from typing import Any

from lapilli.base.errors import LapilliError
from lapilli.serve.apart.message import Asked, Left, Made, Opening
from lapilli.serve.logs import start_log
from lapilli.serve.models import Served, Works, open_models
from lapilli.serve.passing import Facts
from lapilli.serve.threads import SWITCH_SECONDS
from lapilli.serve.worker import Event, Piece, Wanted

_LOOK_SECONDS = 1.0
"""How often it is looked whether the engines' threads run, where no message comes."""


class _Models:
    """The models of this process, and the answers that the server waits for."""

    def __init__(self, connection: Connection, models: Mapping[str, Served]) -> None:
        self._connection = connection
        self._works: dict[str, Works] = {name: model.worker for name, model in models.items()}
        self._ended: set[str] = set()
        self._wanted: dict[int, Wanted] = {}
        self._numbers: dict[Wanted, int] = {}
        self._sending = Lock()

    def run(self, inbox: queue.SimpleQueue[Any]) -> None:
        """Make answers until the server says that it is enough."""
        for name, worker in self._works.items():
            worker.start(partial(self._post, name))
        try:
            while True:
                self._look()
                with suppress(queue.Empty):
                    message = inbox.get(timeout=_LOOK_SECONDS)
                    if message is None:
                        break
                    self._take(message)
        finally:  # a thread that still computes would keep a process that fails from ending
            for worker in self._works.values():
                worker.stop()

    def _take(self, message: Asked | Left) -> None:
        if isinstance(message, Asked):
            self._want(message)
            return
        for number in message.numbers:
            if number in self._wanted:
                self._wanted[number].leave()

    def _want(self, asked: Asked) -> None:
        prompt = asked.packed.copied()
        wanted = {number: Wanted(prompt, one, _nothing, whole) for number, one, whole in asked.answers}
        self._wanted |= wanted
        self._numbers |= {one: number for number, one in wanted.items()}
        self._works[asked.name].want(list(wanted.values()))

    def _post(self, name: str, made: Sequence[tuple[Wanted, Event]]) -> None:
        """In an engine's thread."""
        events = tuple((self._numbers[wanted], event) for wanted, event in made)
        for wanted, event in made:
            if not isinstance(event, Piece):
                del self._wanted[self._numbers.pop(wanted)]
        self._send(Made(name, self._works[name].active, events))

    def _look(self) -> None:
        for name, worker in self._works.items():
            if not worker.alive and name not in self._ended:
                self._ended.add(name)
                self._send(Made(name, None, ()))

    def _send(self, made: Made) -> None:
        with self._sending:
            self._connection.send(made)


def _nothing(_: Event) -> None:
    """Events are told by number."""


def _receive(connection: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)  # the server is gone: nobody waits for anything


def main(descriptor: int) -> None:
    """Serve over an open socket."""
    # Asked to stop is the server, which lets answers end first; a terminal asks both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start_log()
    sys.setswitchinterval(SWITCH_SECONDS)
    connection, inbox = Connection(descriptor), queue.SimpleQueue[Any]()
    Thread(target=_receive, args=(connection, inbox), name="receiver", daemon=True).start()
    opening: Opening = inbox.get()
    try:
        models = open_models(opening.named, opening.limits, **opening.how)
    except LapilliError as error:
        connection.send(error)
        return
    connection.send({name: Facts.of(model) for name, model in models.items()})
    _Models(connection, models).run(inbox)


if __name__ == "__main__":
    main(int(sys.argv[1]))
