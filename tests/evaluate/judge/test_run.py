"""Judging against a server that fails as real ones do, killed and gone on with, within pace and cost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from tests.evaluate.judge.conftest import QUICK
from tests.support.judge_server import Says, error, judging
from typer.testing import CliRunner

from lapilli.base.errors import DataError, RecipeError
from lapilli.cli.main import app
from lapilli.evaluate.judge.endpoint import Endpoint
from lapilli.evaluate.judge.prompt import Asking
from lapilli.evaluate.judge.spending import Price, choose_price, count_tokens
from lapilli.evaluate.judge.summary import summarise

GOOD = Says("7 9\nFine.")


def test_reviews_are_in_the_originals_form_and_every_reply_is_kept(bench):
    with judging(GOOD) as server:
        made = bench.run(server)
    assert (made.answered, made.known, made.retries, made.failed) == (3, 0, 0, [])
    line = bench.reviews()[0]
    assert {k: line[k] for k in line if k != "metadata"} == {
        "id": 1,
        "question_id": 0,
        "answer1_id": "r0",
        "answer2_id": "o0",
        "category": "llava_bench_conv",
        "content": "7 9\nFine.",
        "tuple": [7.0, 9.0],
    }
    assert [json.loads(reply["raw"])["choices"][0]["message"]["content"] for reply in bench.replies()] == [
        "7 9\nFine."
    ] * 3
    assert (made.read, made.written) == (300, 60)


PASSING = [
    (error(429, "slow down"), "HTTP 429: slow down"),
    (error(429, headers={"Retry-After": "0"}), "HTTP 429"),
    (error(429, headers={"Retry-After": "soon"}), "HTTP 429"),
    (error(500), "HTTP 500"),
    (Says(status=502, body="<html>Bad gateway</html>"), "HTTP 502: <html>Bad gateway"),
    (error(503), "HTTP 503"),
    (error(529), "HTTP 529"),
    (error(408), "HTTP 408"),
    (Says(silent=True), "connection failed"),
    (Says(cut=0), "connection failed"),
    (Says(cut=40), "connection failed"),
    (Says(body='{"choices": [{"mess'), "not JSON"),
    (Says(body=""), "not JSON"),
    (Says(body="[" * 100_000), "not JSON"),
    (Says(body="[]"), "no chat completion"),
    (Says(body='{"choices": []}'), "no chat completion"),
    (Says(body='{"error": {"message": "overloaded"}}'), "overloaded"),
    (Says(body='{"choices": [{"text": "8 7"}]}'), "no message"),
    (Says(delay=0.6), "no answer within"),
    (Says(drip=0.05), "not complete in time"),
]
"""Troubles that pass, and what is written down of them."""


def test_what_passes_is_asked_again(bench):
    bench.make(len(PASSING))
    said = [says for trouble, _ in PASSING for says in (trouble, GOOD)]
    with judging(said) as server:
        made = bench.run(server, patience=replace(QUICK, timeout_seconds=0.4))
    assert (made.answered, made.retries, made.failed) == (len(PASSING), len(PASSING), [])
    replies = bench.replies()
    assert [reply["outcome"] for reply in replies] == ["again", "answered"] * len(PASSING)
    for reply, (_, reason) in zip(replies[::2], PASSING, strict=True):
        assert reason in reply["reason"]
    assert all(review["metadata"]["scores"] == [7, 9] for review in bench.reviews())


def test_half_a_surrogate_pair_is_sent_and_received(bench):
    bench.make(1)
    bench.write("ours.jsonl", [{"question_id": 0, "text": "half \ud83d"}])
    with judging(Says("8 7\n\ud83d")) as server:
        made = bench.run(server)
        assert bench.run(server).answered == 0
    assert made.answered == 1
    assert "half \ud83d" in server.contents()[0]
    assert bench.reviews()[0]["content"] == "8 7\n?"


def test_attempts_are_bounded_and_the_next_run_asks_again(bench):
    with judging(lambda body, number: error(500) if "What is it, 1?" in str(body) else GOOD) as server:
        made = bench.run(server)
        assert (made.answered, len(made.failed)) == (2, 1)
        assert len(server.asked) == 2 + QUICK.attempts
    assert "gave up after 4 attempts" in made.failed[0][1]
    assert "1 requests have no reply" in summarise(made.path, "official").notes[0]
    with judging(GOOD) as server:
        again = bench.run(server)
        assert (again.known, again.answered, len(server.asked)) == (2, 1, 1)
    assert summarise(made.path, "official").notes == ()


@pytest.mark.parametrize("header", ["date", "milliseconds"])
def test_a_wait_that_the_server_asks_for_is_kept(bench, header):
    bench.make(1)
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)  # whole seconds: 1 to 2 from now
    headers = {"date": {"Retry-After": when}, "milliseconds": {"retry-after-ms": "400"}}
    with judging([error(429, headers=headers[header]), GOOD]) as server:
        bench.run(server)
    assert server.times[1] - server.times[0] > 0.38


def test_a_wait_is_kept_by_all_at_once(bench):
    bench.make(6)
    with judging([error(429, headers={"Retry-After": "1"}, delay=0.0), GOOD]) as server:
        bench.run(server, concurrency=3)
    late = [t - server.times[0] for t in server.times]
    assert sum(t < 0.5 for t in late) <= 3 + 1
    assert max(late) > 0.9


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (error(401, "Incorrect API key provided: sk-se*******1234."), "HTTP 401"),
        (error(404, "no such model"), "no such model"),
        (error(429, "You exceeded your current quota", "insufficient_quota"), "exceeded your current quota"),
        (error(429, headers={"Retry-After": "3600"}), "asks to wait 3,600 s"),
        (error(400, "Unsupported parameter: 'max_tokens'", "unsupported_parameter"), "--limit-field"),
        (Says(status=307, body="", headers={"Location": "http://example.invalid/"}), "redirects are not followed"),
    ],
)
def test_what_never_passes_ends_the_run_at_once(bench, trouble, said):
    with judging(trouble) as server:
        made = bench.run(server)
        assert len(server.asked) == 1
    assert said in made.ended
    assert (made.unasked, made.answered) == (3, 0)


def test_a_request_that_is_refused_does_not_stop_the_others(bench):
    blocked = error(400, "The response was filtered", "content_filter")
    with judging(lambda body, number: blocked if "What is it, 0?" in str(body) else GOOD) as server:
        made = bench.run(server)
        assert len(server.asked) == 3
    assert (made.answered, made.ended) == (2, None)
    assert "filtered" in made.failed[0][1]


def test_a_server_that_is_gone_is_not_asked_for_ever(bench):
    bench.make(20)
    with judging(GOOD) as server:
        pass
    made = bench.run(server)
    assert len(made.failed) == 5
    assert "5 requests one behind the other" in made.ended
    assert made.unasked == 15


SCORELESS = [
    (Says(""), "empty reply"),
    (Says(None), "empty reply"),
    (Says(None, finish="content_filter"), "refused by the judge"),
    (Says("", refusal="I can't"), "refused by the judge"),
    (Says("Let me", finish="length"), "no two scores, cut by the token limit"),
    (Says("Both are good."), "no two scores"),
    (Says("95 80"), "scores outside 0 to 10"),
]
"""Replies without scores, and why."""


def test_replies_without_scores_are_counted_and_in_no_mean(bench):
    bench.make(len(SCORELESS) + 2)
    with judging([*(says for says, _ in SCORELESS), GOOD]) as server:
        made = bench.run(server)
        assert len(server.asked) == len(SCORELESS) + 2  # a reply is a reply: none is asked for again
    reasons = dict(Counter(reason for _, reason in SCORELESS))
    assert dict(made.unreadable) == reasons
    table = summarise(made.path, "official")
    rows = {row.name: (row.first, row.second, row.questions) for row in table.rows}
    assert rows["all"] == (70.0, 90.0, 2)
    assert (table.unreadable, table.left_out) == (reasons, len(SCORELESS))
    original = {row.name: row.first for row in summarise(made.path, "llava").rows}
    assert original["all"] == round(round((7 + 7 + 95 - 6) / 9, 3) * 10, 1)


def test_what_was_unreadable_is_asked_again_only_on_demand(bench):
    with judging([Says("hm"), GOOD]) as server:
        bench.run(server)
        assert bench.run(server).answered == 0
        made = bench.run(server, ask_again=True)
        assert (made.answered, made.known, len(server.asked)) == (1, 2, 4)
    assert sorted(r["metadata"]["scores"] for r in bench.reviews()) == [[7, 9]] * 3
    assert len(bench.replies()) == 4


def test_both_orders_are_averaged_and_their_effect_told(bench):
    def likes_the_first(body, number):
        return Says("9 5") if "[Assistant 1]\nReference" in body["messages"][1]["content"] else Says("8 6")

    with judging(likes_the_first) as server:
        made = bench.run(server, both=True)
    assert made.answered == 6
    second = next(r for r in bench.reviews() if r["metadata"]["order"] == "21")
    assert (second["tuple"], second["metadata"]["scores"], second["answer1_id"]) == ([6, 8], [6, 8], "r0")
    table = summarise(made.path, "official")
    row = next(row for row in table.rows if row.name == "all")
    assert (row.first, row.second, row.ratio, row.questions) == (75.0, 65.0, 86.7, 3)
    assert (table.order.advantage, table.order.changed, table.order.questions) == (3.0, 3, 3)


def test_other_answers_are_not_taken_for_these(bench):
    with judging(GOOD) as server:
        bench.run(server)
        bench.write("ours.jsonl", [{"question_id": i, "text": "Other."} for i in range(3)])
        with pytest.raises(DataError, match=r'3 reviews \("0", "1", "2"\) of other answers'):
            bench.run(server)
        bench.run(server, out="other.jsonl")
        assert len(server.asked) == 6


def test_a_reply_that_a_killed_run_did_not_read_is_not_paid_for_again(bench):
    with judging(GOOD) as server:
        bench.run(server)
        path = bench.root / "reviews.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2])[:-30])  # torn in its second line
        made = bench.run(server)
        assert (made.known, made.answered, len(server.asked)) == (3, 0, 3)
    assert sorted(r["question_id"] for r in bench.reviews()) == [0, 1, 2]


def test_the_cost_limit_is_never_passed(bench):
    bench.make(10)
    price = Price(10, 30)
    with judging(GOOD) as server:
        made = bench.run(server, price=price, max_cost=0.012, asking=Asking("judge", max_tokens=100), concurrency=3)
        assert made.answered == len(server.asked)
    assert 0 < made.answered < 10
    assert made.spent <= 0.012
    assert "cost limit" in made.ended
    assert made.unasked == 10 - made.answered
    with judging(GOOD) as server:
        again = bench.run(server, price=price, max_cost=0.012, asking=Asking("judge", max_tokens=100))
        assert len(server.asked) == again.answered
    assert again.spent <= 0.012


def test_what_may_have_been_paid_for_counts_as_paid(bench):
    bench.make(1)
    with judging([Says(cut=40), Says(body="no"), GOOD]) as server:
        made = bench.run(server, price=Price(1, 1), asking=Asking("judge", max_tokens=500))
    assert made.doubtful == 2
    assert made.written == 2 * 500 + 20


def test_a_server_that_counts_more_tokens_than_estimated_teaches_the_limit(bench):
    bench.make(10)
    dear = replace(GOOD, usage={"prompt_tokens": 1000, "completion_tokens": 10})
    with judging(dear) as server:
        made = bench.run(server, price=Price(10, 0), max_cost=0.035, asking=Asking("judge", max_tokens=100))
    assert made.answered == 3  # 0.01 each, and a fourth would come to 0.04
    assert made.spent == pytest.approx(0.03)


def test_concurrency_and_rate_are_kept(bench):
    bench.make(8)
    with judging(Says("7 9", delay=0.05)) as server:
        bench.run(server, concurrency=3)
        assert 2 <= server.most_at_once <= 3
    bench.make(4)
    with judging(GOOD) as server:
        bench.run(server, concurrency=4, requests_per_minute=300, out="paced.jsonl")
    assert min(b - a for a, b in zip(server.times, server.times[1:], strict=False)) > 0.15


def test_pictures_are_sent_as_they_are(bench, tmp_path):
    from PIL import Image

    bench.make(1)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "0.jpg")
    asking = Asking("judge", images=str(tmp_path))
    with judging(GOOD) as server:
        bench.run(server, asking=asking)
    parts = server.asked[0]["messages"][1]["content"]
    assert parts[0]["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    assert parts[1]["text"].startswith("[Context]")
    (tmp_path / "0.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:100])
    with pytest.raises(DataError, match="question 0"):
        bench.run(server, asking=asking, out="other.jsonl")


def test_prices(tmp_path):
    table = tmp_path / "prices.json"
    table.write_text('{"gpt-4": {"in": 30, "out": 60}, "bad": {"in": 1}}')
    assert choose_price("gpt-4", None, None, table, True) == Price(30, 60)
    assert Price(30, 60).of(1_000_000, 500_000) == 60
    for arguments, said in (
        (("gpt-5", None, None, table, False), "did you mean"),
        (("bad", None, None, table, False), "must be"),
        (("m", 1, None, None, False), "give both"),
        (("m", None, None, None, True), "--max-cost needs prices"),
    ):
        with pytest.raises(RecipeError, match=said):
            choose_price(*arguments)
    assert (count_tokens("abcd" * 10), count_tokens("음식")) == (10, 2)


KEY = "sk-secret-VeryLongKey-0123456789"


def test_addresses_that_would_show_the_key_are_refused():
    for url, said in (
        ("http://judge.example.com/v1", "plain http"),
        ("https://user:pass@example.com/v1", "password"),
        ("https://example.com/v1?api-key=x", "password or a"),
        ("ftp://example.com", "must be an address"),
    ):
        with pytest.raises(RecipeError, match=said) as caught:
            Endpoint(url, KEY)
        assert KEY not in str(caught.value)
    assert KEY not in repr(Endpoint("https://example.com/v1", KEY))


def test_a_key_that_is_missing_or_no_key_is_not_shown(bench, monkeypatch):
    arguments = ["judge", "-q", str(bench.root / "q.jsonl"), "-o", str(bench.root / "out.jsonl")]
    arguments += ["-a", str(bench.root / "ref.jsonl"), str(bench.root / "ours.jsonl"), "--style", "text", "-r"]
    arguments.append(str(bench.root / "rule.json"))
    (bench.root / "rule.json").write_text('{"default": {"role": "Assistant", "prompt": "Rate."}}')
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY} twice")
    monkeypatch.delenv("NOT_SET", raising=False)
    for more, said in (
        (["--key-env", KEY], "must be the name"),
        (["--key-env", "NOT_SET"], "is not set"),
        ([], "is no key"),
    ):
        told = CliRunner().invoke(app, [*arguments, *more])
        assert isinstance(told.exception, RecipeError)
        assert said in str(told.exception)
        assert KEY not in str(told.exception) + told.output
    assert not (bench.root / "out.jsonl").exists()


def _command(bench, server, *more):
    files = ("-q", "q.jsonl", "-c", "c.jsonl", "-a", "ref.jsonl", "ours.jsonl", "-o", "out/reviews.jsonl")
    return [sys.executable, "-m", "lapilli.cli", "judge", *files, "--url", server.url, "--model", "judge", *more]


def _everything(root):
    return "".join(path.read_text(errors="replace") for path in root.rglob("*") if path.is_file())


def test_the_key_is_sent_and_written_nowhere(bench, caplog, capsys):
    caplog.set_level("DEBUG")
    part = f"Incorrect API key provided: {KEY[:8]}****{KEY[-4:]}."
    tells = [
        error(500, f"bad key {KEY}"),
        error(500, part),
        Says(status=503, body=KEY),
        Says(f"8 7\nYour key is {KEY}"),
        error(401, f"Bearer {KEY} is wrong; {part}"),
    ]
    with judging(tells) as server:
        made = bench.run(server, key=KEY)
    assert server.keys == [f"Bearer {KEY}"] * 5
    out = capsys.readouterr()
    for place in (_everything(bench.root), caplog.text, out.out, out.err, str(made)):
        assert KEY not in place
        assert KEY[:8] not in place
        assert KEY[-4:] not in place
    assert "[key]" in made.ended
    assert "[key]" in _everything(bench.root)


@pytest.mark.slow
def test_the_command_killed_goes_on_and_shows_no_key(bench):
    bench.make(12)
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    with judging(lambda body, number: replace(GOOD, delay=0.1)) as server:
        command = _command(bench, server, "--concurrency", "2", "--price-in", "1", "--price-out", "2")
        dry = subprocess.run([*command, "--dry-run"], cwd=bench.root, capture_output=True, text=True, check=True)
        assert "12 requests to ask, 0 answered already" in dry.stderr
        assert re.search(r"about 0\.\d{4}, at most 0\.\d{4}", dry.stderr)
        assert not server.asked
        assert not (bench.root / "out").exists()
        process = subprocess.Popen(command, cwd=bench.root, env=environment, stderr=subprocess.PIPE, text=True)
        while len(server.asked) < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        stopped = process.communicate()[1]
        assert process.returncode == 128 + signal.SIGTERM
        assert len(bench.reviews("out/reviews.jsonl")) == len(server.asked) < 5  # what was under way is finished
        process = subprocess.Popen(command, cwd=bench.root, env=environment, stderr=subprocess.PIPE, text=True)
        while len(server.asked) < 7:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        told = process.communicate()[1]
        killed_at = len(server.asked)
        done = subprocess.run(command, cwd=bench.root, env=environment, capture_output=True, text=True, check=True)
        assert len(server.asked) <= 12 + 2  # what was under way when it was killed is asked again, and nothing else
        assert killed_at < 12
    reviews = bench.reviews("out/reviews.jsonl")
    assert sorted(r["question_id"] for r in reviews) == list(range(12))
    table = subprocess.run(
        [sys.executable, "-m", "lapilli.cli", "judge", "summary", "--plain", "-f", "out/reviews.jsonl"],
        cwd=bench.root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "all 128.6 70.0 90.0" in table.stdout.splitlines()
    for place in (stopped, told, done.stdout, done.stderr, dry.stderr, _everything(bench.root)):
        assert KEY not in place
        assert KEY[:8] not in place
