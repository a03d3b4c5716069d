"""`lapilli serve` as the judge: a model of ours scores, over HTTP, as any other endpoint would."""

import json

import pytest
from tests.support.server_process import serving
from tests.support.tiny import build_parrot
from typer.testing import CliRunner

from lapilli.cli.main import app
from lapilli.evaluate.run import evaluate

KEY = "sk-a-key-for-this-test"


@pytest.mark.slow
def test_a_model_of_ours_is_the_judge(bench, folder, parrot, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.chdir(bench.root)
    build_parrot(tmp_path / "strict", "8 6", positions=2048)
    with serving(f"strict={tmp_path / 'strict'}", environment={"LAPILLI_API_KEY": KEY}) as server:
        how = ["--url", server.url, "--model", "strict", "--key-env", "JUDGE_KEY", "--max-tokens", "16"]
        files = ["-q", "q.jsonl", "-c", "c.jsonl", "-a", "ref.jsonl", "ours.jsonl", "-o", "out", "--both-orders"]
        told = CliRunner().invoke(app, ["judge", *files, *how])
        assert told.exception is None, (told.output, server.lines)
        options = {"url": server.url, "model": "strict", "key_env": "JUDGE_KEY", "style": "text", "max_tokens": 16}
        job = folder.job(scorer="judge", options={"judge": options}, limit=4)
        (made,) = evaluate([job], tmp_path / "evaluated", {"name": "parrot", "fingerprint": "1"}, lambda: parrot)
    reviews = [json.loads(line) for line in (bench.root / "out" / "reviews.jsonl").read_text().splitlines()]
    assert [review["content"] for review in reviews] == ["8 6"] * 6
    assert {review["metadata"]["judge"] for review in reviews} == {"strict"}
    table = CliRunner().invoke(app, ["judge", "summary", "out/reviews.jsonl", "--protocol", "official"]).output
    assert "points of 10 for standing first" in table
    assert made.protocols["official"].values == {"score": 75.0, "ours": 60.0, "reference": 80.0}
    assert KEY not in "".join(p.read_text(errors="replace") for p in tmp_path.rglob("*.json*"))
