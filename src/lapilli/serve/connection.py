"""Bounds on connections themselves, below HTTP: how many there are, and how long a silent or slow client holds one.

uvicorn's protocols wait for ever for the rest of a request's head, for a client to read what it was sent, and, one of
them, for a head without an end; they are bounded here, whichever of the two is installed.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from lapilli.serve.settings import Limits

_FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def bounded(limits: Limits, base: Any = AutoHTTPProtocol) -> Any:
    """uvicorn's protocol for one connection, with the bounds of `limits`."""

    class Bounded(base):
        """Between two requests a timer runs from the first byte of the next one, or from the connection's start."""

        _head: asyncio.TimerHandle | None = None
        _stall: asyncio.TimerHandle | None = None
        _head_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.write(_FULL)
                transport.close()
                return
            self._head = self.loop.call_later(limits.head_seconds, self._cut)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            asking = self.cycle is not None and not self.cycle.response_complete
            self._head_bytes = 0 if asking else self._head_bytes + len(data)
            if asking or self.transport.is_closing():
                self._head = _stopped(self._head)
            elif self._head_bytes > limits.head_bytes:
                self._cut()
            elif self._head is None:
                self._head = self.loop.call_later(limits.head_seconds, self._cut)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stall = self.loop.call_later(limits.stall_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._stall = _stopped(self._stall)
            super().resume_writing()

        def timeout_keep_alive_handler(self) -> None:
            self._cut()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head, self._stall = _stopped(self._head), _stopped(self._stall)
            super().connection_lost(exc)

        def _cut(self) -> None:
            """Close, and do not wait longer than for other clients until what was sent is taken."""
            if not self.transport.is_closing():
                self.transport.close()
                _stopped(self._stall)
                self._stall = self.loop.call_later(limits.stall_seconds, self.transport.abort)

    return Bounded


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
