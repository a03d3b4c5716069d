"""Answers of another server behind ours: what it says well, and what it says badly.

The server behind is our own, so that answers can be held against asking it directly, or a small one that misbehaves as
it is told to.
"""

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler
from typing import ClassVar

import httpx
import openai
import PIL.Image
import pytest
from openai import OpenAI
from tests.serve.conftest import KEY
from tests.serve.test_api import ASK, image, text
from tests.support.loopback import loopback
from tests.support.server_process import serving

from lapilli.base.errors import RunError
from lapilli.serve.request import ChatRequest
from lapilli.serve.settings import Limits
from lapilli.serve.upstream.attach import attach, root_of
from lapilli.serve.upstream.body import Target, Writer, plain_picture

NAMES = ("tiny", "bird=parrot", "forever")


class Misbehaving(BaseHTTPRequestHandler):
    """Answers a chat as `how` says; remembers the bodies, and when the other side left."""

    protocol_version = "HTTP/1.1"
    how = "well"
    bodies: ClassVar[list[dict]] = []
    left = threading.Event()

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._whole(200, {"data": [{"id": "it"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).bodies.append(body)
        getattr(self, f"_{self.how}")()

    def _whole(self, status, body, **headers):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _begin(self, *pieces):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for piece in pieces:
            self._say(piece)
        self.close_connection = True

    def _say(self, piece):
        data = piece if isinstance(piece, bytes) else json.dumps(piece).encode()
        self.wfile.write(b"data: " + data + b"\n\n")
        self.wfile.flush()

    def _well(self):
        self._begin(chunk("<thi"), chunk("nk>hm</think>\n\nyes"), chunk("", finish_reason="stop"), b"[DONE]")

    def _busy(self):
        self._whole(429, {"error": {"message": "later"}}, retry_after="7")

    def _failing(self):
        self._whole(500, {"error": {"message": "secret inside"}})

    def _refusing(self):
        self._whole(400, {"object": "error", "message": "This model's maximum context length is 9 tokens", "code": 400})

    def _locked(self):
        self._whole(401, {"error": {"message": "no key"}})

    def _page(self):
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"hi")

    def _broken(self):
        self._begin(chunk("a"), b'{"choices": [{"index": 0, "del')

    def _foreign(self):
        self._begin({"choices": [{"index": 0, "delta": {"content": ["a"]}}]})

    def _another(self):
        self._begin(chunk("a", index=3))

    def _large(self):
        self._begin(chunk("a"))
        with contextlib.suppress(OSError):
            self.wfile.write(b"data: " + b"x" * (5 << 20))

    def _unfinished(self):
        self._begin(chunk("a"), b"[DONE]")

    def _dying(self):
        self._begin(chunk("a"))
        self.connection.close()

    def _inside(self):
        self._begin(chunk("a"), {"error": {"message": "out of memory at /home/x", "code": 500}})

    def _aborting(self):
        self._begin(chunk("a"), chunk("", finish_reason="abort"), b"[DONE]")

    def _slow(self):
        self._begin(chunk("a"))
        try:
            while True:
                time.sleep(0.05)
                self._say(chunk("a"))
        except OSError:
            type(self).left.set()


def chunk(words, index=0, finish_reason=None):
    return {"choices": [{"index": index, "delta": {"content": words}, "finish_reason": finish_reason}], "extra": 1}


@pytest.fixture(scope="module")
def rogue():
    with loopback(Misbehaving) as server:
        yield server.root


@pytest.fixture(scope="module")
def misled(rogue):
    """Our server in front of the one that misbehaves."""
    limits = ("--slots", "2", "--queue", "1", "--request-seconds", "3")
    with serving("it", "--engine-url", rogue, *limits) as server, httpx.Client(timeout=30) as http:

        def ask(how="well", **more):
            Misbehaving.how = how
            return http.post(server.url + "/chat/completions", json={"model": "it", "messages": ASK, **more})

        yield ask, server


@pytest.fixture(scope="module")
def front(api):
    """Our server in front of our server, which wants a key."""
    arguments = (*NAMES, "--engine", "vllm", "--engine-url", api.server.url, "--new-tokens", "20000", "--images", "3")
    environment = {"LAPILLI_ENGINE_KEY": KEY}
    with (
        serving(*arguments, "--image-pixels", "250000", environment=environment) as server,
        OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


@pytest.mark.slow
def test_answers_are_those_of_the_server_behind(api, front, models):
    parts = [text("First "), image(models / "wide.jpg"), text(" then "), image(models / "tall.png"), text("?")]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    asked = {"n": 2, "seed": 3, "temperature": 1.1, "max_tokens": 9, "logprobs": True, "top_logprobs": 2}
    behind = api.client.chat.completions.create(model="tiny", messages=messages, **asked)
    made = front.chat.completions.create(model="tiny", messages=messages, **asked)
    assert made.choices == behind.choices
    assert made.usage == behind.usage
    assert (made.model, made.id == behind.id) == ("tiny", False)
    with front.chat.completions.create(
        model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}, **asked
    ) as stream:
        chunks = list(stream)
    said, tokens = ["", ""], [[], []]
    for one in chunks[:-1]:
        (choice,) = one.choices
        said[choice.index] += choice.delta.content or ""
        tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert said == [c.message.content for c in behind.choices]
    assert tokens == [c.logprobs.content for c in behind.choices]
    assert chunks[-1].usage == behind.usage
    assert {c.finish_reason for one in chunks[:-1] for c in one.choices} == {None, "length"}


@pytest.mark.slow
def test_names_stops_and_refusals(api, front, models):
    assert [m.id for m in front.models.list()] == ["tiny", "bird", "forever"]
    made = front.chat.completions.create(model="bird", messages=ASK, temperature=0, stop=" dog")
    assert (made.model, made.choices[0].message.content) == ("bird", "a red")
    with pytest.raises(openai.NotFoundError):
        front.chat.completions.create(model="parrot", messages=ASK)
    long = [{"role": "user", "content": "word " * 700}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            front.chat.completions.create(model="tiny", messages=long, stream=stream)
        assert refused.value.code == "context_length_exceeded"
    before = api.metric('lapilli_http_requests_total{path="/v1/chat/completions",status="200"}')
    large = io.BytesIO()
    PIL.Image.new("RGB", (600, 600)).save(large, "PNG")
    address = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    bomb = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(large.getvalue()).decode()}"},
    }
    for content in ([address], [bomb], [image(models / "wide.jpg")] * 4):
        with pytest.raises(openai.BadRequestError):
            front.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
    assert api.metric('lapilli_http_requests_total{path="/v1/chat/completions",status="200"}') == before


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_the_slot_behind_within_a_second(api, front, streamed):
    body = {"model": "forever", "messages": ASK, "max_tokens": 15000, "temperature": 0, "stream": streamed}
    active = 'lapilli_active{model="forever"}'
    address = front.base_url
    client = http.client.HTTPConnection(address.host, address.port, timeout=30)
    client.request("POST", f"{address.path}chat/completions", json.dumps(body), {"content-type": "application/json"})
    connection = client.sock
    if streamed:
        assert any(b'"content":"' in line and b'"content":""' not in line for line in client.getresponse())
    since = time.monotonic()
    while not api.metric(active):
        assert time.monotonic() - since < 30.0
        time.sleep(0.05)
    connection.shutdown(socket.SHUT_RDWR)
    left = time.monotonic()
    while api.metric(active):
        assert time.monotonic() - left < 1.0
        time.sleep(0.05)


@pytest.mark.slow
def test_what_goes_wrong_behind_is_said_in_our_words(misled):
    ask, server = misled
    for how, status, code in (
        ("busy", 429, "busy"),
        ("failing", 502, "engine_failed"),
        ("refusing", 400, "context_length_exceeded"),
        ("locked", 502, "engine_failed"),
        ("page", 502, "engine_failed"),
        ("broken", 502, "engine_failed"),
        ("foreign", 502, "engine_failed"),
        ("another", 502, "engine_failed"),
        ("large", 502, "engine_failed"),
        ("unfinished", 502, "engine_failed"),
        ("dying", 502, "engine_failed"),
        ("inside", 502, "engine_failed"),
        ("aborting", 502, "engine_failed"),
        ("slow", 504, "timeout"),
    ):
        made = ask(how)
        assert (made.status_code, made.json()["error"]["code"]) == (status, code), (how, made.text)
        assert "secret" not in made.text
        assert "/home" not in made.text
        if how == "busy":
            assert made.headers["retry-after"] == "7"
        if how in ("dying", "inside", "broken", "unfinished"):  # after the beginning of a stream
            events = ask(how, stream=True).text.strip().split("\n\n")
            assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == code
            assert "[DONE]" not in "".join(events)
    assert Misbehaving.left.wait(1.0)  # the one that was too slow was let go of
    gauges = httpx.get(server.root + "/metrics").text
    assert 'lapilli_active{model="it"} 0' in gauges
    assert 'lapilli_waiting{model="it"} 0' in gauges


@pytest.mark.slow
def test_thoughts_are_told_apart_and_nothing_is_left_to_defaults(misled):
    ask, _ = misled
    made = ask(temperature=0.5, stop=["#"]).json()
    message = made["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "yes")
    assert made["usage"] is None  # it counts none
    sent = Misbehaving.bodies[-1]
    assert (sent["model"], sent["stream"], sent["max_tokens"], sent["temperature"]) == ("it", True, 2048, 0.5)
    assert (sent["top_p"], sent["n"], sent["stop"]) == (1.0, 1, ["#"])
    refused = ask(top_k=5)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_k")


@pytest.mark.slow
def test_only_so_many_wait(misled):
    ask, server = misled
    Misbehaving.how = "slow"
    with httpx.Client(timeout=30) as http:
        body = {"model": "it", "messages": ASK, "stream": True}
        made: list[int] = []
        threads = [
            threading.Thread(
                target=lambda: made.append(http.post(server.url + "/chat/completions", json=body).status_code)
            )
            for _ in range(3)
        ]
        for thread in threads[:2]:
            thread.start()
        time.sleep(1.0)
        threads[2].start()
        time.sleep(0.5)
        gauges = httpx.get(server.root + "/metrics").text
        assert 'lapilli_active{model="it"} 2' in gauges
        assert 'lapilli_waiting{model="it"} 1' in gauges
        full = ask("slow")
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert int(full.headers["retry-after"]) >= 1
        for thread in threads:
            thread.join()
    assert made == [200, 200, 200]  # the third has a second left when the others' time is over


def test_addresses_that_no_engine_is_asked_at(rogue):
    assert root_of("https://models.example.org/proxy/v1/") == "https://models.example.org/proxy"
    for url in ("http://10.0.0.1:8000", "ftp://127.0.0.1", "http://a:b@127.0.0.1:1", "http://127.0.0.1/?q", "x"):
        with pytest.raises(RunError, match="--engine-url"):
            root_of(url)
    with pytest.raises(RunError, match="does not answer"):
        attach("openai", "http://127.0.0.1:9", ["it"])
    with pytest.raises(RunError, match='no model "that"; it has it'):
        attach("openai", rogue, ["that"])
    (model,), endpoint = attach("vllm", rogue + "/v1", ["mine=it"], {"LAPILLI_ENGINE_KEY": "sk-1"})
    assert (model.name, model.target.name, endpoint.headers) == ("mine", "it", {"Authorization": "Bearer sk-1"})


def test_pictures_leave_plain():
    def sent(picture, kind, **how):
        file = io.BytesIO()
        picture.save(file, kind, **how)
        head, _, body = plain_picture(file.getvalue(), "here", Limits()).partition(",")
        data = base64.b64decode(body)
        with PIL.Image.open(io.BytesIO(data)) as again:
            return head, data == file.getvalue(), again.mode, list(again.convert("RGB").getdata())

    base = PIL.Image.new("RGB", (3, 2), (9, 200, 30))
    assert sent(base, "PNG") == ("data:image/png;base64", True, "RGB", [(9, 200, 30)] * 6)
    assert sent(base, "JPEG")[:3] == ("data:image/jpeg;base64", True, "RGB")
    lying = PIL.Image.Exif()
    lying[0x0112] = 6
    assert sent(base, "JPEG", exif=lying)[:2] == ("data:image/png;base64", False)
    clear = base.convert("RGBA")
    clear.putalpha(0)
    assert sent(clear, "PNG") == ("data:image/png;base64", False, "RGB", [(9, 200, 30)] * 6)
    moving = sent(base, "GIF", save_all=True, append_images=[PIL.Image.new("RGB", (3, 2))])
    assert moving == ("data:image/png;base64", False, "RGB", [(9, 200, 30)] * 6)


def test_what_sglang_and_openai_are_told(models):
    pictures = [image(models / "wide.jpg"), image(models / "tall.png")]
    asked = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": [*pictures, text("?")]}], "stop": "#"}
    )
    sent = json.loads(Writer(Limits()).write(asked, Target("there", "sglang", ("</s>",))).data)
    assert [part.get("modalities") for part in sent["messages"][0]["content"]] == ["multi-images", "multi-images", None]
    assert (sent["stop"], sent["top_k"], sent["model"]) == (["#", "</s>"], -1, "there")
    assert "top_k" not in json.loads(Writer(Limits()).write(asked, Target("there", "openai")).data)
