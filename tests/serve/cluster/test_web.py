"""`lapilli serve web`: page and API in front of a cluster, as processes; and against every way a worker can fail.

The stub speaks as the original's controller and worker do, which this test can't run: docs/serving.md says what was.
"""

import asyncio
import base64
import io
import json
import os
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import PIL.Image
import pytest
import uvicorn
from openai import APIStatusError, OpenAI
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tests.support.page import data_url
from tests.support.server_process import serving
from tests.support.tiny import build_tiny
from typer.testing import CliRunner

import lapilli
from lapilli.cli.serve import app as serve_app
from lapilli.data.template import get_template
from lapilli.serve.app import make_app
from lapilli.serve.cluster.asking import Asker
from lapilli.serve.cluster.web import Cluster
from lapilli.serve.metrics import Metrics
from lapilli.serve.request import ChatRequest
from lapilli.serve.settings import Keys, Limits

KEY = "sk-of-the-cluster"
RECORDED = json.loads((Path(__file__).parents[2] / "reference/serve/llava-web-server.json").read_text())
PICTURE = {"type": "image_url", "image_url": {"url": data_url()}}


def messages_of(kind):
    content = [PICTURE, {"type": "text", "text": "\nWhat is it?"}] if kind == "picture" else "What is it?"
    return [{"role": "user", "content": content}]


# ---- what is sent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED["states"])
@pytest.mark.parametrize("kind", ["picture", "text"])
def test_prompts_are_those_of_the_original(name, kind):
    recorded = RECORDED["states"][name][kind]
    asker = Asker(Limits())
    asked = asker.write(ChatRequest(model="m", messages=messages_of(kind)), get_template(name))
    assert asked.prompt == recorded["prompt"]
    assert asked.fields["stop"] == recorded["stop"]
    more = [{"role": "assistant", "content": "A red dog."}, {"role": "user", "content": "Sure?"}]
    asked = asker.write(ChatRequest(model="m", messages=[*messages_of(kind), *more]), get_template(name))
    assert asked.prompt == recorded["second_prompt"]


def test_a_request_has_the_fields_of_the_original():
    request = ChatRequest(model="m", messages=messages_of("picture"), temperature=0.2, top_p=0.7, max_tokens=99)
    fields = Asker(Limits()).write(request, get_template("llava_v1")).fields
    (picture,) = fields.pop("images")
    with PIL.Image.open(io.BytesIO(base64.b64decode(picture))) as sent:
        assert (sent.format, sent.size, sent.getpixel((0, 0))) == ("PNG", (8, 6), (10, 200, 30))
    assert fields.pop("prompt").endswith("USER: <image>\nWhat is it? ASSISTANT:")
    assert fields == {"temperature": 0.2, "top_p": 0.7, "max_new_tokens": 99, "stop": "</s>"}


# ---- whatever a worker says ------------------------------------------------------------------------------------------


class Stub:
    """Controller and worker in one, as the original's; `said` are the bytes that a worker sends, one piece each."""

    def __init__(self):
        self.said, self.status, self.asked, self.models, self.refreshed = [], 200, [], ["llava-v1.5-7b"], 0
        self.templates = None
        routes = [
            Route(f"/{name}", getattr(self, name), methods=["POST"])
            for name in ("refresh_all_workers", "list_models", "get_worker_address", "worker_get_status")
        ]
        app = Starlette(routes=[*routes, Route("/worker_generate_stream", self.generate, methods=["POST"])])
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", ws="none", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run)

    async def refresh_all_workers(self, _):
        self.refreshed += 1
        return JSONResponse(None)

    async def list_models(self, _):
        return JSONResponse({"models": self.models})

    async def get_worker_address(self, request):
        model = (await request.json())["model"]
        return JSONResponse({"address": self.root if model in self.models else ""})

    async def worker_get_status(self, _):
        told = {} if self.templates is None else {"templates": self.templates}
        return JSONResponse({"model_names": self.models, "speed": 1, "queue_length": 0, **told})

    async def generate(self, request):
        self.asked.append(await request.json())
        if self.status != 200:
            return Response(status_code=self.status)

        async def pieces():
            for piece in self.said:
                if piece is None:
                    raise ConnectionError("the worker dies")
                yield piece
                await asyncio.sleep(0.01)

        return StreamingResponse(pieces())

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.root = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def shared_stub():
    with Stub() as stub:
        yield stub


@pytest.fixture
def stub(shared_stub):
    shared_stub.said, shared_stub.status, shared_stub.asked, shared_stub.templates = [], 200, [], None
    shared_stub.models, shared_stub.refreshed = ["llava-v1.5-7b"], 0
    return shared_stub


def request(stub, body=None, path="/v1/chat/completions", times=1, **how):
    """One request to page and API in front of a cluster; with `times`, several, and the last one's answer."""

    async def go():
        cluster = Cluster(stub.root, Limits(queue=4, request_seconds=20), **how)
        async with cluster.life(Metrics()):
            transport = httpx.ASGITransport(make_app(cluster, Keys(), Limits()))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client:
                for _ in range(times):
                    made = await (client.get(path) if body is None else client.post(path, json=body))
                async with asyncio.timeout(5):  # connections that were broken off are closed a moment later
                    while cluster.gauges()["lapilli_active"][1] != [({}, 0)]:
                        await asyncio.sleep(0.01)
                assert cluster.gauges()["lapilli_waiting"][1] == [({}, 0)]
                return made

    return asyncio.run(go())


def frame(text, code=0, **more):
    return json.dumps({"text": text, "error_code": code, **more}).encode() + b"\0"


def said_of(stub, *answers, **more):
    """Frames with the prompt that the last request will have brought, whatever it is."""
    prompt = (
        Asker(Limits()).write(ChatRequest(model="m", messages=messages_of("text")), get_template("llava_v1")).prompt
    )
    stub.said = [frame(prompt + one) for one in answers[:-1]] + [frame(prompt + answers[-1], **more)]


ASK = {"model": "llava-v1.5-7b", "messages": messages_of("text"), "temperature": 0}


def content_of(made):
    assert made.status_code == 200, made.text
    return made.json()["choices"][0]["message"]["content"]


def deltas_of(made):
    events = [json.loads(line[6:]) for line in made.text.splitlines() if line.startswith("data: {")]
    return [e["choices"][0]["delta"].get("content", "") for e in events if e.get("choices")], events


def test_the_cumulative_text_becomes_an_answer(stub):
    said_of(stub, "", " A ", " A red", " A red dog. ")
    made = request(stub, ASK).json()
    assert made["choices"][0]["message"]["content"] == "A red dog."
    assert (made["choices"][0]["finish_reason"], made["usage"]) == ("stop", None)
    pieces, events = deltas_of(request(stub, ASK | {"stream": True, "stream_options": {"include_usage": True}}))
    assert "".join(pieces) == "A red dog."
    assert len([p for p in pieces if p]) > 1
    assert all("error" not in event for event in events)


def test_frames_may_arrive_in_any_pieces(stub):
    said_of(stub, " A", " A red 음식.")
    whole = b"".join(stub.said)
    stub.said = [whole[i : i + 7] for i in range(0, len(whole), 7)]
    assert content_of(request(stub, ASK)) == "A red 음식."


def test_what_a_worker_of_ours_adds_is_passed_on(stub):
    said_of(stub, " A", " A red", finish_reason="length", usage={"prompt_tokens": 7, "completion_tokens": 2})
    made = request(stub, ASK).json()
    assert made["choices"][0]["finish_reason"] == "length"
    assert made["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    made = request(stub, ASK | {"n": 2}).json()
    assert [choice["index"] for choice in made["choices"]] == [0, 1]
    assert made["usage"] == {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}


def test_stop_strings_end_an_answer_here(stub):
    said_of(stub, " A red", " A red do", " A red dog and more", " A red dog and more text")
    assert content_of(request(stub, ASK | {"stop": [" dog"]})) == "A red"
    said_of(stub, " A red.</", " A red.</s> USER: next")  # the original cuts its stop string at the very end only
    assert content_of(request(stub, ASK)) == "A red."
    said_of(stub, " A red.</", " A red.")  # cut off after it had come in pieces
    assert content_of(request(stub, ASK)) == "A red."
    pieces, _ = deltas_of(request(stub, ASK | {"stream": True}))
    assert "".join(pieces) == "A red."


def test_error_codes(stub):
    capitals = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
    for code, status, name in ((1, 502, "worker_failed"), (2, 503, "no_worker"), (3, 502, "worker_gone")):
        stub.said = [frame(capitals, code)]
        for body in (ASK, ASK | {"stream": True}):
            made = request(stub, body)
            assert (made.status_code, made.json()["error"]["code"]) == (status, name)
            assert "NETWORK" not in made.text
    stub.said = [frame("out of memory\n", 1)]
    assert request(stub, ASK).json()["error"]["message"] == "out of memory"


def test_an_error_in_the_middle_is_the_streams_last_event(stub):
    said_of(stub, " A red")
    stub.said.append(frame("gone", 3))
    made = request(stub, ASK | {"stream": True})
    assert made.status_code == 200
    assert "[DONE]" not in made.text
    assert deltas_of(made)[1][-1]["error"]["code"] == "worker_gone"
    assert request(stub, ASK).status_code == 502


@pytest.mark.parametrize(
    ("rest", "code"),
    [([None], "worker_gone"), ([b'{"text": "ha'], "worker_gone"), ([b"x\0"], "worker_failed"),
     ([b'{"text": 3}\0'], "worker_failed"), ([b"[]\0"], "worker_failed"), ([b"\xff\0"], "worker_failed")],
)  # fmt: skip
def test_streams_that_break_off_or_make_no_sense(stub, rest, code):
    stub.said = rest
    assert request(stub, ASK).json()["error"]["code"] == code
    said_of(stub, " A red")
    stub.said += rest
    assert deltas_of(request(stub, ASK | {"stream": True}))[1][-1]["error"]["code"] == code


def test_refusals_of_a_worker(stub):
    for status, here in ((413, 413), (429, 429), (500, 502), (401, 502), (302, 502)):
        stub.status = status
        assert request(stub, ASK).status_code == here
    stub.status, stub.said = 200, []
    assert request(stub, ASK).json()["error"]["code"] == "worker_gone"


def test_a_prompt_that_is_too_long_is_an_error_and_no_answer(stub):
    for text, more in (
        ("Exceeds max token length. Please start a new conversation, thanks.", {}),
        ("the prompt is long", {"finish_reason": "context_length_exceeded"}),
    ):
        said_of(stub, text, **more)
        made = request(stub, ASK)
        assert (made.status_code, made.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_models_unknown_models_and_controllers_that_are_gone(stub):
    stub.models = ["zebra", "vicuna-13b", "ape"]
    told = request(stub, path="/v1/models")
    assert [one["id"] for one in told.json()["data"]] == ["vicuna-13b", "ape", "zebra"]
    assert request(stub, ASK).json()["error"]["code"] == "model_not_found"
    stub.refreshed = 0
    request(stub, path="/v1/models", times=3)
    assert stub.refreshed == 1
    request(stub, path="/v1/models", times=3, models="reload")
    assert stub.refreshed == 4
    here, stub.root = stub.root, "http://127.0.0.1:9"
    try:
        made = request(stub, ASK)
        assert (made.status_code, made.json()["error"]["code"]) == (503, "no_controller")
    finally:
        stub.root = here


def test_the_template_is_the_operators_else_the_workers_else_guessed(stub):
    stub.said = [frame("no matter")]
    request(stub, ASK)
    assert stub.asked[-1]["prompt"] == RECORDED["states"]["llava_v1"]["text"]["prompt"]
    mpt = get_template("mpt")
    stub.templates = {"llava-v1.5-7b": mpt.model_dump(mode="json", exclude_defaults=True)}
    request(stub, ASK)
    assert stub.asked[-1]["prompt"] == RECORDED["states"]["mpt"]["text"]["prompt"]
    assert stub.asked[-1]["stop"] == "<|im_end|>"
    request(stub, ASK, template=get_template("vicuna_v1"))
    assert stub.asked[-1]["prompt"] == RECORDED["states"]["vicuna_v1"]["text"]["prompt"]
    stub.templates = {"llava-v1.5-7b": {"no": "template"}}
    request(stub, ASK)
    assert stub.asked[-1]["prompt"] == RECORDED["states"]["llava_v1"]["text"]["prompt"]


def test_what_the_protocol_cannot_carry_is_refused(stub):
    for field in ({"seed": 0}, {"seed": 3}, {"top_k": 5}, {"logprobs": True}, {"max_tokens": 99999}, {"n": 128}):
        made = request(stub, ASK | field, times=1)
        assert (made.status_code, made.json()["error"]["param"]) == (400, next(iter(field))), field
    assert stub.asked == []


# ---- flags -----------------------------------------------------------------------------------------------------------


def test_old_flags(monkeypatch):
    for name in ("OPENAI_API_KEY", "LAPILLI_MODERATION_KEY", "LAPILLI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    run = CliRunner().invoke
    for verb, flags in {
        "web": ["--controller", "--controller-url", "--controller-address", "--worker", "--worker-address",
                "--moderate", "--concurrency-count", "--model-list-mode"],
        "worker": ["--controller", "--controller-address", "--worker", "--worker-address", "--model-base"],
        "register": ["--controller", "--controller-address", "--worker-name", "--check-heart-beat"],
        "test": ["--controller-address", "--worker-address", "--model-name", "--max-new-tokens", "--message"],
    }.items():  # fmt: skip
        told = run(serve_app, [verb, "--help"], env={"COLUMNS": "200"}).output
        assert [flag for flag in flags if flag not in told] == []
    shared = run(serve_app, ["web", "--share"])
    assert "tunnel" in str(shared.exception)
    assert "needs a key" in str(run(serve_app, ["web", "--port", "0", "--moderate"]).exception)
    wrong = run(serve_app, ["web", "--port", "0", "--model-list-mode", "sometimes"])
    assert "--model-list-mode" in str(wrong.exception)
    assert "http://HOST:PORT" in str(run(serve_app, ["test", "--controller", "localhost:21001"]).exception)


# ---- processes -------------------------------------------------------------------------------------------------------


class Parts:
    """A running cluster with a key: controller, two workers, web server."""

    def __init__(self, controller, web, client, http):
        self.controller, self.web, self.client, self.http = controller, web, client, http


@pytest.fixture(scope="module")
def parts(models, tmp_path_factory):
    spoken = build_tiny(tmp_path_factory.mktemp("web") / "spoken", template="mpt")
    environment = {"LAPILLI_API_KEY": KEY}
    with ExitStack() as stack:
        controller = stack.enter_context(serving("controller", environment=environment))
        for path in (models / "parrot", spoken):
            arguments = ("worker", "--model-path", str(path), "--controller", controller.root)
            stack.enter_context(serving(*arguments, environment=environment))
        log = str(tmp_path_factory.mktemp("log") / "kept")
        arguments = ("web", "--controller-url", controller.root, "--model-list-mode", "reload", "--log-dir", log)
        web = stack.enter_context(serving(*arguments, "--embed", environment=environment))
        client = stack.enter_context(OpenAI(base_url=web.url, api_key=KEY, max_retries=0, timeout=60))
        headers = {"authorization": f"Bearer {KEY}"}
        http = stack.enter_context(httpx.Client(base_url=web.root, headers=headers, timeout=60))
        made = Parts(controller, web, client, http)
        made.spoken, made.log = spoken, Path(log)
        end = time.monotonic() + 30
        while len(http.get("/v1/models").json()["data"]) < 2:
            assert time.monotonic() < end
            time.sleep(0.2)
        yield made


@pytest.mark.slow
def test_two_models_through_the_official_client(parts, models):
    assert [model.id for model in parts.client.models.list()] == ["parrot", "spoken"]
    local = lapilli.load(parts.spoken)
    url = "data:image/jpeg;base64," + base64.b64encode((models / "wide.jpg").read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": url}}
    for content, seen in (
        ("What is it?", []),
        ([picture, {"type": "text", "text": "\nWhat is it?"}], [models / "wide.jpg"]),
        ([picture, picture, {"type": "text", "text": "Same?"}], [models / "wide.jpg"] * 2),
    ):
        asked = {"model": "spoken", "messages": [{"role": "user", "content": content}], "temperature": 0}
        made = parts.client.chat.completions.create(**asked, max_tokens=20)
        text = content if isinstance(content, str) else content[-1]["text"]
        bare = [{"role": "user", "content": [*[{"type": "image"}] * len(seen), {"type": "text", "text": text}]}]
        here = local.answer(bare, seen, lapilli.generate.decoding.Decoding(20))
        assert made.choices[0].message.content == here.text
        assert made.usage.completion_tokens == len(here.token_ids)
        assert made.usage.prompt_tokens == here.prompt_tokens
        assert made.choices[0].finish_reason == here.finish
        stream = parts.client.chat.completions.create(**asked, max_tokens=20, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == here.text
    asked = {"model": "parrot", "messages": [{"role": "user", "content": "?"}]}
    made = parts.client.chat.completions.create(**asked, temperature=0, n=2)
    assert [choice.message.content for choice in made.choices] == ["a red dog 음식"] * 2


@pytest.mark.slow
def test_keys(parts):
    for root in (parts.web.root, parts.controller.root):
        assert httpx.post(f"{root}/v1/chat/completions", json={}).status_code == 401
    assert httpx.get(parts.web.root).status_code == 200
    assert httpx.get(f"{parts.web.root}/page/settings").status_code == 401
    told = parts.http.get("/page/settings").json()
    assert (told["models"], told["votes"]) == ([{"name": "parrot"}, {"name": "spoken"}], True)
    assert any("--embed is taken" in line for line in parts.web.lines)
    assert KEY not in "\n".join(parts.web.lines + parts.controller.lines)


@pytest.mark.slow
def test_what_is_said_is_kept_with_the_workers_template(parts):
    messages = [{"role": "user", "content": "?"}]
    parts.client.chat.completions.create(model="spoken", messages=messages, temperature=0, max_tokens=2)
    turn = {"id": "c", "model": "spoken", "start": 1, "finish": 2, "temperature": 0, "top_p": 1, "max_tokens": 2}
    turn["messages"] = [*messages, {"role": "assistant", "content": "!"}]
    assert parts.http.post("/page/turns", json=turn).status_code == 204
    (file,) = parts.log.glob("*-conv.json")
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["state"]["roles"] == ["<|im_start|>user\n", "<|im_start|>assistant\n"]


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_and_a_client_that_leaves(parts, models):
    environment = {"LAPILLI_API_KEY": KEY}
    arguments = ("worker", "--model-path", str(models / "endless"), "--controller-address", parts.controller.root)
    asked = {"model": "endless", "messages": [{"role": "user", "content": "?"}], "temperature": 0, "max_tokens": 1500}
    with serving(*arguments, environment=environment) as worker:
        end = time.monotonic() + 30
        while "endless" not in [model.id for model in parts.client.models.list()]:
            assert time.monotonic() < end
            time.sleep(0.2)

        def waiting():
            headers = {"authorization": f"Bearer {KEY}"}
            return httpx.post(f"{worker.root}/worker_get_status", headers=headers).json()["queue_length"]

        with parts.client.chat.completions.create(**asked, stream=True) as stream:
            for _, _ in zip(range(5), stream, strict=False):
                pass
            assert waiting() == 1
        left = time.monotonic()
        while waiting():
            assert time.monotonic() - left < 10
            time.sleep(0.05)
        body = asked | {"stream": True}
        lines = []
        with parts.http.stream("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 12:
                    os.kill(worker.process.pid, signal.SIGKILL)
    assert json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]["code"] == "worker_gone"
    begun = time.monotonic()
    while True:
        with pytest.raises(APIStatusError) as caught:
            parts.client.chat.completions.create(**asked)
        if caught.value.code in ("no_worker", "model_not_found"):
            break
        assert caught.value.code == "worker_gone"
        assert time.monotonic() - begun < 20
        time.sleep(0.3)
    parrot = {"model": "parrot", "messages": asked["messages"], "temperature": 0}
    assert parts.client.chat.completions.create(**parrot).choices[0].message.content == "a red dog 음식"


@pytest.mark.slow
def test_a_question_and_a_registration_by_hand(parts, monkeypatch):
    monkeypatch.setenv("LAPILLI_API_KEY", KEY)
    asked = CliRunner().invoke(
        serve_app, ["test", "--controller", parts.controller.root, "--model-name", "parrot", "--message", "Who?"]
    )
    assert asked.exit_code == 0, asked.exception
    assert asked.output.splitlines()[-1].startswith("a red dog")
    wrong = CliRunner().invoke(
        serve_app, ["register", "--controller", parts.controller.root, "--worker", "http://127.0.0.1:9"]
    )
    assert "does not answer" in str(wrong.exception)
    headers = {"authorization": f"Bearer {KEY}"}
    address = httpx.post(f"{parts.controller.root}/get_worker_address", json={"model": "parrot"}, headers=headers)
    worker = address.json()["address"]
    done = CliRunner().invoke(serve_app, ["register", "--controller", parts.controller.root, "--worker-name", worker])
    assert (done.exit_code, done.output) == (0, f"registered; {parts.controller.root} serves parrot, spoken\n")
