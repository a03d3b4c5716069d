"""Small HTTP servers of this process, for what a test needs somebody else to say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def loopback(handler: type[BaseHTTPRequestHandler], host: str = "127.0.0.1", **known: Any) -> Iterator[Any]:
    """Inside, `handler` answers on a free port: the server, which knows its `root` and whatever is `known`."""
    server: Any = ThreadingHTTPServer((host, 0), handler)
    server.daemon_threads, server.block_on_close = True, False
    server.root = f"http://{host}:{server.server_address[1]}"
    vars(server).update(known)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
