"""Models by name as a server's backend: what makes their answers (`Works`), and threads that read pictures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager

from fastapi import Request
from starlette.responses import Response

from lapilli.serve.backend import Card, Gauges, unknown_model
from lapilli.serve.completions import complete
from lapilli.serve.metrics import Metrics
from lapilli.serve.models import Served
from lapilli.serve.request import ChatRequest
from lapilli.serve.threads import ReadingThreads
from lapilli.serve.worker import Event, Wanted


class LocalModels:
    """A `Backend` over models by name; their threads run while it lives."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self._models = models
        self._threads = ReadingThreads()
        self._metrics = Metrics()

    @asynccontextmanager
    async def life(self, metrics: Metrics) -> AsyncIterator[None]:
        self._metrics = metrics
        async with running(self._models.values()):
            yield
        self._threads.close()

    @property
    def alive(self) -> bool:
        return all(m.worker.alive for m in self._models.values())

    async def cards(self) -> list[Card]:
        return [Card(m.name, m.created, m.template) for m in self._models.values()]

    async def complete(self, body: ChatRequest, request: Request) -> Response:
        model = self._models.get(body.model)
        if model is None:
            raise unknown_model(body.model, self._models)
        return await complete(model, body, request, self._threads, self._metrics)

    def gauges(self) -> Gauges:
        each = [({"model": m.name}, m) for m in self._models.values()]
        return {
            "lapilli_active": ("Answers that grow now.", [(labels, m.worker.active) for labels, m in each]),
            "lapilli_waiting": (
                "Answers that wait for a slot.",
                [(labels, max(0, m.taken - m.worker.active)) for labels, m in each],
            ),
            "lapilli_slots": ("Answers that may grow at a time.", [(labels, m.limits.slots) for labels, m in each]),
            "lapilli_failures": (
                "Answers lost by failures of the engine since the start.",
                [(labels, m.worker.failures) for labels, m in each],
            ),
            "lapilli_up": ("Whether the model's engine runs.", [(labels, int(m.worker.alive)) for labels, m in each]),
        }


@asynccontextmanager
async def running(models: Collection[Served]) -> AsyncIterator[None]:
    """Inside, the models' threads run, and what they make is handed out in this event loop."""
    loop = asyncio.get_running_loop()

    def post(made: Sequence[tuple[Wanted, Event]]) -> None:
        loop.call_soon_threadsafe(_hand_out, made)

    for model in models:
        model.worker.start(post)
    try:
        yield
    finally:
        for model in models:
            await asyncio.to_thread(model.worker.stop)


def _hand_out(made: Sequence[tuple[Wanted, Event]]) -> None:
    """Give what a step made to those who wait for it, in the event loop."""
    for wanted, event in made:
        wanted.take(event)
