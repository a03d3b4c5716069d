"""The API as its users meet it: OpenAI's own client, unchanged, against a real server."""

import base64
import json
import math
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from tests.support.waiting import until

from lapilli.generate.decoding import Decoding

KEY, SLOTS, QUEUE = "sk-a-key-for-tests", 4, 3
"""As in conftest.py."""
ASK = [{"role": "user", "content": "What is it?"}]


def data_url(path):
    kind = {"jpg": "jpeg"}.get(path.suffix[1:], path.suffix[1:])
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def image(path):
    return {"type": "image_url", "image_url": {"url": data_url(path), "detail": "auto"}}


def text(words):
    return {"type": "text", "text": words}


def test_chat(api, parrot):
    made = api.client.chat.completions.create(model="parrot", messages=ASK, temperature=0)
    choice = made.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "a red dog 음식",
        "stop",
    )
    answer = parrot.answer("What is it?")
    assert made.usage.prompt_tokens == answer.prompt_tokens
    assert made.usage.completion_tokens == len(answer.token_ids)
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    assert made.model == "parrot"
    assert made.id.startswith("chatcmpl-")


def test_a_conversation_goes_on_with_what_was_returned(api, tiny):
    turns = [{"role": "system", "content": "Be brief."}, *ASK]
    first = api.client.chat.completions.create(model="tiny", messages=turns, temperature=0, max_tokens=6)
    again = [*turns, first.choices[0].message, {"role": "user", "content": [text("Why"), text("?")]}]
    if not first.choices[0].message.content:
        pytest.fail("the tiny model said nothing; choose another question")
    second = api.client.chat.completions.create(model="tiny", messages=again, temperature=0, max_tokens=6)
    said = {"role": "assistant", "content": first.choices[0].message.content}
    expected = tiny.generate([*turns, said, {"role": "user", "content": "Why?"}], max_new_tokens=6)
    assert second.choices[0].message.content == expected


def test_pictures_in_their_places(api, tiny, models):
    wide, tall = models / "wide.jpg", models / "tall.png"
    for order in ((wide, tall), (tall, wide)):
        parts = [text("First "), image(order[0]), text(" then "), image(order[1]), text(" differ?")]
        made = api.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=10
        )
        local = [text("First "), {"type": "image", "image": order[0]}, text(" then "),
                 {"type": "image", "image": order[1]}, text(" differ?")]  # fmt: skip
        answer = tiny.answer([{"role": "user", "content": local}], decoding=Decoding(10))
        assert made.choices[0].message.content == answer.text
        assert made.usage.prompt_tokens == answer.prompt_tokens


def test_stream(api):
    with api.client.chat.completions.create(
        model="parrot", messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks[:-1]]
    assert "".join(pieces) == "a red dog 음식"
    assert sum(map(bool, pieces)) >= 3
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens >= 4
    assert len({c.id for c in chunks}) == 1


def test_stream_on_the_wire(api):
    made = api.post({"model": "parrot", "messages": ASK, "stream": True, "temperature": 0})
    assert made.headers["content-type"].startswith("text/event-stream")
    events = made.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(e.removeprefix("data: "))["object"] == "chat.completion.chunk" for e in events[:-2])


def test_each_answer_is_the_one_it_gets_alone(api, tiny, models):
    """Twelve at a time in four slots, drawn with seeds, streamed and not, pictures among them."""

    def ask(number):
        words = f"Question {'very ' * (number % 5)}{number}?"
        content = [image(models / "wide.jpg"), text(words)] if number % 3 == 0 else words
        options = {"temperature": 0.9, "seed": number, "top_p": 0.9, "max_tokens": 8 + number % 4}
        messages = [{"role": "user", "content": content}]
        while True:
            try:
                if number % 2:
                    with api.client.chat.completions.create(
                        model="tiny", messages=messages, stream=True, **options
                    ) as stream:
                        return "".join(c.choices[0].delta.content or "" for c in stream)
                made = api.client.chat.completions.create(model="tiny", messages=messages, **options)
                return made.choices[0].message.content
            except openai.RateLimitError:
                time.sleep(0.05)

    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, range(12)))
    alone = []
    for number in range(12):
        words = f"Question {'very ' * (number % 5)}{number}?"
        content = [{"type": "image"}, text(words)] if number % 3 == 0 else words
        pictures = [models / "wide.jpg"] if number % 3 == 0 else None
        alone.append(
            tiny.generate(
                [{"role": "user", "content": content}],
                pictures,
                8 + number % 4,
                temperature=0.9,
                top_p=0.9,
                seed=number,
            )
        )
    assert together == alone


def test_several_answers(api, tiny):
    made = api.client.chat.completions.create(
        model="tiny", messages=ASK, n=3, seed=7, temperature=1.3, max_tokens=8, extra_body={"top_k": 50}
    )
    expected = [tiny.answer("What is it?", decoding=Decoding(8, 1.3, seed=7 + i, top_k=50)) for i in range(3)]
    assert [c.message.content for c in made.choices] == [a.text for a in expected]
    assert [c.index for c in made.choices] == [0, 1, 2]
    assert made.usage.completion_tokens == sum(len(a.token_ids) for a in expected)
    with api.client.chat.completions.create(
        model="tiny", messages=ASK, n=3, seed=7, temperature=1.3, max_tokens=8, stream=True, extra_body={"top_k": 50}
    ) as stream:
        texts = ["", "", ""]
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [a.text for a in expected]


def test_stop_and_length(api):
    made = api.client.chat.completions.create(model="parrot", messages=ASK, stop=[" dog", "never"], temperature=0)
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == ("a red", "stop")
    made = api.client.chat.completions.create(model="forever", messages=ASK, max_completion_tokens=6, temperature=0)
    assert made.choices[0].finish_reason == "length"
    assert made.usage.completion_tokens == 6


def test_logprobs(api, tiny):
    options = {"temperature": 0, "max_tokens": 7, "logprobs": True, "top_logprobs": 3}
    made = api.client.chat.completions.create(model="tiny", messages=ASK, **options)
    answer = tiny.answer("What is it?", decoding=Decoding(7, logprobs=3))
    special = set(tiny.tokenizer.all_special_ids)
    expected = [one for one in answer.logprobs if one.token_id not in special]
    told = made.choices[0].logprobs.content
    assert [t.logprob for t in told] == pytest.approx([e.logprob for e in expected], abs=1e-4)
    assert all(len(t.top_logprobs) == 3 and t.logprob <= 0 for t in told)
    assert all(math.isclose(t.top_logprobs[0].logprob, t.logprob, abs_tol=1e-4) for t in told)  # greedy
    with api.client.chat.completions.create(model="tiny", messages=ASK, stream=True, **options) as stream:
        parts = [c.choices[0].logprobs.content for c in stream if c.choices[0].logprobs]
    assert [t.token for part in parts for t in part] == [t.token for t in told]
    spelt = api.client.chat.completions.create(model="parrot", messages=ASK, temperature=0, logprobs=True)
    tokens = spelt.choices[0].logprobs.content
    whole = b"".join(bytes(t.bytes) for t in tokens if t.bytes is not None).decode()
    assert whole.strip() in ("a red dog 음식", "a red dog")  # bytes of a character in several tokens are none's own


def test_models(api):
    assert [m.id for m in api.client.models.list()] == ["tiny", "parrot", "forever"]
    assert api.client.models.retrieve("forever").owned_by == "lapilli"
    with pytest.raises(openai.NotFoundError):
        api.client.models.retrieve("other")


def test_only_this_machine_is_listened_to(api):
    host, port = api.server.root.removeprefix("http://").split(":")
    assert host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):  # any other address of this machine stands for the outside
        socket.create_connection(("127.0.0.2", int(port)), 5)


def test_keys(api):
    client = api.client.with_options(api_key="sk-another")
    with pytest.raises(openai.AuthenticationError, match="wrong API key"):
        client.chat.completions.create(model="parrot", messages=ASK)
    for path, status in (("/health", 200), ("/metrics", 401), ("/v1/models", 401), ("/openapi.json", 401)):
        assert api.http.get(path, headers={"authorization": ""}).status_code == status, path


BAD = {
    "another model": ({"model": "parot"}, 404, "model", "model_not_found"),
    "no messages": ({"messages": []}, 400, "messages", None),
    "an unknown field": ({"temperatur": 1}, 400, "temperatur", "unknown_parameter"),
    "a field that is not served": ({"tools": [{"type": "function"}]}, 400, None, None),
    "a value out of bounds": ({"temperature": 3}, 400, "temperature", None),
    "not a number": ({"temperature": float("nan")}, 400, "temperature", None),
    "too long an answer": ({"max_tokens": 50000}, 400, "max_tokens", None),
    "too many answers": ({"n": SLOTS + QUEUE + 1}, 400, "n", None),
    "another role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", None),
    "no question": ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages", None),
    "an answer last": ({"messages": [*ASK, {"role": "assistant", "content": "x"}]}, 400, "messages", None),
    "a prompt that does not fit": (
        {"messages": [{"role": "user", "content": "very " * 2000}]},
        400,
        "messages",
        "context_length_exceeded",
    ),
    "a picture's mark": ({"messages": [{"role": "user", "content": "<image> x"}]}, 400, "messages.0.content", None),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages.0.content", None),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(api, case):
    change, status, param, code = BAD[case]
    made = api.post({"model": "parrot", "messages": ASK} | change)
    error = made.json()["error"]
    assert (made.status_code, error["param"], error["code"]) == (status, param, code), error
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def pixels(width, height):
    import io

    import PIL.Image

    made = io.BytesIO()
    PIL.Image.new("L", (width, height)).save(made, "PNG")
    return "data:image/png;base64," + base64.b64encode(made.getvalue()).decode()


PICTURES = {
    "an address": ("https://example.com/cat.png", 400, "image_url_refused"),
    "a file": ("file:///etc/passwd", 400, "image_url_refused"),
    "a path": ("/etc/passwd", 400, "image_url_refused"),
    "not base64": ("data:image/png;base64,%%%", 400, "invalid_image"),
    "not a picture": ("data:image/png;base64," + base64.b64encode(b"<svg/>").decode(), 400, "invalid_image"),
    "nothing": ("data:image/png;base64,", 400, "invalid_image"),
    "text": ("data:text/plain;base64,aGk=", 400, "invalid_image"),
    "too many pixels": (pixels(600, 600), 400, "invalid_image"),
    "too many bytes": ("data:image/png;base64," + "A" * 410_000, 413, "image_too_large"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_refused_pictures(api, case):
    url, status, code = PICTURES[case]
    parts = [text("x"), {"type": "image_url", "image_url": {"url": url}}]
    made = api.post({"model": "parrot", "messages": [{"role": "user", "content": parts}]})
    assert (made.status_code, made.json()["error"]["code"]) == (status, code), made.text
    assert made.json()["error"]["param"] == "messages.0.content.1"
    assert "/etc" not in made.text


def test_too_many_pictures(api, models):
    parts = [image(models / "wide.jpg")] * 4
    with pytest.raises(openai.BadRequestError, match="4 pictures; this server takes 3"):
        api.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}])


def test_refused_bodies(api):
    assert api.post(b"{").json()["error"]["code"] == "invalid_json"
    assert api.post(b"[" * 100_000).status_code == 400
    assert api.post(b"\xff").status_code == 400
    assert api.post(b"").status_code == 400
    assert api.post(b"{}", headers={"content-type": "text/plain"}).status_code == 415
    with pytest.raises(openai.APIStatusError) as caught:
        api.client.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "x" * 1_100_000}])
    assert caught.value.status_code == 413
    assert api.http.get("/v1/chat/completions").status_code == 405
    assert api.http.get("/none").json()["error"]["code"] == "not_found"


def test_a_full_queue_and_clients_that_leave(api):
    active, waiting = 'lapilli_active{model="forever"}', 'lapilli_waiting{model="forever"}'
    ask = {"model": "forever", "messages": ASK, "stream": True, "temperature": 0}
    until(lambda: api.metric(waiting) == 0, 5)
    streams = [api.client.chat.completions.create(**ask) for _ in range(SLOTS + QUEUE)]
    try:
        until(lambda: api.metric(active) == SLOTS and api.metric(waiting) == QUEUE, 5)
        with pytest.raises(openai.RateLimitError) as caught:
            api.client.chat.completions.create(**ask)
        assert caught.value.code == "queue_full"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        streams.pop().close()  # one that waits
        until(lambda: api.metric(waiting) == QUEUE - 1, 1)
        made = api.client.chat.completions.create(model="parrot", messages=ASK, temperature=0)
        assert made.choices[0].message.content == "a red dog 음식"  # other models are not held up
    finally:
        for stream in streams:
            stream.close()
    until(lambda: api.metric(active) == 0 and api.metric(waiting) == 0, 1)
    with pytest.raises(openai.APITimeoutError):  # a client that leaves without having streamed
        api.client.with_options(timeout=0.3).chat.completions.create(model="forever", messages=ASK)
    until(lambda: api.metric(active) == 0, 1)


def test_metrics(api):
    before = api.metric('lapilli_answers_total{finish="stop",model="parrot"}')
    made = api.client.chat.completions.create(model="parrot", messages=ASK, temperature=0)
    assert api.metric('lapilli_answers_total{finish="stop",model="parrot"}') == before + 1
    assert api.metric('lapilli_completion_tokens_total{model="parrot"}') >= made.usage.completion_tokens
    assert api.metric('lapilli_first_token_seconds_count{model="parrot"}') >= 1
    api.http.get("/a-path-of-the-user")
    page = api.http.get("/metrics").text
    assert 'lapilli_http_requests_total{path="other",status="404"}' in page
    assert "a-path-of" not in page


def test_the_log_holds_neither_keys_nor_contents(api, models):
    api.post({"model": "parrot", "messages": [{"role": "user", "content": "unmistakable"}]})
    for picture in (data_url(models / "wide.jpg"), "data:image/png;base64,dW5taXN0YWthYmxl"):
        parts = [text("unmistakable"), {"type": "image_url", "image_url": {"url": picture}}]
        api.post({"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 1})
    api.http.get("/v1/models/unmistakable?key=unmistakable", headers={"x-name": "unmistakable"})
    until(lambda: any("/v1/chat/completions 200" in line for line in api.server.lines), 5)
    log = "\n".join(api.server.lines)
    assert KEY not in log
    assert "unmistakable" not in log
    assert "base64" not in log
    assert "dW5ta" not in log
    assert "Traceback" not in log
