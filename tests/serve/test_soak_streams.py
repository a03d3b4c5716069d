"""Sixty-four clients that stream for minutes: nobody meets an error, and the server's memory stays as it was.

`benchmarks/stream_clients.py` is the clients, in a process of its own; `make soak` runs the five minutes.
"""

import base64
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from tests.support.server_process import serving
from tests.support.tiny import build_parrot, make_picture

CLIENTS = Path(__file__).parents[2] / "benchmarks" / "stream_clients.py"
MANY = 64
WARM_SECONDS = 5


def requests_for(folder):
    """Forty bodies; every fourth shows a picture, each another one."""
    lines = []
    for i in range(40):
        content = f"Question {'very ' * (i % 7)}{i}?"
        if i % 4 == 0:
            picture = base64.b64encode(make_picture(folder / f"{i}.jpg", 93 + i, 57, seed=i).read_bytes()).decode()
            url = {"url": f"data:image/jpeg;base64,{picture}"}
            content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": content}]
        asked = {"model": "endless", "messages": [{"role": "user", "content": content}], "max_tokens": 20 + i % 9}
        lines.append(json.dumps(asked | {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}))
    path = folder / "requests.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def stream_for(seconds, folder):
    """What the clients met, and how many files the server held open before them and after."""
    build_parrot(folder / "endless", " one blue bird", endless=True)
    with serving(str(folder / "endless"), "--slots", str(MANY)) as server:
        pid = server.process.pid

        def files():
            return len(list(Path(f"/proc/{pid}/fd").iterdir()))

        assert httpx.get(server.root + "/health").status_code == 200
        before = files()
        port = server.root.rpartition(":")[2]
        command = [sys.executable, str(CLIENTS), port, str(requests_for(folder)), "--clients", str(MANY)]
        command += ["--seconds", str(seconds), "--warm-seconds", str(WARM_SECONDS), "--pid", str(pid)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        until = time.monotonic() + 5
        while files() > before + 2 and time.monotonic() < until:
            time.sleep(0.1)
        numbers = httpx.get(server.root + "/metrics").text
        assert 'lapilli_active{model="endless"} 0' in numbers
        assert 'lapilli_failures{model="endless"} 0' in numbers
        assert files() <= before + 2  # the event loop's own
        assert "Traceback" not in "\n".join(server.lines)
    return json.loads(done.stdout)


def grown(memory):
    """How much more there is at the end than at the beginning, as a part of it."""
    part = max(1, len(memory) // 10)
    return statistics.median(memory[-part:]) / statistics.median(memory[:part]) - 1


@pytest.mark.slow
def test_twenty_seconds(tmp_path):
    """The short form; what memory a process takes in its first seconds says less than five minutes do."""
    found = stream_for(15, tmp_path)
    assert found["errors"] == 0, found["first_errors"]
    assert found["answers"] >= MANY
    assert grown(found["memory"]) < 0.15


@pytest.mark.slow
@pytest.mark.soak
def test_five_minutes(tmp_path):
    found = stream_for(300, tmp_path)
    assert found["errors"] == 0, found["first_errors"]
    assert found["answers"] >= 20 * MANY
    assert abs(grown(found["memory"])) < 0.05, [round(m / 2**20) for m in found["memory"][::10]]
