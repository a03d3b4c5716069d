"""A server under load, beside the bare engine and beside the original worker's design, in one run.

    python benchmarks/serve.py [--models tiny mid] [--seconds 300] [--clients 64] [--slots 64] [--out benchmark-run]

Random models (`tiny` 0.4M parameters, whose time is everything but arithmetic, and `mid` 27M) are asked by 64 clients
that stream at a time; a quarter of the requests show a picture of 576 tokens. Measured for each model: the bare engine
on the same requests in the same number of slots, before and after the server, so that what else the machine does
meets both; `lapilli serve` in a process of its own; transformers behind the original's design (serve_rivals.py); and
one request of one token at a time through the API and without it. All of them have the same number of threads
(`--threads`, the machine's cores unless given), and the clients live on the same machine. fp32 and greedy everywhere. A
table is printed, and DIR/serve.json written.
"""

import argparse
import base64
import http.client
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from generate import make_model
from workload import WORDS, make_pictures

HERE = Path(__file__).parent
MODELS = {"tiny": "tiny", "mid": "small"}
"""This benchmark's names of the models of generate.py."""
REQUESTS, PICTURES = 256, 96
WARM_SECONDS = 8.0
ALONE = 200
"""Requests of one token."""


def make_requests(path: Path, images: Path, names: list[str], seed: int = 0) -> None:
    """Questions of 5 to 40 words and answers of 32 to 96 tokens; every fourth with a picture."""
    rng = random.Random(seed)
    lines = []
    for i in range(REQUESTS):
        content: Any = " ".join(rng.choices(WORDS, k=rng.randint(5, 40))) + "?"
        if i % 4 == 1:
            data = base64.b64encode((images / names[i % len(names)]).read_bytes()).decode()
            picture = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
            content = [picture, {"type": "text", "text": content}]
        request = {"model": "it", "messages": [{"role": "user", "content": content}], "temperature": 0}
        request |= {"max_tokens": rng.randint(32, 96), "stream": True, "stream_options": {"include_usage": True}}
        lines.append(json.dumps(request))
    path.write_text("\n".join(lines) + "\n")


@contextmanager
def server(command: list[str], address: str, stream: str, log: Path, environment: dict[str, str]) -> Iterator[Any]:
    """A process that serves, and its port, which `address` finds in what it writes to `stream`."""
    with log.open("w+") as file:
        process = subprocess.Popen(command, env=environment, **{"stdout": file, "stderr": file, stream: file})
        try:
            until = time.monotonic() + 180
            while (found := re.search(address, log.read_text())) is None:
                if process.poll() is not None or time.monotonic() > until:
                    sys.exit(f"no server: {' '.join(command)}\n{log.read_text()[-3000:]}")
                time.sleep(0.1)
            yield process.pid, int(found[1])
        finally:
            process.terminate()
            process.wait(30)


def child(*arguments: object, environment: dict[str, str]) -> dict[str, Any]:
    """What a script of this folder prints."""
    script, *rest = map(str, arguments)
    command = [sys.executable, str(HERE / script), *rest]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return json.loads(done.stdout.splitlines()[-1])


def load(port: int, pid: int, requests: Path, seconds: float, given: argparse.Namespace) -> dict[str, Any]:
    arguments = [port, requests, "--clients", given.clients, "--seconds", seconds, "--pid", pid]
    return child("stream_clients.py", *arguments, "--warm-seconds", WARM_SECONDS, environment=given.environment)


def alone(port: int, request: dict[str, Any]) -> float:
    """Median seconds of one request for one token, on a connection that stays."""
    body = json.dumps(request | {"max_tokens": 1, "stream": False, "stream_options": None})
    taken = []
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for _ in range(ALONE + 20):
        began = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            sys.exit(f"a request for one token got {response.status}")
        taken.append(time.perf_counter() - began)
    connection.close()
    return statistics.median(taken[20:])


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one model."""
    work = given.out.resolve() / name
    work.mkdir(parents=True)
    make_model(work, MODELS[name])
    requests = work / "requests.jsonl"
    make_requests(requests, work / "images", make_pictures(work / "images", PICTURES))
    first = json.loads(requests.read_text().partition("\n")[0])
    shorter = given.seconds / 5
    counts = ["--slots", given.slots, "--clients", given.clients]
    engine = ["serve_rivals.py", "engine", work / "model", requests, *counts, "--seconds", shorter]
    say(f"{name}: the engine alone")
    bare = [child(*engine, environment=given.environment)]
    command = [sys.executable, "-m", "lapilli.cli", "serve", f"it={work / 'model'}", "--port", "0", "--device", "cpu"]
    command += ["--slots", str(given.slots), "--queue", str(max(1, given.clients)), "--template", "vicuna_v1"]
    say(f"{name}: the server, {given.seconds:g} s")
    log = work / "server.log"
    with server(command, r" at http://[^ ]*:(\d+)/v1\n", "stderr", log, given.environment) as (pid, port):
        one = alone(port, first)
        api = load(port, pid, requests, given.seconds, given)
    say(f"{name}: the engine alone, again")
    bare.append(child(*engine, environment=given.environment))
    made: dict[str, Any] = {"bare": bare, "api": api, "api_one_seconds": one}
    if not given.no_original:
        say(f"{name}: the original's design")
        command = [sys.executable, str(HERE / "serve_rivals.py"), "original", str(work / "hf")]
        with server(command, r"(?:^|\n)(\d+)\n", "stdout", work / "original.log", given.environment) as (pid, port):
            made["original"] = load(port, pid, requests, shorter, given)
    return made | {"found": found(made, given)}


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def found(made: dict[str, Any], given: argparse.Namespace) -> dict[str, float]:
    """The numbers that are asked for."""
    api, bare = made["api"], made["bare"]
    rate = statistics.mean(b["tokens"] / b["seconds"] for b in bare)
    per_second = statistics.mean(b["tokens"] / b["processor_seconds"] for b in bare)
    memory, part = api["memory"], max(1, len(api["memory"]) // 10)
    numbers = {
        "bare tokens/s": rate,
        "API tokens/s": api["tokens"] / api["seconds"],
        "API beside bare, tokens/s": ratio(api["tokens"] / api["seconds"], rate),
        "bare tokens per processor second": per_second,
        "API tokens per processor second of the server": api["tokens"] / api["server_processor_seconds"],
        "processors that the server keeps busy": api["server_processor_seconds"] / api["seconds"],
        "processors that the clients keep busy": api["client_processors"],
        "errors": api["errors"],
        "answers": api["answers"],
        "first text, median, s": api["first_p50"],
        "first text, p95, s": api["first_p95"],
        "server's memory at first, MiB": statistics.median(memory[:part]) / 2**20,
        "server's memory at last, MiB": statistics.median(memory[-part:]) / 2**20,
        "engine, one token, ms": 1000 * statistics.median(b["one_seconds"] for b in bare),
        "API, one token, ms": 1000 * made["api_one_seconds"],
    }
    if "original" in made:
        rival = made["original"]
        numbers["original's design, tokens/s"] = rival["tokens"] / rival["seconds"]
        numbers["original's design, first text, p95, s"] = rival["first_p95"]
        numbers["original's design, errors"] = rival["errors"]
        numbers["API beside the original's design"] = ratio(
            numbers["API tokens/s"], numbers["original's design, tokens/s"]
        )
    return numbers


def ratio(one: float, other: float) -> float:
    return one / other if other else float("nan")  # a run too short for an answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=300, help="of the server; the others have a fifth of it each")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="PyTorch's, of everything that generates")
    parser.add_argument("--no-original", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmark-run"))
    given = parser.parse_args()
    given.environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "TOKENIZERS_PARALLELISM": "false"}
    shutil.rmtree(given.out, ignore_errors=True)
    results = {name: measure(name, given) for name in given.models}
    rows = list(dict.fromkeys(row for made in results.values() for row in made["found"]))
    print(f"{'':48}" + "".join(f"{name:>12}" for name in results))
    for row in rows:
        print(f"{row:48}" + "".join(f"{made['found'].get(row, float('nan')):12,.4g}" for made in results.values()))
    for name, made in results.items():
        for error in made["api"]["first_errors"]:
            print(f"{name}: {error}")
    (given.out / "serve.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
