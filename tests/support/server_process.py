"""`lapilli serve` in a process of its own, as users run it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

_URL = re.compile(r" at (http://\S+)$")


@dataclass
class ServerProcess:
    """A running server: its address, its process, and what it wrote to standard error."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def serving(
    *arguments: str, environment: Mapping[str, str] | None = None, seconds: float = 120
) -> Iterator[ServerProcess]:
    """Start `lapilli serve` on a free port and wait until it listens; killed at the end if it still runs."""
    command = [sys.executable, "-m", "lapilli.cli", "serve", *arguments, "--port", "0"]
    if arguments[0] not in ("controller", "web") and not {"--engine-url", "--sgl-endpoint", "vllm", "sglang"} & {
        *arguments
    }:
        command += ["--device", "cpu"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    )
    server = ServerProcess(process)
    listens = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.lines.append(line.rstrip("\n"))
            found = _URL.search(server.lines[-1])
            if found:
                server.url = found[1]
                listens.set()
        listens.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert listens.wait(seconds), f"no address after {seconds} s"
        assert server.url, "\n".join(server.lines)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        assert process.stderr is not None
        process.stderr.close()
