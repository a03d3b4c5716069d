"""Workers of a LLaVA cluster as a server's backend: the controller says which there are, and each request goes to one.

Controller and workers may be the original's or ours. Their protocol knows rendered texts and nothing else of a
conversation, so it is rendered here: by the template that the operator names, else the one that a worker of ours says,
else the one that the original's web server takes for a model of that name.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

import httpx
from fastapi import Request
from starlette.responses import JSONResponse, Response

from lapilli.data.template import Template, get_template
from lapilli.serve.backend import Card, Gauges, unknown_model
from lapilli.serve.cluster.asking import Asker
from lapilli.serve.cluster.frames import gone, no_worker
from lapilli.serve.cluster.passage import Passage
from lapilli.serve.completions import CLIENT_GONE, EventStream, GoneError
from lapilli.serve.metrics import Metrics
from lapilli.serve.naming import guess_template
from lapilli.serve.refusal import ApiError, invalid
from lapilli.serve.remote import RemotePictures
from lapilli.serve.request import ChatRequest
from lapilli.serve.settings import Limits
from lapilli.serve.upstream.reply import Words, lines, whole

log = logging.getLogger(__name__)

ListMode = Literal["once", "reload"]
_READERS, _FETCHERS = 4, 8
"""Requests whose pictures are decoded, and fetched, at a time."""
_STATUS_SECONDS = 5.0
_REFRESH_SECONDS = 30.0
"""For the controller to ask all its workers."""
_SILENT_SECONDS = 60.0
"""How long a worker may say nothing while it answers; a queue in front of it is part of that."""
_LOOK_SECONDS = 10.0
_KNOWN_SECONDS = 60.0
"""How long it holds what a worker said of its template."""
_LIST, _STATUS = ("list_models", "models"), ("worker_get_status", "model_names")
_FIRST = {"vicuna-13b": 0, "koala-13b": 1}
"""Models that the original lists before the others."""


class Cluster:
    """A `Backend` over the workers that a controller knows.

    `key` is shown to controller and workers. With `worker` that one alone is asked, and no controller. With `models`
    "once" they are asked for when the first one wants to know, and again only while there are none; with "reload" every
    time.
    """

    def __init__(
        self,
        controller: str,
        limits: Limits,
        *,
        worker: str | None = None,
        key: str | None = None,
        template: Template | None = None,
        models: ListMode = "once",
        remote: RemotePictures | None = None,
    ) -> None:
        self.limits, self.metrics = limits, Metrics()
        self._controller, self._worker = controller.rstrip("/"), worker and worker.rstrip("/")
        self._key, self._template, self._mode = key, template, models
        self._asker = Asker(limits, remote)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="fetcher")
        self._slots, self._listing = asyncio.Semaphore(limits.slots), asyncio.Lock()
        self._names: list[str] = []
        self._since: dict[str, int] = {}
        self._templates: dict[str, tuple[Template, float]] = {}
        self._client: httpx.AsyncClient | None = None
        self._well, self._taken, self._active, self._failures = True, 0, 0, 0

    # ---- what a Backend is -----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def life(self, metrics: Metrics) -> AsyncIterator[None]:
        self.metrics = metrics
        headers = {"User-Agent": "LLaVA Client", "Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        wait = httpx.Timeout(_STATUS_SECONDS, read=_SILENT_SECONDS)
        bounds = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        async with httpx.AsyncClient(headers=headers, timeout=wait, limits=bounds, trust_env=False) as self._client:
            looking = asyncio.create_task(self._look())
            try:
                yield
            finally:
                looking.cancel()
                with suppress(asyncio.CancelledError):
                    await looking
        for pool in (self._readers, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def alive(self) -> bool:
        return self._well

    async def cards(self) -> list[Card]:
        names = await self._models()
        for name in names:
            self._since.setdefault(name, int(time.time()))
        return [Card(name, self._since[name], self._known(name)) for name in names]

    async def complete(self, body: ChatRequest, request: Request) -> Response:
        self._asker.check(body)
        passage = Passage(self, body.model, body.n or 1, request.scope["state"]["begun"])
        streams = False
        try:
            template = await self._template_of(body.model)
            place = self._fetchers if self._asker.fetches(body) else self._readers
            asked = await asyncio.get_running_loop().run_in_executor(place, self._asker.write, body, template)
            self.metrics.count("lapilli_pictures_total", asked.pictures, model=body.model)
            passage.ask(asked, (*template.stop, *body.stops), request)
            await passage.opened()  # what is wrong at once is said by the status, streamed or not
            words = Words(body.model)
            if body.stream:
                streams = True
                return EventStream(passage, lines(passage, words, body))
            return JSONResponse(await whole(passage, words, body))
        except GoneError:
            return Response(status_code=CLIENT_GONE)
        finally:
            if not streams:
                passage.close()

    def gauges(self) -> Gauges:
        return {
            "lapilli_active": ("Answers that workers were asked for.", [({}, self._active)]),
            "lapilli_waiting": ("Answers that wait for their turn.", [({}, max(0, self._taken - self._active))]),
            "lapilli_slots": ("Answers that may be asked for at a time.", [({}, self.limits.slots)]),
            "lapilli_failures": ("Answers lost by workers since the start.", [({}, self._failures)]),
            "lapilli_up": ("Whether the controller answers.", [({}, int(self._well))]),
        }

    # ---- what a Passage needs --------------------------------------------------------------------------------------

    @property
    def client(self) -> httpx.AsyncClient:
        assert self._client is not None, "a backend answers inside its life"
        return self._client

    def admit(self, answers: int) -> None:
        """Take places for answers. Raises ApiError if there are none now, or never are."""
        room = self.limits.slots + self.limits.queue
        if answers > room:
            raise invalid(f"n: {answers}; this server makes {room} answers at a time at most", "n")
        if self._taken + answers > room:
            raise ApiError(429, "the queue is full", code="queue_full", retry_seconds=2)
        self._taken += answers

    def release(self, answers: int) -> None:
        """Give places back."""
        self._taken -= answers

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Inside, one answer may be asked for. First come, first served."""
        async with self._slots:
            self._active += 1
            try:
                yield
            finally:
                self._active -= 1

    async def address(self, model: str) -> str:
        """The worker that the next question for a model goes to. Raises ApiError if there is none."""
        if self._worker is not None:
            if model in await self._models():
                return self._worker
            raise unknown_model(model, self._names)
        said = await self._post("get_worker_address", {"model": model})
        address = said.get("address") if isinstance(said, dict) else None
        if not isinstance(address, str) or not address:
            known = await self._models(anew=True)
            raise no_worker() if model in known else unknown_model(model, known)
        return address.rstrip("/")

    def lost(self) -> None:
        """Count an answer that failed by a worker's fault."""
        self._failures += 1

    # ---- models and their templates --------------------------------------------------------------------------------

    async def _models(self, *, anew: bool = False) -> list[str]:
        if self._names and self._mode == "once" and not anew:
            return self._names
        async with self._listing:
            if not anew and self._worker is None:
                await self._post("refresh_all_workers", None, _REFRESH_SECONDS)
            path, field = _LIST if self._worker is None else _STATUS
            said = await self._post(path, None)
        names = said.get(field) if isinstance(said, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ApiError(502, f"the models of {self._who} can't be read", code="controller_failed")
        self._names = sorted(set(names), key=lambda name: (_FIRST.get(name, len(_FIRST)), name))
        return self._names

    def _known(self, model: str) -> Template | None:
        return self._template or self._templates.get(model, (None, 0.0))[0]

    async def _template_of(self, model: str) -> Template:
        known, until = self._templates.get(model, (None, 0.0))
        if self._template is not None or (known is not None and time.monotonic() < until):
            return self._template or known or get_template(guess_template(model))
        address = await self.address(model)
        found = await self._told_template(model, address)
        which = f"as {address} says" if found is not None else "guessed from its name; --template names another"
        found = found or get_template(guess_template(model))
        if known is None or known != found:
            log.info("%s: template %s, %s", model, found.name, which)
        self._templates[model] = found, time.monotonic() + _KNOWN_SECONDS
        return found

    async def _told_template(self, model: str, address: str) -> Template | None:
        """What a worker of ours says; the original's say nothing of it. Raises ApiError if it does not answer."""
        try:
            response = await self.client.post(f"{address}/worker_get_status", timeout=_STATUS_SECONDS)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise gone() from error  # better than a guess that may be wrong
        try:
            fields = response.json().get("templates", {}).get(model)
            return None if fields is None else Template.model_validate(fields)
        except (ValueError, AttributeError) as error:  # pydantic's and JSON's errors are ValueErrors
            log.warning("%s: what %s says of its template can't be read (%s)", model, address, type(error).__name__)
            return None

    async def _post(self, path: str, body: dict[str, Any] | None, seconds: float = _STATUS_SECONDS) -> Any:
        try:
            response = await self.client.post(f"{self._worker or self._controller}/{path}", json=body, timeout=seconds)
        except httpx.HTTPError as error:
            self._say_well(False, type(error).__name__)
            raise ApiError(503, f"{self._who} does not answer", code="no_controller", retry_seconds=5) from error
        self._say_well(response.status_code == 200, f"HTTP {response.status_code}")
        if response.status_code != 200:
            raise ApiError(502, f"{self._who} refused (HTTP {response.status_code})", code="controller_failed")
        try:
            return response.json()
        except ValueError as error:
            raise ApiError(502, f"the answer of {self._who} can't be read", code="controller_failed") from error

    @property
    def _who(self) -> str:
        return "the controller" if self._worker is None else "the worker"

    def _say_well(self, well: bool, why: str) -> None:
        if well != self._well:
            log.warning(
                "%s %s", self._worker or self._controller, "answers again" if well else f"does not answer ({why})"
            )
        self._well = well

    async def _look(self) -> None:
        """For ever: whether the controller answers, for /health."""
        while True:
            with suppress(ApiError):
                await self._post((_LIST if self._worker is None else _STATUS)[0], None)
            await asyncio.sleep(_LOOK_SECONDS)
