"""LLaVA's cluster protocol: workers and a controller as processes, spoken to as the original's web server does."""

import asyncio
import base64
import json
import os
import signal
from itertools import pairwise

import httpx
import pytest
from tests.support.server_process import serving
from tests.support.waiting import until

from lapilli.data.template import Template
from lapilli.serve.cluster.controller import Controller, Known
from lapilli.serve.cluster.frames import NO_WORKER, WORKER_GONE
from lapilli.serve.refusal import ApiError

KEY = "sk-shared"


def post(root, path, body=None, key=None, timeout=60):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{root}/{path}", json=body, headers=headers, timeout=timeout)


def frames(data):
    assert data.endswith(b"\0")
    return [json.loads(one) for one in data[:-1].split(b"\0")]


@pytest.fixture(scope="module")
def controller():
    with serving("controller") as process:
        yield process.root


@pytest.fixture(scope="module")
def cluster(controller, models):
    with serving(
        "worker", "--model-path", str(models / "parrot"), "--controller", controller, "--multi-modal"
    ) as worker:
        until(lambda: post(controller, "list_models").json() == {"models": ["parrot"]})
        assert any("--multi-modal is taken" in line for line in worker.lines)
        yield controller, worker.root


@pytest.mark.slow
def test_a_question_takes_the_way_of_the_original_clients(cluster, parrot):
    controller, worker = cluster
    assert post(controller, "get_worker_address", {"model": "parrot"}).json() == {"address": worker}
    assert post(controller, "get_worker_address", {"model": "none"}).json() == {"address": ""}
    status = post(worker, "worker_get_status").json()
    assert Template.model_validate(status.pop("templates")["parrot"]) == parrot.template
    assert status == {"model_names": ["parrot"], "speed": 1, "queue_length": 0}
    prompt = "A chat. USER: What is it? ASSISTANT:"
    asked = {
        "model": "parrot",
        "prompt": prompt,
        "temperature": 0.0,
        "top_p": 0.7,
        "max_new_tokens": 99,
        "stop": "</s>",
    }
    for root in (worker, controller):  # a controller passes on, too
        said = frames(post(root, "worker_generate_stream", asked).content)
        texts = [one["text"] for one in said]
        assert {one["error_code"] for one in said} == {0}
        assert all(later.startswith(before) for before, later in pairwise(texts))
        assert texts[-1][len(prompt) :].strip() == "a red dog 음식"
    stopped = frames(post(worker, "worker_generate_stream", asked | {"stop": " dog"}).content)
    assert stopped[-1]["text"][len(prompt) :].strip() == "a red"


@pytest.mark.slow
def test_pictures_and_what_is_wrong_with_them(cluster, models):
    _, worker = cluster
    picture = base64.b64encode((models / "wide.jpg").read_bytes()).decode()
    asked = {"model": "parrot", "prompt": "USER: <image>\nWhat? ASSISTANT:", "temperature": 0.2}
    (*_, last) = frames(post(worker, "worker_generate_stream", asked | {"images": [picture]}).content)
    assert last["error_code"] == 0
    for images in (None, [picture] * 2, ["!"], [base64.b64encode(b"GIF89a").decode()]):
        (said,) = frames(post(worker, "worker_generate_stream", asked | {"images": images}).content)
        assert said["error_code"] == 1
    (said,) = frames(post(worker, "worker_generate_stream", {"prompt": "word " * 9000}).content)
    assert said["error_code"] == 0
    assert said["text"].startswith("word word")
    assert "context" in said["text"]
    assert post(worker, "worker_generate_stream", {"prompt": 3}).status_code == 400
    assert httpx.post(f"{worker}/worker_generate_stream", content=b"x").status_code == 415


@pytest.mark.slow
def test_a_worker_that_dies_in_the_middle_is_forgotten_and_the_client_hears_of_it(controller, cluster, models):
    arguments = ("--model-path", str(models / "endless"), "--controller-address", controller)
    with serving("worker", *arguments) as worker:
        until(lambda: "endless" in post(controller, "list_models").json()["models"])
        asked = {"model": "endless", "prompt": "USER: Hi ASSISTANT:", "temperature": 0, "max_new_tokens": 2000}
        received = b""
        with httpx.stream("POST", f"{controller}/worker_generate_stream", json=asked, timeout=60) as response:
            for piece in response.iter_raw():
                if not received:
                    os.kill(worker.process.pid, signal.SIGKILL)
                received += piece
        last = frames(received[received.index(b"\0") + 1 :])[-1] if received.count(b"\0") > 1 else None
        assert last is not None
        assert last["error_code"] == WORKER_GONE
        assert post(controller, "list_models").json() == {"models": ["parrot"]}
        (said,) = frames(post(controller, "worker_generate_stream", asked).content)
        assert said["error_code"] == NO_WORKER
        others = frames(post(controller, "worker_generate_stream", asked | {"model": "parrot"}).content)
        assert others[-1]["error_code"] == 0


@pytest.mark.slow
def test_with_a_key_only_those_who_show_it_take_part(models):
    environment = {"LAPILLI_API_KEY": KEY}
    with serving("controller", environment=environment) as controller:
        assert post(controller.root, "list_models").status_code == 401
        assert post(controller.root, "list_models", key=KEY).json() == {"models": []}
        arguments = ("--model-path", str(models / "parrot"), "--controller", controller.root, "--model-name", "bird")
        with serving("worker", *arguments, environment=environment) as worker:
            until(lambda: post(controller.root, "list_models", key=KEY).json() == {"models": ["bird"]})
            assert post(worker.root, "worker_get_status").status_code == 401
            post(controller.root, "refresh_all_workers", key=KEY)
            asked = {"model": "bird", "prompt": "Hi", "temperature": 0}
            said = frames(post(controller.root, "worker_generate_stream", asked, key=KEY).content)
            assert said[-1]["error_code"] == 0


def run(work):
    async def whole():
        controller = Controller()
        try:
            return await work(controller)
        finally:
            await controller.close()

    return asyncio.run(whole())


STATUS = {"model_names": ["m"], "speed": 1, "queue_length": 0}


@pytest.mark.parametrize(
    "name",
    ["", "worker", "ftp://127.0.0.1:1", "http://127.0.0.1", "http://a:b@127.0.0.1:1", "http://127.0.0.1:1/?q",
     "http://10.0.0.1:1", "http://example.org:80", "http://127.0.0.1:x"],
)  # fmt: skip
def test_addresses_that_no_worker_has(name):
    async def work(controller):
        with pytest.raises(ApiError):
            await controller.register(name, True, STATUS)
        assert controller.models() == []

    run(work)


@pytest.mark.parametrize(
    "status", [{}, {"model_names": []}, {"model_names": ["m"], "speed": 0}, {"model_names": ["m"], "queue_length": "x"}]
)
def test_workers_that_say_nonsense_are_refused(status):
    async def work(controller):
        with pytest.raises(ApiError, match="worker_status"):
            await controller.register("http://127.0.0.1:1", True, status)

    run(work)


def test_questions_go_where_fewest_wait_for_their_speed():
    async def work(controller):
        await controller.register("http://127.0.0.1:1", True, STATUS | {"speed": 2})
        await controller.register("http://127.0.0.1:2", True, STATUS)
        assert [controller.address("m")[-1] for _ in range(6)] == ["1", "2", "1", "1", "2", "1"]
        assert controller.beat("http://127.0.0.1:1", 9)
        assert controller.address("m")[-1] == "2"
        assert not controller.beat("http://127.0.0.1:3", 0)
        assert controller.status()["speed"] == 3
        controller.forget("http://127.0.0.1:2", "a test")
        assert controller.address("m")[-1] == "1"

    run(work)


def test_the_lottery_draws_by_speed():
    controller = Controller("lottery")
    controller.workers = {"a": Known(("m",), 3.0, 0, True), "b": Known(("m",), 1.0, 0, True)}
    drawn = [controller.address("m") for _ in range(2000)]
    assert 0.70 < drawn.count("a") / len(drawn) < 0.80
    asyncio.run(controller.close())


def test_a_silent_worker_and_one_whose_address_is_closed_are_forgotten():
    async def work(controller):
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        for number, check in ((port, True), (1, True), (2, False)):
            await controller.register(f"http://127.0.0.1:{number}", check, STATUS)
        watching = asyncio.create_task(controller.watch(0.02))
        await asyncio.sleep(0.3)
        assert set(controller.workers) == {f"http://127.0.0.1:{port}", "http://127.0.0.1:2"}
        controller.workers[f"http://127.0.0.1:{port}"].beat -= 31
        await asyncio.sleep(0.3)
        assert set(controller.workers) == {"http://127.0.0.1:2"}
        watching.cancel()
        server.close()

    run(work)
