"""The process that serves: its socket, its signals, its end.

SIGTERM (or Ctrl-C) closes the door, lets answers under way end within the time that is set, and leaves with status 0.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn

from lapilli.base.errors import RunError
from lapilli.base.interrupt import StopWish
from lapilli.serve.app import make_app
from lapilli.serve.backend import Backend
from lapilli.serve.connection import bounded
from lapilli.serve.page.routes import Page
from lapilli.serve.settings import Keys, Limits
from lapilli.serve.threads import SWITCH_SECONDS


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def bind(host: str, port: int) -> socket.socket:
    """Take an address without listening yet; port 0 takes a free one. Raises RunError if it can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sends small pieces at once; without it each answer would wait 40 ms.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except (OSError, OverflowError) as error:
        made.close()
        raise RunError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from error
    return made


def root_of(bound: socket.socket) -> str:
    """The address of a socket, for clients."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def url_of(bound: socket.socket) -> str:
    """The API's address on a socket, as clients' `base_url`."""
    return f"{root_of(bound)}/v1"


def serve(
    backend: Backend,
    keys: Keys,
    limits: Limits,
    bound: socket.socket,
    ready: Callable[[str], None],
    page: Page | None = None,
) -> None:
    """Serve until the process is asked to stop; `ready` is called with the API's address once it listens."""
    url = url_of(bound)
    serve_app(make_app(backend, keys, limits, page=page), bound, limits.drain_seconds, lambda: ready(url), limits)


def serve_app(
    app: Any, bound: socket.socket, drain_seconds: float, ready: Callable[[], None], limits: Limits | None = None
) -> None:
    """Serve an ASGI application until the process is asked to stop; `ready` is called once it listens."""
    config = uvicorn.Config(
        app,
        http=bounded(limits or Limits()),
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="none",
        proxy_headers=False,  # who asks must not be what a header says
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )
    sys.setswitchinterval(SWITCH_SECONDS)
    with StopWish():  # uvicorn raises the signal again when it has stopped
        _Server(config, ready).run(sockets=[bound])
