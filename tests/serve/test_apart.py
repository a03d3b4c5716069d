"""Models' process and server: what each does when the other ends."""

import contextlib
import json
import os
import signal
from multiprocessing import Pipe
from queue import SimpleQueue
from types import SimpleNamespace

import httpx
import pytest
from tests.support.proc import children
from tests.support.server_process import serving
from tests.support.waiting import until

from lapilli.base.errors import ModelError, RunError
from lapilli.generate.decoding import Answer, Decoding
from lapilli.serve.apart import link
from lapilli.serve.apart.link import open_apart
from lapilli.serve.apart.message import Left, Made
from lapilli.serve.apart.process import _Models
from lapilli.serve.settings import Limits
from lapilli.serve.worker import Lost, Wanted

ASK = {"messages": [{"role": "user", "content": "?"}], "temperature": 0}


def runs(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def first_text(lines):
    return next(line for line in lines if '"content":"' in line and '"content":""' not in line)


@pytest.mark.slow
def test_a_killed_models_process_is_said_to_clients_log_and_health(models):
    with serving(f"forever={models / 'endless'}") as server:
        (process,) = children(server.process.pid)
        body = {**ASK, "model": "forever", "stream": True, "max_tokens": 2000}
        with httpx.stream("POST", server.url + "/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            first_text(lines)
            os.kill(process, signal.SIGKILL)
            *_, last = (line for line in lines if line)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
        assert httpx.get(server.root + "/health").status_code == 503
        refused = httpx.post(server.url + "/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_stopped")
        assert 'lapilli_failures{model="forever"} 1' in httpx.get(server.root + "/metrics").text
        server.terminate()
        assert server.process.wait(30) == 0
        (said,) = [line for line in server.lines if "the models' process has ended" in line]
        assert "(killed by signal 9; the system does so where memory runs out), 1 answers are lost" in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_models_process_outlives_its_server(models, number):
    with serving(f"forever={models / 'endless'}") as server:
        (process,) = children(server.process.pid)
        server.process.send_signal(number)
        server.process.wait(30)
        until(lambda: not runs(process))


@pytest.mark.slow
def test_a_terminal_that_stops_both_lets_answers_end(models):
    """Ctrl-C reaches every process of the terminal, and so does what ends a service."""
    with serving(f"forever={models / 'endless'}") as server:
        (process,) = children(server.process.pid)
        body = {**ASK, "model": "forever", "stream": True, "max_tokens": 300}
        with httpx.stream("POST", server.url + "/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            first_text(lines)
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(process, number)
            server.terminate()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.process.wait(30) == 0


@pytest.mark.slow
def test_what_is_wrong_with_a_folder_is_raised_here(tmp_path):
    with pytest.raises(ModelError, match="nowhere"), open_apart({"it": str(tmp_path / "nowhere")}, Limits()):
        pass


def test_a_process_that_ends_before_it_has_opened_its_models(monkeypatch):
    monkeypatch.setattr(link.sys, "executable", "/bin/false")
    ended = r"has ended \(status 1\) before it had opened some/where"
    with pytest.raises(RunError, match=ended), open_apart({"it": "some/where"}, Limits()):
        pass


@pytest.mark.slow
def test_a_model_whose_engine_ends_loses_its_answers_and_takes_no_more(models):
    made = []
    with open_apart({"parrot": str(models / "parrot")}, Limits(), device="cpu") as opened:
        worker = opened["parrot"].worker
        worker.start(made.extend)
        prompt = opened["parrot"].reader._processor.prompt("?")

        def ask():
            wanted = Wanted(prompt, Decoding(20), lambda _: None)
            worker.want([wanted])
            return wanted

        answered = ask()
        until(lambda: made and isinstance(made[-1][1], Answer))
        assert made[-1][0] is answered
        worker.hear(None, ())  # as the process says it
        assert not worker.alive
        late = ask()
        assert made[-1] == (late, Lost())
        assert worker.failures == 1
        worker.stop()


@pytest.mark.slow
def test_a_models_process_that_fails_ends_though_answers_grow(models):
    made = []
    with open_apart({"forever": str(models / "endless")}, Limits(), device="cpu") as opened:
        worker = opened["forever"].worker
        worker.start(made.extend)
        worker.want([Wanted(opened["forever"].reader._processor.prompt("?"), Decoding(20000), lambda _: None)])
        until(lambda: made)
        worker._link._connection.send("no message")
        until(lambda: not worker.alive)
        until(lambda: made[-1][1] == Lost())


class Stopped:
    """An engine's thread that has ended."""

    alive, active = False, 0

    def start(self, _):
        pass

    def stop(self):
        pass


def test_an_engine_that_ended_is_told_however_many_messages_come():
    ours, theirs = Pipe()
    inbox = SimpleQueue()
    for message in (Left(()), Left(()), None):
        inbox.put(message)
    _Models(theirs, {"it": SimpleNamespace(worker=Stopped())}).run(inbox)
    assert ours.poll(0)
    assert ours.recv() == Made("it", None, ())
    assert not ours.poll(0)  # once
