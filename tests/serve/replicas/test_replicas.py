"""`--engine ray`: replicas of models in a real Ray cluster of two nodes on this machine, behind the API."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI
from tests.support.server_process import serving
from tests.support.waiting import until

from lapilli.generate.decoding import Decoding

SLOTS, QUEUE = 2, 3
ASK = [{"role": "user", "content": "What is it?"}]
LOAD_SECONDS = 400
"""Ray starts a Python process for all it does, and two cores may have other work."""


def processes(mark):
    """Ids of processes that were started with the mark in their environment, and their command lines."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def replicas(mark, model):
    """Processes of the replicas of a model."""
    return [n for n, line in processes(mark).items() if line.startswith("ray::") and f"-{model}-" in line]


@pytest.fixture(scope="module")
def mark():
    return f"LAPILLI_TEST={uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def cluster(mark):
    """The address of a cluster of two nodes with room for two replicas each."""
    pytest.importorskip("ray.serve")
    name, _, value = mark.partition("=")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        made = start_cluster()
        try:
            yield made.address
        finally:
            made.shutdown()


def start_cluster(attempts=4):
    """Two nodes. Ray gives each 30 s to start, which is too little while a machine does much else."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
    made = Cluster()
    try:
        made.add_node(**node)
        made.add_node(**node)
    except Exception as error:
        made.shutdown()
        if attempts == 1 or "timed out during startup" not in str(error):
            raise
        return start_cluster(attempts - 1)
    return made


@pytest.fixture(scope="module")
def server(models, cluster, mark):
    name, _, value = mark.partition("=")
    arguments = [str(models / "tiny"), f"forever={models / 'endless'}", "--new-tokens", "20000"]
    arguments += ["--slots", str(SLOTS), "--queue", str(QUEUE)]
    arguments += ["--engine", "ray", "--ray-address", cluster, "--replicas", "2"]
    environment = {name: value, "RAY_AUTH_MODE": "disabled"}
    with serving(*arguments, environment=environment, seconds=LOAD_SECONDS) as running:
        yield running
        running.terminate()
        assert running.process.wait(60) == 0, running.lines
        assert "Traceback" not in "\n".join(running.lines)
        until(lambda: not replicas(mark, "tiny") and not replicas(mark, "forever"), 60)  # the cluster is as it was


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def metric(server, name):
    lines = [x for x in httpx.get(server.root + "/metrics", timeout=60).text.splitlines() if x.startswith(name + " ")]
    return float(lines[0].split()[-1]) if lines else 0.0


def data_url(path):
    import base64

    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"


@pytest.mark.slow
def test_each_answer_is_the_engines(client, tiny, models):
    """Twelve at a time on two replicas, drawn with seeds, streamed and not, pictures among them."""
    url = data_url(models / "wide.jpg")

    def words(number):
        return f"Question {'very ' * (number % 5)}{number}?"

    def ask(number):
        picture = {"type": "image_url", "image_url": {"url": url}}
        content = [picture, {"type": "text", "text": words(number)}] if number % 3 == 0 else words(number)
        options = {"temperature": 0.9, "seed": number, "top_p": 0.9, "max_tokens": 8 + number % 4}
        options |= {"model": "tiny", "messages": [{"role": "user", "content": content}]}
        while True:
            try:
                if number % 2:
                    with client.chat.completions.create(stream=True, **options) as stream:
                        return "".join(c.choices[0].delta.content or "" for c in stream)
                return client.chat.completions.create(**options).choices[0].message.content
            except openai.RateLimitError:
                time.sleep(0.05)

    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, range(12)))
    for number, said in enumerate(together):
        parts = [{"type": "image"}, {"type": "text", "text": words(number)}] if number % 3 == 0 else words(number)
        pictures = [models / "wide.jpg"] if number % 3 == 0 else None
        options = {"temperature": 0.9, "top_p": 0.9, "seed": number}
        chat = [{"role": "user", "content": parts}]
        assert said == tiny.generate(chat, pictures, 8 + number % 4, **options), number


@pytest.mark.slow
def test_several_answers_and_logprobs(client, tiny):
    options = {"model": "tiny", "messages": ASK, "max_tokens": 8}
    made = client.chat.completions.create(**options, n=3, seed=7, temperature=1.3)
    expected = [tiny.answer("What is it?", decoding=Decoding(8, 1.3, seed=7 + i)) for i in range(3)]
    assert [c.message.content for c in made.choices] == [a.text for a in expected]
    assert made.usage.completion_tokens == sum(len(a.token_ids) for a in expected)
    made = client.chat.completions.create(**options, temperature=0, logprobs=True, top_logprobs=3)
    answer = tiny.answer("What is it?", decoding=Decoding(8, logprobs=3))
    special = set(tiny.tokenizer.all_special_ids)
    told = [t.logprob for t in made.choices[0].logprobs.content]
    assert told == pytest.approx([e.logprob for e in answer.logprobs if e.token_id not in special], abs=1e-4)
    made = client.chat.completions.create(model="forever", messages=ASK, stop=[" blue"], temperature=0)
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == ("one", "stop")


@pytest.mark.slow
def test_what_is_wrong_is_refused_before_it_travels(client, server):
    bad = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [bad]}])
    assert caught.value.code == "invalid_image"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "very " * 5000}])
    assert caught.value.code == "context_length_exceeded"


def open_streams(client, stack, number):
    """So many endless answers, each of which has begun."""
    ask = {"model": "forever", "messages": ASK, "stream": True, "temperature": 0}
    made = [client.chat.completions.create(**ask) for _ in range(number)]
    for one in made:
        stack.callback(one.close)
    return made


def read(stream, pieces):
    """Read some pieces; what ended the stream before that, or None."""
    try:
        for _ in range(pieces):
            next(stream)
    except openai.APIError as error:
        return error
    except StopIteration:
        return "ended"
    return None


@pytest.mark.slow
def test_both_replicas_answer_and_slots_come_free(client, server, mark):
    """More at a time than one replica has slots for; a full queue; and clients that leave."""
    active, waiting = 'lapilli_active{model="forever"}', 'lapilli_waiting{model="forever"}'
    until(lambda: metric(server, active) == 0, 10)
    assert len(replicas(mark, "forever")) == 2
    with ExitStack() as stack:
        streams = open_streams(client, stack, 2 * SLOTS)
        for stream in streams:
            assert read(stream, 5) is None
        others = open_streams(client, stack, QUEUE)
        until(lambda: metric(server, waiting) == QUEUE, 10)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="forever", messages=ASK)
        said = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=2)
        assert said.choices  # other models are not held up
        for stream in others:
            stream.close()
        until(lambda: metric(server, waiting) == 0, 5)
    until(lambda: metric(server, active) == 0, 5)


@pytest.mark.slow
def test_a_replica_that_is_killed(client, server, mark):
    """Its streams end with an error, the others go on, and Ray starts another one."""
    up = 'lapilli_replicas{model="forever"}'
    until(lambda: metric(server, 'lapilli_active{model="forever"}') == 0, 10)
    with ExitStack() as stack:
        streams = open_streams(client, stack, 2 * SLOTS)
        for stream in streams:
            assert read(stream, 3) is None
        os.kill(replicas(mark, "forever")[0], signal.SIGKILL)
        with ThreadPoolExecutor(len(streams)) as pool:
            ends = list(pool.map(lambda stream: read(stream, 1000), streams))
        lost = [end for end in ends if end is not None]
        assert len(lost) == SLOTS
        assert all(end.code == "engine_failed" for end in lost)
    assert metric(server, up) >= 1
    assert httpx.get(server.root + "/health").status_code == 200
    made = client.chat.completions.create(model="forever", messages=ASK, max_tokens=4, temperature=0)
    assert made.usage.completion_tokens == 4
    until(lambda: metric(server, up) == 2, LOAD_SECONDS)
    with ExitStack() as stack:
        for stream in open_streams(client, stack, 2 * SLOTS):
            assert read(stream, 3) is None


@pytest.mark.slow
def test_a_cluster_of_its_own_ends_with_it(models, mark):
    """Asked to stop, a server ends what is under way and leaves no process of Ray behind."""
    name = f"LAPILLI_TEST={uuid.uuid4().hex}"
    key, _, value = name.partition("=")
    arguments = [f"forever={models / 'endless'}", "--engine", "ray", "--replicas", "1"]
    with serving(*arguments, environment={key: value}, seconds=LOAD_SECONDS) as running:
        assert not [line for line in processes(name).values() if "usage" in line]
        lines: list[str] = []
        begun = threading.Event()

        def stream():
            body = {"model": "forever", "messages": ASK, "temperature": 0, "stream": True, "max_tokens": 1500}
            with httpx.stream("POST", running.url + "/chat/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    if len(lines) > 20:
                        begun.set()

        thread = threading.Thread(target=stream)
        thread.start()
        assert begun.wait(30)
        running.terminate()
        thread.join(60)
        assert lines.count("data: [DONE]") == 1
        assert running.process.wait(60) == 0, running.lines
        assert "Traceback" not in "\n".join(running.lines)
    until(lambda: not processes(name), 20)


def run(*arguments):
    command = [sys.executable, "-m", "lapilli.cli", "serve", *arguments, "--port", "0"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=LOAD_SECONDS)


@pytest.mark.slow
def test_what_cannot_be_served(models):
    tiny = str(models / "tiny")
    for arguments, said in (
        ([tiny, "--replicas", "2"], "--replicas goes with --engine ray"),
        ([str(models / "nothing"), "--engine", "ray"], "no such folder"),
        ([tiny, "--engine", "ray", "--ray-address", "127.0.0.1:9"], "no Ray cluster answers there"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr
        assert "Traceback" not in done.stderr
