"""A real chat-completions server on this machine that fails in the ways that real ones do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.loopback import loopback


@dataclass
class Says:
    """One answer, and how it goes wrong."""

    content: str | None = "8 6\nBecause."
    status: int = 200
    body: str | None = None
    """Sent as it is, in place of a chat completion."""
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    refusal: str | None = None
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 20})
    delay: float = 0.0
    """Seconds before anything is sent."""
    cut: int | None = None
    """So many bytes, then the connection is closed."""
    silent: bool = False
    """The connection is closed without a word."""
    drip: float = 0.0
    """Seconds between bytes."""

    def text(self) -> str:
        if self.body is not None:
            return self.body
        message = {"role": "assistant", "content": self.content, "refusal": self.refusal}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        return json.dumps({"id": "x", "model": "judge-0314", "choices": [choice], "usage": self.usage})


def error(status: int, message: str = "no", code: str | None = None, **more: Any) -> Says:
    """An error of the form that OpenAI's have."""
    return Says(status=status, body=json.dumps({"error": {"message": message, "code": code}}), **more)


@dataclass
class JudgeServer:
    """A running server: its address, what it was asked, and how many at a time."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0

    def contents(self) -> list[str]:
        """The users' messages so far."""
        return [body["messages"][1]["content"] for body in self.asked]


Reply = Callable[[dict[str, Any], int], Says]
"""(request body, number of the request from 0) to what is said."""


@contextmanager
def judging(reply: Reply | list[Says] | Says) -> Iterator[JudgeServer]:
    """Serve on a free port of the loopback; of a list, the last one is said again and again."""
    server, lock, at_once = JudgeServer(), threading.Lock(), [0]

    def says(body: dict[str, Any], number: int) -> Says:
        if callable(reply):
            return reply(body, number)
        return reply if isinstance(reply, Says) else reply[min(number, len(reply) - 1)]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.asked)
                server.asked.append(body)
                server.keys.append(self.headers.get("Authorization"))
                server.times.append(time.monotonic())
                at_once[0] += 1
                server.most_at_once = max(server.most_at_once, at_once[0])
            try:
                _say(self, says(body, number))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with lock:
                    at_once[0] -= 1

    with loopback(Handler) as http:
        server.url = f"{http.root}/v1"
        yield server


def _say(handler: BaseHTTPRequestHandler, says: Says) -> None:
    time.sleep(says.delay)
    if says.silent:
        handler.close_connection = True
        return
    data = says.text().encode()
    handler.send_response(says.status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    for name, value in says.headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    if says.drip:
        for byte in data:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(says.drip)
        return
    handler.wfile.write(data if says.cut is None else data[: says.cut])
    if says.cut is not None:
        handler.close_connection = True
