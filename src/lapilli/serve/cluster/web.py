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
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

import httpx
from fastapi import Request
from starlette.responses import Response

from lapilli.data.template import Template, get_template
from lapilli.serve.backend import Card, Gauges, unknown_model
from lapilli.serve.cluster.asking import Asker
from lapilli.serve.cluster.frames import gone, no_worker
from lapilli.serve.cluster.passage import Errand
from lapilli.serve.elsewhere.passage import Passage, reply_from
from lapilli.serve.elsewhere.traffic import Traffic
from lapilli.serve.metrics import Metrics
from lapilli.serve.naming import guess_template
from lapilli.serve.refusal import ApiError
from lapilli.serve.remote import RemotePictures
from lapilli.serve.request import ChatRequest
from lapilli.serve.settings import Limits
from lapilli.serve.threads import ReadingThreads

log = logging.getLogger(__name__)

ListMode = Literal["once", "reload"]
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
        self._traffic, self._metrics = Traffic(limits), Metrics()
        self._controller, self._worker = controller.rstrip("/"), worker and worker.rstrip("/")
        self._key, self._template, self._mode = key, template, models
        self._asker = Asker(limits, remote)
        self._threads = ReadingThreads()
        self._listing = asyncio.Lock()
        self._names: list[str] = []
        self._since: dict[str, int] = {}
        self._templates: dict[str, tuple[Template, float]] = {}
        self._client: httpx.AsyncClient | None = None
        self._well = True

    @asynccontextmanager
    async def life(self, metrics: Metrics) -> AsyncIterator[None]:
        self._metrics = metrics
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
        self._threads.close()

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
        passage = Passage(self._traffic, self._metrics, body.model, body.n or 1, request.scope["state"]["begun"])

        async def ask() -> None:
            template = await self._template_of(body.model)
            asked = await self._threads.run(self._asker.fetches(body), self._asker.write, body, template)
            self._metrics.count("lapilli_pictures_total", asked.pictures, model=body.model)
            errand = Errand(passage, self.client, self._address, asked, (*template.stop, *body.stops))
            passage.ask((errand.run(index) for index in range(passage.answers)), request)

        return await reply_from(passage, body, ask)

    def gauges(self) -> Gauges:
        return self._traffic.gauges({}, self._well)

    @property
    def client(self) -> httpx.AsyncClient:
        """What asks controller and workers."""
        assert self._client is not None, "a backend answers inside its life"
        return self._client

    async def _address(self, model: str) -> str:
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
        address = await self._address(model)
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
