"""Bounds below HTTP, on a real server and with both of uvicorn's protocols: slow and silent sockets, and too many."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import uvicorn
from tests.support.waiting import until
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lapilli.serve.connection import bounded
from lapilli.serve.settings import Limits

LIMITS = Limits(connections=4, head_seconds=0.3, stall_seconds=0.3)
GET = b"GET /%s HTTP/1.1\r\nhost: localhost\r\n"


class App:
    """Answers `/` at once, `/long` with more than a socket holds; counts the long ones that are being sent."""

    def __init__(self):
        self.sending = 0

    async def __call__(self, scope, receive, send):
        size = 64 << 20 if scope["path"] == "/long" else 2
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        self.sending += 1
        try:
            for _ in range(size >> 20):
                await send({"type": "http.response.body", "body": b"x" * (1 << 20), "more_body": True})
            await send({"type": "http.response.body", "body": b"" if size > 2 else b"ok"})
        finally:
            self.sending -= 1


@contextmanager
def listening(base):
    app = App()
    server = uvicorn.Server(
        uvicorn.Config(app, http=bounded(LIMITS, base), lifespan="off", log_config=None, timeout_graceful_shutdown=1)
    )
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
        thread.start()
        try:
            yield app, bound.getsockname(), server.server_state
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module", params=[H11Protocol, HttpToolsProtocol])
def server(request):
    with listening(request.param) as made:
        yield made


def rest(connection):
    """What comes until the other side closes."""
    connection.settimeout(20)
    received = bytearray()
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionError:
        pass
    return bytes(received)


def answer(connection):
    """What comes until a whole answer is there."""
    connection.settimeout(20)
    received = b""
    while not received.endswith(b"ok"):
        received += connection.recv(1 << 16)
    return received


def test_a_head_that_drips_or_never_comes_is_not_waited_for(server):
    _, address, _ = server
    begun = time.monotonic()
    with socket.create_connection(address) as silent, socket.create_connection(address) as slow:
        slow.sendall(GET % b"")
        ended = False
        while not ended and time.monotonic() - begun < 5:
            time.sleep(0.05)
            try:
                slow.sendall(b"a: b\r\n")
            except ConnectionError:
                ended = True
        assert ended
        assert rest(silent) == b""
    assert time.monotonic() - begun < 5


def test_the_second_request_of_a_connection_is_bounded_too(server):
    _, address, _ = server
    with socket.create_connection(address) as kept:
        kept.sendall(GET % b"" + b"\r\n")
        assert answer(kept).endswith(b"ok")
        time.sleep(0.4)  # longer than a head may take: a kept connection may be idle
        kept.sendall(GET % b"" + b"\r\n")
        assert answer(kept).endswith(b"ok")
        kept.sendall(GET % b"")
        begun = time.monotonic()
        assert rest(kept) == b""
        assert time.monotonic() - begun < 5


def test_a_head_without_an_end_is_cut_off(server):
    _, address, _ = server
    sent = 0
    with socket.create_connection(address) as endless:
        endless.sendall(GET % b"")
        with suppress(ConnectionError):
            while sent < 1 << 20:
                sent += endless.send(b"a: " + b"b" * 16_000 + b"\r\n")
                time.sleep(0.001)
    assert sent < 1 << 20


def test_a_client_that_takes_nothing_lets_go_of_its_answer(server):
    app, address, _ = server
    with socket.create_connection(address) as deaf:
        deaf.sendall(GET % b"long" + b"\r\n")
        until(lambda: app.sending == 1)
        until(lambda: app.sending == 0)


def test_a_slow_reader_gets_all_of_it(server):
    _, address, _ = server
    with socket.create_connection(address) as slow:
        slow.sendall(GET % b"long" + b"connection: close\r\n\r\n")
        received, begun = 0, time.monotonic()
        while time.monotonic() - begun < 2 * LIMITS.stall_seconds:
            received += len(slow.recv(1 << 18))
            time.sleep(0.005)
        assert received + len(rest(slow)) > 64 << 20


def test_so_many_connections_and_no_more(server):
    _, address, state = server
    until(lambda: not state.connections)
    opened = [socket.create_connection(address) for _ in range(LIMITS.connections)]
    try:
        until(lambda: len(state.connections) == LIMITS.connections)
        with socket.create_connection(address) as more:
            assert rest(more).startswith(b"HTTP/1.1 503")
    finally:
        for one in opened:
            one.close()
    until(lambda: not state.connections)
    with socket.create_connection(address) as again:
        again.sendall(GET % b"" + b"connection: close\r\n\r\n")
        assert rest(again).endswith(b"ok")
