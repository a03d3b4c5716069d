"""What a server is measured against, each in a process of its own: the bare engine, and the original worker's design.

    python benchmarks/serve_rivals.py engine MODEL REQUESTS.jsonl --slots 64 --clients 64 --seconds 30
    python benchmarks/serve_rivals.py original TRANSFORMERS_MODEL

`engine` answers the same requests in the same number of slots, so many waiting or growing at a time as there would be
clients, without any API: prompts are prepared, pictures opened and pieces of text made, in one thread. `original` is
the design of the original's model worker in front of transformers: at most five requests at a time, each one call of
`generate` in a thread of its own with a streamer, and a StreamingResponse that runs in the framework's threads.
"""

import argparse
import asyncio
import base64
import io
import itertools
import json
import math
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch

_WARM_SECONDS = 5.0
_AT_A_TIME = 5
"""The original's `--limit-model-concurrency`."""


def read_requests(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def split(request: dict[str, Any]) -> tuple[str, list[bytes]]:
    """Question and pictures of a request."""
    content = request["messages"][0]["content"]
    if isinstance(content, str):
        return content, []
    pictures = [p["image_url"]["url"].partition(",")[2] for p in content if p["type"] == "image_url"]
    return content[-1]["text"], [base64.b64decode(p) for p in pictures]


def run_engine(model: Path, requests: list[dict[str, Any]], slots: int, clients: int, seconds: float) -> dict[str, Any]:
    import lapilli
    from lapilli.generate.decoding import Decoding
    from lapilli.generate.growing import Growing

    engine = lapilli.load(model, template="vicuna_v1").engine
    scheduler = engine.scheduler(slots)
    asked = itertools.cycle(requests)

    def add(request: dict[str, Any], tokens: int) -> Growing:
        question, pictures = split(request)
        opened = [engine.processor.picture(data) for data in pictures]
        prompt = engine.processor.prompt("<image>\n" * len(opened) + question, opened)
        row = engine.growing(prompt, Decoding(tokens), lambda _: None)
        scheduler.add(row, prompt)
        return row

    def one() -> float:
        began = time.perf_counter()
        add(requests[0], 1)
        scheduler.step()
        return time.perf_counter() - began

    made: dict[str, Any] = {}
    with torch.no_grad():
        for _ in range(20):
            one()
        made["one_seconds"] = statistics.median(one() for _ in range(200))
        growing: list[Growing] = []
        tokens = answers = 0
        warm_until, began, used, before = time.monotonic() + _WARM_SECONDS, math.inf, 0.0, 0
        while (now := time.monotonic()) < began + seconds:
            if began == math.inf and answers >= clients and now >= warm_until:
                began, used = now, time.process_time()
                before = tokens + sum(row.tokens for row in growing)
                answers = 0
            while len(growing) < clients:
                request = next(asked)
                growing.append(add(request, request["max_tokens"]))
            scheduler.step()
            ended = [row.answer() for row in growing if row.ended]
            if ended:
                growing = [row for row in growing if not row.ended]
                tokens, answers = tokens + sum(len(a.token_ids) for a in ended), answers + len(ended)
    return made | {
        "seconds": now - began,
        "answers": answers,
        "tokens": tokens + sum(row.tokens for row in growing) - before,
        "processor_seconds": time.process_time() - used,
    }


def serve_original(folder: Path) -> None:
    """Serve until the process is ended; the port is printed."""
    import PIL.Image
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import StreamingResponse
    from transformers import AutoProcessor, LlavaForConditionalGeneration, TextIteratorStreamer

    processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    places = asyncio.Semaphore(_AT_A_TIME)
    app = FastAPI()

    def answer(request: dict[str, Any]) -> Iterator[bytes]:
        question, pictures = split(request)
        content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": "\n" * len(pictures) + question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [PIL.Image.open(io.BytesIO(p)).convert("RGB") for p in pictures]
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        made: list[int] = []

        @torch.inference_mode()
        def generate() -> None:
            out = model.generate(**inputs, do_sample=False, max_new_tokens=request["max_tokens"], streamer=streamer)
            made.append(out.shape[1] - inputs["input_ids"].shape[1])

        thread = Thread(target=generate)
        thread.start()
        for piece in streamer:
            yield _event({"choices": [{"index": 0, "delta": {"content": piece}}]})
        thread.join()
        yield _event({"choices": [], "usage": {"completion_tokens": made[0]}}) + b"data: [DONE]\n\n"

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        body = await request.json()
        await places.acquire()
        return StreamingResponse(_released(answer(body), places), media_type="text/event-stream")

    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.bind(("127.0.0.1", 0))
    bound.listen(256)
    print(bound.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[bound])


async def _released(pieces: Iterator[bytes], places: asyncio.Semaphore) -> Any:
    from starlette.concurrency import iterate_in_threadpool

    try:
        async for piece in iterate_in_threadpool(pieces):
            yield piece
    finally:
        places.release()


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rival", choices=("engine", "original"))
    parser.add_argument("model", type=Path)
    parser.add_argument("requests", type=Path, nargs="?")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=30)
    given = parser.parse_args()
    if given.rival == "original":
        serve_original(given.model)
    else:
        requests = read_requests(given.requests)
        print(json.dumps(run_engine(given.model, requests, given.slots, given.clients, given.seconds)))


if __name__ == "__main__":
    main()
