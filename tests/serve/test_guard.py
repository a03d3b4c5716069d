"""Each bound of the guard, in front of an application that says what reached it."""

import asyncio
import json

import httpx
import pytest

from lapilli.serve.guard import Guard
from lapilli.serve.metrics import Metrics
from lapilli.serve.settings import Keys, Limits

JSON = {"content-type": "application/json"}


class Echo:
    """Answers with the body's length; holds the answer back while `hold` is unset."""

    def __init__(self):
        self.calls = 0
        self.hold = asyncio.Event()
        self.hold.set()

    async def __call__(self, scope, receive, send):
        self.calls += 1
        message = await receive()
        await self.hold.wait()
        said = str(len(message["body"])).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": said})


def guarded(limits=None, keys=(), host="localhost"):
    echo = Echo()
    guard = Guard(echo, Keys.of(keys), limits or Limits(), Metrics())
    return echo, httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url=f"http://{host}:8000")


async def pieces(*sizes, pause=0.0):
    for size in sizes:
        yield b"x" * size
        await asyncio.sleep(pause)


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1", 200), ("[::1]", 200), ("rebound.example", 403), ("192.168.0.9", 403)],
)
def test_names_of_this_machine(host, status):
    """Without a key, a name that someone else's DNS points here is not answered to."""

    async def ask():
        _, client = guarded(host=host)
        return (await client.get("/v1/models")).status_code

    assert asyncio.run(ask()) == status


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer b", "Basic a", "Bearer a2", "bearer a", "Bearer \xe9"])
def test_keys(given):
    async def ask():
        echo, client = guarded(keys=("a", "c"), host="rebound.example")
        headers = httpx.Headers([(b"authorization", given.encode("latin-1"))])
        made = await client.post("/v1/chat/completions", headers=[*headers.raw, (b"content-type", b"application/json")])
        return made, echo.calls

    made, calls = asyncio.run(ask())
    assert (made.status_code, calls) == ((200, 1) if given == "bearer a" else (401, 0))
    if calls == 0:
        assert made.json()["error"]["code"] == "invalid_api_key"


def test_bodies():
    async def ask():
        limits = Limits(body_bytes=1000, body_seconds=0.2)
        echo, client = guarded(limits)
        made = {
            "small": await client.post("/v1/x", content=b"x" * 1000, headers=JSON),
            "large": await client.post("/v1/x", content=b"x" * 1001, headers=JSON),
            "large in pieces": await client.post("/v1/x", content=pieces(600, 600, 600), headers=JSON),
            "slow": await client.post("/v1/x", content=pieces(1, 1, 1, pause=0.15), headers=JSON),
            "not JSON": await client.post("/v1/x", content=b"x"),
            "a body with GET": await client.request("GET", "/v1/x", content=b"x"),
        }
        return {name: one.status_code for name, one in made.items()}, echo.calls

    statuses, calls = asyncio.run(ask())
    expected = {"small": 200, "large": 413, "large in pieces": 413, "slow": 408, "not JSON": 415}
    assert statuses == {**expected, "a body with GET": 413}
    assert calls == 1


def test_bodies_together():
    """What all requests hold is bounded too, and what is answered is no longer held."""

    async def ask():
        echo, client = guarded(Limits(held_bytes=1500))
        echo.hold.clear()
        first = asyncio.create_task(client.post("/v1/x", content=b"x" * 1000, headers=JSON))
        await asyncio.sleep(0.05)
        second = await client.post("/v1/x", content=b"x" * 1000, headers=JSON)
        echo.hold.set()
        await first
        third = await client.post("/v1/x", content=b"x" * 1000, headers=JSON)
        return second, third

    second, third = asyncio.run(ask())
    assert (second.status_code, second.headers["retry-after"], third.status_code) == (429, "1", 200)


def test_rate():
    async def ask():
        _, client = guarded(Limits(requests_per_minute=3), keys=("a", "b"))
        made = [await client.get("/v1/models", headers={"authorization": f"Bearer {k}"}) for k in "aaaab"]
        return made, await client.get("/health")

    made, health = asyncio.run(ask())
    assert [m.status_code for m in made] == [200, 200, 200, 429, 200]
    assert 19 <= int(made[3].headers["retry-after"]) <= 20
    assert json.loads(made[3].content)["error"]["code"] == "rate_limit_exceeded"
    assert health.status_code == 200


def test_rate_of_addresses_where_there_are_no_keys():
    """What a header says of the caller does not count."""

    async def ask():
        guard = Guard(Echo(), Keys(), Limits(requests_per_minute=2), Metrics())
        made = []
        for address, number in (("127.0.0.1", 1), ("127.0.0.1", 2), ("127.0.0.1", 3), ("127.0.0.5", 4)):
            transport = httpx.ASGITransport(guard, client=(address, number))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                told = {"x-forwarded-for": f"10.0.0.{number}"}
                made.append((await client.get("/v1/models", headers=told)).status_code)
        return made

    assert asyncio.run(ask()) == [200, 200, 429, 200]
