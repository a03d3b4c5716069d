"""Many clients of a chat API that stream at a time, made cheap because they share the machine with the server.

    python benchmarks/stream_clients.py PORT REQUESTS.jsonl [--clients 64] [--seconds 60] [--pid SERVER]

Each client keeps one connection, sends one line of the file after the other as the body of a chat request, and reads
its server-sent events only as far as needed: when the first text came, how many tokens the usage tells, and whether
the stream ended with `[DONE]`. What goes wrong is an error, in its own words. Counting begins once as many answers have
ended as there are clients, for until then all of them are at the same place of their answers; of an answer that is only
partly in the time that counts, its tokens count in that part. With `--pid` the server's processor time and memory are
read too, in the same seconds. Prints one JSON object.
"""

import argparse
import asyncio
import itertools
import json
import math
import os
import re
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_FIRST = re.compile(rb'"content": ?"[^"]')
_USED = re.compile(rb'"completion_tokens": ?(\d+)')
_TAIL = 1000
"""Bytes at the end of an answer that hold its usage and its end."""
_SILENT_SECONDS = 120.0
_WARM_AT_MOST_SECONDS = 300.0


@dataclass
class Found:
    """What all clients have met. Times are of the monotonic clock; what counts lies between `began` and `until`."""

    clients: int
    warm_until: float
    seconds: float
    begins: asyncio.Event
    began: float = math.inf
    until: float = math.inf
    warm_answers: int = 0
    tokens: float = 0.0
    answers: int = 0
    firsts: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def ended(self, sent: float, first: float, tokens: int) -> None:
        """An answer has ended now."""
        now = time.monotonic()
        if self.began == math.inf:
            self.warm_answers += 1
            if self.warm_answers >= self.clients and now >= self.warm_until:
                self.began, self.until = now, now + self.seconds
                self.begins.set()
            return
        inside = min(now, self.until) - max(first, self.began)
        if inside > 0:
            self.tokens += tokens * inside / (now - first)
        if now <= self.until:
            self.answers += 1
            self.whole.append(now - sent)
        if self.began <= first <= self.until:
            self.firsts.append(first - sent)


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it is answered."""

    def __init__(self, found: Found, requests: Iterator[bytes], over: asyncio.Future[None]) -> None:
        self._found, self._requests, self._over = found, requests, over
        self._tail, self._sent, self._first, self._status = b"", 0.0, 0.0, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._tail, self._sent, self._first, self._status = b"", time.monotonic(), 0.0, False
        if self._sent > self._found.until:
            self._transport.close()
            return
        self._transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        if not self._status:
            self._status = True
            if not data.startswith(b"HTTP/1.1 200 "):
                self._found.errors.append(data[:300].decode("latin-1"))
                self._transport.close()
                return
        if not self._first and _FIRST.search(data):
            self._first = time.monotonic()
        self._tail = (self._tail + data)[-_TAIL:]
        # What stands between the marks of two pieces does not matter: the end may come in one piece or in several.
        if self._tail.endswith(b"0\r\n\r\n"):
            self._ended()

    def _ended(self) -> None:
        used, found = _USED.search(self._tail), self._found
        if used is None or b"data: [DONE]" not in self._tail:
            found.errors.append(self._tail[-300:].decode("utf-8", "replace"))
            self._transport.close()
            return
        found.ended(self._sent, self._first or self._sent, int(used[1]))
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._over.done():
            if time.monotonic() <= self._found.until and not self._found.errors:
                self._found.errors.append(f"the connection was lost: {exc}")
            self._over.set_result(None)


async def ask(port: int, bodies: list[bytes], clients: int, found: Found) -> None:
    """Ask until the time is over and the last answers have come."""
    loop = asyncio.get_running_loop()
    requests = itertools.cycle([_head(port, body) + body for body in bodies])
    overs = []
    for _ in range(clients):
        over = loop.create_future()
        overs.append(over)
        await loop.create_connection(lambda over=over: Client(found, requests, over), "127.0.0.1", port)
    async with asyncio.timeout(_WARM_AT_MOST_SECONDS):
        await found.begins.wait()
    _, late = await asyncio.wait(overs, timeout=found.until - time.monotonic() + _SILENT_SECONDS)
    found.errors += [f"no end of an answer in {_SILENT_SECONDS:g} s"] * len(late)


async def watch(pid: int, found: Found) -> dict[str, float | list[int]]:
    """Processor seconds of a process in the time that counts, and its memory in bytes once a second."""
    await found.begins.wait()
    before, memory = processor_seconds(pid), [resident_bytes(pid)]
    while (left := found.until - time.monotonic()) > 0:
        await asyncio.sleep(min(1.0, left))
        memory.append(resident_bytes(pid))
    return {"server_processor_seconds": processor_seconds(pid) - before, "memory": memory}


def processor_seconds(pid: int) -> float:
    """What a process and those that it started have used of the processors, in their own code and in the system's."""
    ticks = 0
    for one in family(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """The memory that a process and those that it started hold."""
    pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in family(pid))
    return pages * os.sysconf("SC_PAGE_SIZE")


def family(pid: int) -> list[int]:
    """A process, those that it started, and so on."""
    started = [int(one) for file in Path(f"/proc/{pid}/task").glob("*/children") for one in file.read_text().split()]
    return [pid, *(one for child in started for one in family(child))]


def _head(port: int, body: bytes) -> bytes:
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode()


def quantile(values: list[float], part: float) -> float:
    """The value below which `part` of them lie; nan if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


async def run(
    port: int, bodies: list[bytes], clients: int, warm_seconds: float, seconds: float, pid: int | None
) -> dict:
    """All that is found, as it is printed."""
    started = time.monotonic()
    found = Found(clients, time.monotonic() + warm_seconds, seconds, asyncio.Event())
    watching = asyncio.create_task(watch(pid, found)) if pid else None
    await ask(port, bodies, clients, found)
    used, lasted = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - started
    return {
        "seconds": seconds,
        "answers": found.answers,
        "tokens": found.tokens,
        "first_p50": quantile(found.firsts, 0.5),
        "first_p95": quantile(found.firsts, 0.95),
        "whole_p50": quantile(found.whole, 0.5),
        "client_processors": (used.ru_utime + used.ru_stime) / lasted,
        "errors": len(found.errors),
        "first_errors": found.errors[:5],
    } | (await watching if watching else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("requests", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm-seconds", type=float, default=5)
    parser.add_argument("--pid", type=int)
    given = parser.parse_args()
    bodies = given.requests.read_bytes().splitlines()
    made = asyncio.run(run(given.port, bodies, given.clients, given.warm_seconds, given.seconds, given.pid))
    print(json.dumps(made))


if __name__ == "__main__":
    main()
