"""A real HTTP server on this machine that does wrong what servers do wrong: cuts, lies, redirects, refuses."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from tests.support.loopback import loopback


@dataclass
class File:
    """What the server has under a path, and how it misbehaves."""

    content: bytes = b""
    cuts: list[int] = field(default_factory=list)
    """For each of the first answers: how many bytes are sent before the connection is closed."""
    stall: tuple[int, threading.Event] | None = None
    """Send so many bytes, then nothing until the event."""
    failures: list[int] = field(default_factory=list)
    """Statuses of the first answers."""
    redirect: str | None = None
    ranges: bool = True
    etag: bool = True
    states_size: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "application/octet-stream"
    wants_token: str | None = None


@dataclass
class Server:
    """A running server: its address, its files, and every request so far as (path, headers)."""

    url: str
    files: dict[str, File]
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def ranges(self, path: str) -> list[str | None]:
        """The Range headers of the requests for a path."""
        return [headers.get("range") for asked, headers in self.requests if asked == path]


@contextmanager
def serving(files: dict[str, File]) -> Iterator[Server]:
    """Serve `files` on a free port of the loopback."""
    server = Server("", files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            server.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            _answer(self, server.files.get(self.path))

    with loopback(Handler) as http:
        server.url = http.root
        yield server


def _answer(handler: BaseHTTPRequestHandler, file: File | None) -> None:
    handler.close_connection = True
    if file is None:
        _status(handler, 404)
    elif file.wants_token is not None and handler.headers.get("Authorization") != f"Bearer {file.wants_token}":
        _status(handler, 403)
    elif file.failures:
        _status(handler, file.failures.pop(0))
    elif file.redirect is not None:
        _status(handler, 302, {"Location": file.redirect, **file.headers})
    else:
        _content(handler, file)


def _status(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def _content(handler: BaseHTTPRequestHandler, file: File) -> None:
    etag = f'"{hashlib.md5(file.content).hexdigest()}"'
    asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    start = int(asked[1]) if asked and file.ranges else 0
    if handler.headers.get("If-Range", etag) != etag:
        start = 0
    if start and start >= len(file.content):
        _status(handler, 416, {"Content-Range": f"bytes */{len(file.content)}"})
        return
    body = file.content[start:]
    handler.send_response(206 if start else 200)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(file.content) - 1}/{len(file.content)}")
    if file.etag:
        handler.send_header("ETag", etag)
    if file.states_size:
        handler.send_header("Content-Length", str(len(body)))
    else:
        handler.send_header("Connection", "close")
    handler.send_header("Content-Type", file.kind)
    for name, value in file.headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    sent = file.cuts.pop(0) if file.cuts else len(body)
    if file.stall is not None:
        handler.wfile.write(body[: file.stall[0]])
        file.stall[1].wait(20)
        return
    handler.wfile.write(body[:sent])
