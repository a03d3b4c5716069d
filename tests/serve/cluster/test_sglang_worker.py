"""The worker in front of an SGLang server: a small one that speaks its documented /generate stands for it."""

import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler
from typing import ClassVar

import httpx
import pytest
from tests.serve.cluster.test_controller_worker import frames, post
from tests.support.loopback import loopback
from tests.support.server_process import serving
from tests.support.waiting import until

PROMPT = "A chat. USER: <image>\nWhat? ASSISTANT:"


class Sglang(BaseHTTPRequestHandler):
    """`/generate` as SGLang's documentation and server have it: the whole text so far in every event."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[dict]] = []
    left = threading.Event()

    def log_message(self, *_):
        pass

    def _whole(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/model_info":
            self._whole(200, {"model_path": "/models/llava-of-mine/", "is_generation": True})
        elif self.path == "/server_info":
            self._whole(200, {"incremental_streaming_output": False})
        else:
            self._whole(200 if self.path == "/health" else 404, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).asked.append(body)
        if "REFUSE" in body["text"]:
            self._whole(400, {"error": {"message": "The input is longer than the model's context length"}})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        if "ENDLESS" in body["text"]:
            try:
                for count in range(1000):
                    self._say({"text": " so" * count, "meta_info": {"finish_reason": None}})
                    time.sleep(0.05)
            except OSError:
                type(self).left.set()
            return
        for text in (" a", " a red", " a red dog"):
            self._say({"text": text, "meta_info": {"finish_reason": None}})
        if "ABORT" in body["text"]:
            self._say({"text": "", "meta_info": {"finish_reason": {"type": "abort", "message": "gone"}}})
        elif "BREAK" not in body["text"]:
            self._say({"text": " a red dog", "meta_info": {"finish_reason": {"type": "stop", "matched": 2}}})
            self.wfile.write(b"data: [DONE]\n\n")

    def _say(self, body):
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")
        self.wfile.flush()


@pytest.fixture(scope="module")
def sglang():
    with loopback(Sglang) as server:
        yield server.root


@pytest.mark.slow
def test_a_question_goes_through_with_its_pictures_and_stop(sglang, models):
    picture = base64.b64encode((models / "wide.jpg").read_bytes()).decode()
    asked = {"model": "m", "prompt": PROMPT, "images": [picture], "temperature": 0.2, "top_p": 0.7, "stop": "</s>"}
    with (
        serving("controller") as controller,
        serving("worker", "--sgl-endpoint", sglang, "--controller", controller.root) as worker,
    ):
        until(lambda: post(controller.root, "list_models").json() == {"models": ["llava-of-mine"]})
        status = {"model_names": ["llava-of-mine"], "speed": 1, "queue_length": 0}
        assert post(worker.root, "worker_get_status").json() == status
        said = frames(post(worker.root, "worker_generate_stream", asked | {"max_new_tokens": 9999}).content)
        assert [one["text"].removeprefix(PROMPT) for one in said] == [" a", " a red", " a red dog", " a red dog"]
        assert {one["error_code"] for one in said} == {0}
        sent = Sglang.asked[-1]
        assert sent["text"] == PROMPT
        assert sent["image_data"][0].startswith("data:image/jpeg;base64,")
        wanted = {"temperature": 0.2, "top_p": 0.7, "max_new_tokens": 2048, "stop": ["</s>"]}
        assert sent["sampling_params"] == wanted
        for changed in ({"images": []}, {"images": ["!"]}, {"prompt": "ABORT <image>"}, {"prompt": "BREAK <image>"},
                        {"prompt": "REFUSE <image>"}):  # fmt: skip
            (*_, last) = frames(post(worker.root, "worker_generate_stream", asked | changed).content)
            assert last["error_code"] == 1, changed
        endless = asked | {"prompt": "ENDLESS", "images": []}
        with httpx.stream("POST", f"{worker.root}/worker_generate_stream", json=endless, timeout=30) as response:
            next(response.iter_raw())
        assert Sglang.left.wait(1.0)
        until(lambda: post(worker.root, "worker_get_status").json() == status, 3.0)
