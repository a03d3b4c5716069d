"""The moderation hook against a real server that flags, fails, hangs and talks nonsense."""

import asyncio
import json
import logging
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler

import openai
import pytest
from starlette.responses import Response
from tests.support.loopback import loopback
from tests.support.server_process import serving

from lapilli.base.errors import RunError
from lapilli.serve.metrics import Metrics
from lapilli.serve.moderation import Moderated, Moderation, moderation_key
from lapilli.serve.refusal import ApiError
from lapilli.serve.request import ChatRequest

KEY = "sk-moderation"
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((asked, self.headers.get("authorization"), self.client_address))
        status, said = self.server.answer(asked)
        self.send_response(status)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        with suppress(OSError):  # the other side has heard enough
            self.wfile.write(said)

    def log_message(self, *_):
        pass


def judge(asked):
    """Objects to the word "bad" and to every picture."""
    said = json.dumps(asked["input"])
    return 200, json.dumps({"results": [{"flagged": "bad" in said or "image_url" in said}]}).encode()


@contextmanager
def service():
    with loopback(Handler, asked=[], answer=judge) as server:
        server.url = f"{server.root}/v1/moderations"
        yield server


class Model:
    """Stands behind the hook and counts what gets through to it."""

    alive = True

    def __init__(self):
        self.heard = 0

    @asynccontextmanager
    async def life(self, metrics):
        yield

    async def complete(self, body, request):
        self.heard += 1
        return Response("answer")

    async def cards(self):
        return []

    def gauges(self):
        return {}


def ask(moderation, *contents):
    """What the hook says to each question in turn: 200 or the refusal's (status, code); the model; the metrics."""

    async def work():
        model, metrics, said = Model(), Metrics(), []
        moderated = Moderated(model, moderation)
        async with moderated.life(metrics):
            for content in contents:
                messages = (
                    content
                    if isinstance(content, list) and "role" in content[0]
                    else [{"role": "user", "content": content}]
                )
                try:
                    made = await moderated.complete(
                        ChatRequest.model_validate({"model": "m", "messages": messages}), None
                    )
                    said.append(made.status_code)
                except ApiError as error:
                    said.append((error.status, error.code))
        return said, model, metrics.text({})

    return asyncio.run(work())


def test_what_is_flagged_does_not_reach_the_model():
    with service() as server:
        said, model, metrics = ask(Moderation(server.url, key=KEY), "a good day", "a bad day", "good again")
        assert said == [200, (400, "content_filter"), 200]
        assert model.heard == 2
        assert [key for _, key, _ in server.asked] == [f"Bearer {KEY}"] * 3
        assert len({address for *_, address in server.asked}) == 1  # one connection for all
    assert 'lapilli_moderation_total{result="flagged"} 1' in metrics
    assert 'lapilli_moderation_total{result="passed"} 2' in metrics


def test_quotes_and_line_breaks_hide_nothing():
    """The original built its JSON by hand, which a quote broke: then nothing was flagged."""
    hiding = ['"bad', 'bad"}', 'x\n"bad"\r\n\\', "\\u0022bad", "음식 bad 🙂", "'bad'\0"]
    with service() as server:
        said, model, _ = ask(Moderation(server.url), *hiding)
        assert said == [(400, "content_filter")] * len(hiding)
        assert [asked["input"] for asked, *_ in server.asked] == hiding
    assert model.heard == 0


def test_the_newest_question_is_asked_about_and_pictures_where_wanted():
    talk = [{"role": "system", "content": "bad"}, {"role": "user", "content": "earlier"},
            {"role": "assistant", "content": "bad"}, {"role": "user", "content": "now"}]  # fmt: skip
    parts = [{"type": "text", "text": "one"}, PICTURE, {"type": "text", "text": "two"}]
    with service() as server:
        said, _, _ = ask(Moderation(server.url, model="omni"), talk, parts, [PICTURE], "  ")
        assert said == [200] * 4
        assert [asked for asked, *_ in server.asked] == [
            {"input": "now", "model": "omni"}, {"input": "one\ntwo", "model": "omni"},
        ]  # fmt: skip
        said, _, _ = ask(Moderation(server.url, images=True), parts, [PICTURE], "plain")
        assert said == [(400, "content_filter")] * 2 + [200]
        assert server.asked[2][0]["input"] == [{"type": "text", "text": "one\ntwo"}, PICTURE]


FAILURES = {
    "an error": lambda _: (500, b"{}"),
    "a refusal": lambda _: (401, b"{}"),
    "a redirect": lambda _: (302, b""),
    "no JSON": lambda _: (200, b"<html>"),
    "other JSON": lambda _: (200, b'{"results": "none"}'),
    "no results": lambda _: (200, b'{"results": []}'),
    "no verdict": lambda _: (200, b'{"results": [{"flagged": "no"}]}'),
    "a list": lambda _: (200, b"[]"),
    "no text": lambda _: (200, b"\xff\xff"),
    "too much": lambda _: (200, b" " * (2 << 20) + b'{"results": [{"flagged": false}]}'),
}


def test_without_a_verdict_nothing_is_answered_unless_that_is_wanted(caplog):
    with service() as server, caplog.at_level(logging.INFO, logger="lapilli.serve.moderation"):
        words, count = ["secret words"] * len(FAILURES), len(FAILURES)
        answers = iter([*FAILURES.values()] * 2)
        server.answer = lambda asked: next(answers)(asked)
        said, model, metrics = ask(Moderation(server.url, key=KEY), *words)
        assert dict(zip(FAILURES, said, strict=True)) == dict.fromkeys(FAILURES, (503, "moderation_unavailable"))
        assert model.heard == 0
        assert f'lapilli_moderation_total{{result="unavailable"}} {count}' in metrics
        assert ask(Moderation(server.url, optional=True), *words)[0] == [200] * count
    assert caplog.text.count("can't be asked") == 2 * count
    assert KEY not in caplog.text
    assert "secret" not in caplog.text


def test_a_service_that_hangs_or_is_gone():
    with service() as server:
        server.answer = lambda asked: time.sleep(5) or judge(asked)
        begun = time.monotonic()
        assert ask(Moderation(server.url, seconds=0.2), "words")[0] == [(503, "moderation_unavailable")]
        assert time.monotonic() - begun < 4
    assert ask(Moderation(server.url), "words")[0] == [(503, "moderation_unavailable")]


def test_addresses_and_keys():
    for url in ("", "moderations", "ftp://host/x", "http://", "https://me:secret@host/v1", "http://[::1/"):
        with pytest.raises(RunError, match="--moderation-url") as caught:
            Moderation(url)
        assert "secret" not in str(caught.value)
    with pytest.raises(RunError, match="in the clear"):
        Moderation("http://10.0.0.1/v1/moderations", key="k")
    assert KEY not in repr(Moderation("https://host/v1/moderations", key=KEY))
    assert moderation_key({"LAPILLI_MODERATION_KEY": " k "}) == "k"
    assert moderation_key({"LAPILLI_MODERATION_KEY": ""}) is None


@pytest.mark.slow
def test_a_server_with_the_hook(models):
    with (
        service() as judging,
        serving(
            str(models / "parrot"), "--moderation-url", judging.url, environment={"LAPILLI_MODERATION_KEY": KEY}
        ) as server,
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        words = [{"role": "user", "content": "good"}]
        made = client.chat.completions.create(model="parrot", messages=words, temperature=0)
        assert made.choices[0].message.content == "a red dog 음식"
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "bad"}], stream=True)
        assert caught.value.code == "content_filter"
        log = "\n".join(server.lines)
        assert KEY not in log
