"""Which workers there are, what they serve, and which one a question goes to.

A worker registers by its address, says every 15 seconds that it is there and how many wait, and is forgotten when it
falls silent, refuses a connection or breaks off a stream. One that was forgotten hears so at its next beat and
registers again. Everything here runs in one event loop: nothing is shared with threads.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from lapilli.base.http import is_loopback
from lapilli.serve.cluster.frames import EXPIRY_SECONDS, NO_WORKER, WORKER_GONE, frame
from lapilli.serve.refusal import ApiError, invalid

log = logging.getLogger(__name__)

Dispatch = Literal["lottery", "shortest_queue"]
_STATUS_SECONDS = 5.0
_STREAM_SECONDS = 60.0
"""How long a worker may say nothing while it answers; a queue in front of it is part of that."""
_WORKERS = 1000
_MODELS = 100
_TEMPLATE_CHARACTERS = 200_000


@dataclass
class Known:
    """A worker, as it said of itself."""

    models: tuple[str, ...]
    speed: float
    queue_length: float
    check: bool
    """Whether it is forgotten when it falls silent."""
    templates: Mapping[str, Any] = field(default_factory=dict)
    """How prompts of its models are written, where it says so; passed on unread."""
    beat: float = field(default_factory=time.monotonic)


class Controller:
    """The table of workers. `key` is shown to them; `anywhere`: they may be on other machines."""

    def __init__(
        self, dispatch: Dispatch = "shortest_queue", key: str | None = None, *, anywhere: bool = False
    ) -> None:
        self.workers: dict[str, Known] = {}
        self._dispatch, self._anywhere = dispatch, anywhere
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        wait = httpx.Timeout(_STATUS_SECONDS, read=_STREAM_SECONDS)
        self._client = httpx.AsyncClient(headers=headers, timeout=wait, trust_env=False)
        self._random = random.Random()

    async def close(self) -> None:
        """Let go of the connections."""
        await self._client.aclose()

    async def register(self, name: str, check: bool, status: Mapping[str, Any] | None) -> None:
        """Take a worker in, after asking it what it serves unless it said so.

        Raises ApiError for an address that may not be one, and for a worker that does not answer.
        """
        self._refuse_strange(name)
        if name not in self.workers and len(self.workers) >= _WORKERS:
            raise ApiError(503, f"{_WORKERS} workers are registered already", code="full")
        if status is None:
            status = await self._status(name)
        self.workers[name] = _known(name, check, status)
        log.info("%s serves %s", name, ", ".join(self.workers[name].models))

    def forget(self, name: str, why: str) -> None:
        """Send nothing more to a worker, until it registers again."""
        if self.workers.pop(name, None) is not None:
            log.warning("%s is forgotten: %s", name, why)

    def beat(self, name: str, queue_length: float) -> bool:
        """A worker is there; false if it has to register again."""
        known = self.workers.get(name)
        if known is None:
            return False
        known.beat, known.queue_length = time.monotonic(), max(0.0, queue_length)
        return True

    def models(self) -> list[str]:
        """What is served, by name."""
        return sorted({model for known in self.workers.values() for model in known.models})

    def address(self, model: str) -> str:
        """The worker that the next question for a model goes to; empty if there is none."""
        serving = {name: known for name, known in self.workers.items() if model in known.models}
        if not serving:
            return ""
        if self._dispatch == "lottery":
            weights = [known.speed for known in serving.values()]
            return self._random.choices(list(serving), weights)[0]
        name = min(serving, key=lambda one: serving[one].queue_length / serving[one].speed)
        serving[name].queue_length += 1  # until it says itself
        return name

    def status(self) -> dict[str, Any]:
        """All workers as if they were one, for a controller above this one."""
        known = self.workers.values()
        return {
            "model_names": self.models(),
            "speed": sum(one.speed for one in known),
            "queue_length": sum(one.queue_length for one in known),
            "templates": {model: fields for one in known for model, fields in one.templates.items()},
        }

    async def refresh(self) -> None:
        """Ask every worker again what it serves; forget those that don't answer."""

        async def again(name: str, check: bool) -> None:
            try:
                await self.register(name, check, None)
            except ApiError as error:
                self.forget(name, error.message)

        await asyncio.gather(*(again(name, known.check) for name, known in list(self.workers.items())))

    async def watch(self, every_seconds: float = 5.0) -> None:
        """For ever: forget workers that are silent, or whose address refuses connections."""
        while True:
            await asyncio.sleep(every_seconds)
            for name, known in list(self.workers.items()):
                if known.check and time.monotonic() - known.beat > EXPIRY_SECONDS:
                    self.forget(name, f"no sign of life for {EXPIRY_SECONDS:g} s")
                elif known.check and not await _listens(name):
                    self.forget(name, "its address refuses connections")

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[bytes]:
        """A worker's answer to a request, as it comes. What goes wrong is the stream's last object."""
        model = str(body.get("model", ""))
        name = self.address(model)
        if not name:
            yield frame(f"No worker serves {model!r} now.", NO_WORKER)
            return
        try:
            async with self._client.stream("POST", f"{name}/worker_generate_stream", json=dict(body)) as response:
                if response.status_code != 200:
                    yield frame(f"The worker refused the request (HTTP {response.status_code}).", WORKER_GONE)
                    return
                async for piece in response.aiter_raw():
                    yield piece
        except httpx.HTTPError as error:
            self.forget(name, f"{type(error).__name__} while it answered")
            yield frame("The worker is gone; please ask again.", WORKER_GONE)

    async def _status(self, name: str) -> Mapping[str, Any]:
        try:
            response = await self._client.post(f"{name}/worker_get_status", timeout=_STATUS_SECONDS, json={})
            response.raise_for_status()
            return response.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ApiError(502, f"the worker does not answer ({type(error).__name__})", code="no_worker") from error

    def _refuse_strange(self, name: str) -> None:
        """Only addresses of workers are connected to, and without a key only those of this machine."""
        try:
            parts = urlsplit(name)
            fit = parts.scheme in ("http", "https") and parts.hostname and parts.port and not parts.query
        except ValueError:
            fit = False
        if not fit or parts.username is not None or len(name) > 300:
            raise invalid("worker_name: the worker's address, as http://HOST:PORT", "worker_name")
        if not self._anywhere and not is_loopback(parts.hostname or ""):
            raise ApiError(
                403, "without a key this controller takes workers of this machine only", code="worker_elsewhere"
            )


def _known(name: str, check: bool, status: Mapping[str, Any]) -> Known:
    try:
        models = tuple(str(model)[:300] for model in status["model_names"][:_MODELS])
        speed, waiting = float(status.get("speed", 1)), float(status.get("queue_length", 0))
    except (KeyError, TypeError, ValueError) as error:
        raise invalid(f"worker_status: {name} says {type(error).__name__}", "worker_status") from error
    if not models or not 0 < speed < 1e6 or not 0 <= waiting < 1e6:
        raise invalid("worker_status: needs model_names, and numbers that make sense", "worker_status")
    told = status.get("templates")
    templates = {model: told[model] for model in models if model in told} if isinstance(told, dict) else {}
    if len(json.dumps(templates)) > _TEMPLATE_CHARACTERS:
        raise invalid(f"worker_status: templates of more than {_TEMPLATE_CHARACTERS:,} characters", "worker_status")
    return Known(models, speed, waiting, check, templates)


async def _listens(name: str) -> bool:
    parts = urlsplit(name)
    try:
        async with asyncio.timeout(_STATUS_SECONDS):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except OSError:  # a time-out among them
        return False
    writer.close()
    return True
