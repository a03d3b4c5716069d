"""The process: how it starts, and how it ends."""

import json
import subprocess
import sys
import threading
import time

import httpx
import pytest
from tests.support.server_process import serving

ASK = {"messages": [{"role": "user", "content": "?"}], "temperature": 0}


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "lapilli.cli", "serve", *arguments], capture_output=True, text=True, check=False
    )


def test_other_machines_need_a_key():
    done = run("nothing", "--host", "0.0.0.0")
    assert (done.returncode, done.stdout) == (1, "")
    assert "give it a key" in done.stderr


@pytest.mark.slow
def test_drain(models):
    """Asked to stop, a server ends what is under way, takes nothing new, and leaves with status 0."""
    arguments = [f"forever={models / 'endless'}", f"parrot={models / 'parrot'}", "--slots", "1"]
    with serving(*arguments) as server:
        assert httpx.get(server.root + "/health").json() == {"status": "ok"}  # no key, for none is set
        lines: list[str] = []
        begun = threading.Event()

        def stream(tokens):
            body = {**ASK, "model": "forever", "stream": True, "max_tokens": tokens}
            with httpx.stream("POST", server.url + "/chat/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    if len(lines) > 20:
                        begun.set()

        threads = [threading.Thread(target=stream, args=(tokens,)) for tokens in (1200, 1200)]  # one waits
        for thread in threads:
            thread.start()
        assert begun.wait(20)
        server.terminate()
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.root + "/health")
        for thread in threads:
            thread.join(30)
        assert server.process.wait(30) == 0, server.lines
        assert lines.count("data: [DONE]") == 2
        assert "Traceback" not in "\n".join(server.lines)


@pytest.mark.slow
def test_time_limit(models):
    """A request that takes too long is told so, and its slot is free."""
    with serving(f"forever={models / 'endless'}", "--request-seconds", "0.4") as server:
        body = {**ASK, "model": "forever", "max_tokens": 2048}
        made = httpx.post(server.url + "/chat/completions", json=body, timeout=30)
        assert (made.status_code, made.json()["error"]["code"]) == (504, "timeout")
        streamed = httpx.post(server.url + "/chat/completions", json=body | {"stream": True}, timeout=30)
        last = streamed.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        until = time.monotonic() + 1
        while 'lapilli_active{model="forever"} 0' not in httpx.get(server.root + "/metrics").text:
            assert time.monotonic() < until, "the slot is not free"
            time.sleep(0.1)
        server.terminate()
        assert server.process.wait(30) == 0  # nothing grows, so the 60 s for answers under way are not waited for
