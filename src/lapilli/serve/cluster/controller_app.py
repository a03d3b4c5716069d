"""The controller over HTTP: LLaVA's seven addresses, all of them POST."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response, StreamingResponse

from lapilli.serve.app import bare_app
from lapilli.serve.cluster.controller import Controller
from lapilli.serve.description import FRAMES
from lapilli.serve.guard import Guard
from lapilli.serve.metrics import Metrics
from lapilli.serve.settings import Keys, Limits


class _Registration(BaseModel):
    worker_name: str = Field(max_length=300)
    check_heart_beat: bool
    worker_status: dict[str, Any] | None = None


class _Beat(BaseModel):
    worker_name: str = Field(max_length=300)
    queue_length: float = Field(ge=0, le=1e6, allow_inf_nan=False)


class _Wish(BaseModel):
    model: str = Field(max_length=300)


def make_controller_app(controller: Controller, keys: Keys, limits: Limits) -> Guard:
    """The controller as an ASGI application, which also watches its workers."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(controller.watch())
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await controller.close()

    app = bare_app("lapilli controller", life, keys)

    @app.post("/register_worker")
    async def register(body: _Registration) -> None:
        await controller.register(body.worker_name, body.check_heart_beat, body.worker_status)

    @app.post("/refresh_all_workers")
    async def refresh() -> None:
        await controller.refresh()

    @app.post("/list_models")
    async def models() -> dict[str, list[str]]:
        return {"models": controller.models()}

    @app.post("/get_worker_address")
    async def address(body: _Wish) -> dict[str, str]:
        return {"address": controller.address(body.model)}

    @app.post("/receive_heart_beat")
    async def beat(body: _Beat) -> dict[str, bool]:
        return {"exist": controller.beat(body.worker_name, body.queue_length)}

    @app.post("/worker_generate_stream", response_class=StreamingResponse, responses=FRAMES)
    async def generate(body: dict[str, Any]) -> Response:
        return StreamingResponse(controller.stream(body), media_type="application/octet-stream")

    @app.post("/worker_get_status")
    async def status() -> dict[str, Any]:
        return controller.status()

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok", "workers": len(controller.workers)})

    return Guard(app, keys, limits, Metrics(), bare_posts=True)
