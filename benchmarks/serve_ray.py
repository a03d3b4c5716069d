"""What a Ray cluster between server and model costs: processor time of all processes per request, idle time taken off.

    python benchmarks/serve_ray.py MODEL [--requests 200] [--tokens 16]

Serves MODEL on this machine in one process, then with `--engine ray --replicas 1`, and asks both for the same answers,
one after the other, whole and streamed. Processor time is that of the server and of every process it started.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(root: int) -> dict[str, float]:
    """User and system seconds of a process and all that descend from it; the server's own apart."""
    parents, used = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(folder.name)] = int(fields[1])
            used[int(folder.name)] = (int(fields[11]) + int(fields[12])) / TICKS
    made = {"server": used[root], "all": used[root]}
    for process in parents:
        above = process
        while above in parents and above != root:
            above = parents[above]
        if above == root and process != root:
            made["all"] += used[process]
    return made


def measure(arguments: list[str], requests: int, tokens: int) -> None:
    command = [sys.executable, "-m", "lapilli.cli", "serve", *arguments, "--port", "0", "--device", "cpu", "--no-page"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            found = re.search(r" at (http://\S+)$", line.strip())
            if found:
                break
        else:
            raise SystemExit("".join(said))
        # Its log goes on, and must be read.
        subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        with httpx.Client(timeout=120) as client:
            _ask_all(client, found[1], process.pid, requests, tokens)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _ask_all(client: httpx.Client, url: str, process: int, requests: int, tokens: int) -> None:
    name = client.get(url + "/models").json()["data"][0]["id"]
    body = {"model": name, "messages": [{"role": "user", "content": "?"}], "temperature": 0, "max_tokens": tokens}
    for _ in range(10):
        client.post(url + "/chat/completions", json=body).raise_for_status()
    before, begun = processor_seconds(process), time.monotonic()
    time.sleep(15)
    idle = {k: (v - before[k]) / (time.monotonic() - begun) for k, v in processor_seconds(process).items()}
    print(f"  idle: {idle['all'] * 1000:.0f} ms of processor time a second")
    for stream in (False, True):
        before, begun = processor_seconds(process), time.monotonic()
        for _ in range(requests):
            client.post(url + "/chat/completions", json=body | {"stream": stream}).raise_for_status()
        wall = time.monotonic() - begun
        used = {k: (v - before[k] - idle[k] * wall) / requests * 1000 for k, v in processor_seconds(process).items()}
        kind = "streamed" if stream else "whole"
        print(
            f"  {kind}: {used['all']:.1f} ms of processor time a request, {used['server']:.1f} of them in the server; "
            f"{wall / requests * 1000:.1f} ms on the clock"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16)
    chosen = parser.parse_args()
    for what, more in (("one process", []), ("Ray, one replica", ["--engine", "ray", "--replicas", "1"])):
        print(what)
        measure([chosen.model, *more], chosen.requests, chosen.tokens)


if __name__ == "__main__":
    main()
