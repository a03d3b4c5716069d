"""One server process for all tests of a test process, and the same models in this one as the truth."""

import json
from dataclasses import dataclass

import httpx
import pytest
from openai import OpenAI
from tests.support.server_process import ServerProcess, serving
from tests.support.tiny import build_parrot, build_tiny, make_picture

import lapilli

KEY = "sk-a-key-for-tests"
SLOTS, QUEUE = 4, 3


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    build_tiny(folder / "tiny")
    build_parrot(folder / "parrot", " a red dog 음식")
    build_parrot(folder / "endless", " one blue bird", endless=True, positions=1 << 15)
    make_picture(folder / "wide.jpg")
    make_picture(folder / "tall.png", 40, 71, seed=3)
    return folder


@pytest.fixture(scope="session")
def tiny(models):
    """Random: its answers depend on every token and pixel."""
    return lapilli.load(models / "tiny")


@pytest.fixture(scope="session")
def parrot(models):
    return lapilli.load(models / "parrot")


@dataclass
class Api:
    """The server, by the official client and by plain HTTP."""

    server: ServerProcess
    client: OpenAI
    http: httpx.Client

    def post(self, body, **more):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **more.pop("headers", {})}
        return self.http.post("/v1/chat/completions", content=data, headers=headers, **more)

    def metric(self, name):
        """The value of a line of /metrics; 0 if there is none yet."""
        lines = [line for line in self.http.get("/metrics").text.splitlines() if line.startswith(name + " ")]
        return float(lines[0].split()[-1]) if lines else 0.0


@pytest.fixture(scope="session")
def api(models):
    limits = ["--image-pixels", "250000", "--image-bytes", "300000", "--body-bytes", "1000000", "--images", "3"]
    limits += ["--new-tokens", "20000"]
    names = [str(models / "tiny"), str(models / "parrot"), f"forever={models / 'endless'}"]
    with serving(
        *names,
        *("--slots", str(SLOTS), "--queue", str(QUEUE), *limits),
        environment={"LAPILLI_API_KEY": KEY},
    ) as server:
        headers = {"authorization": f"Bearer {KEY}"}
        with (
            OpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=60) as client,
            httpx.Client(base_url=server.root, headers=headers, timeout=60) as http,
        ):
            yield Api(server, client, http)
