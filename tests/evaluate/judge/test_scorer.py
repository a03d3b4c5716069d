"""A judge as a task's scorer: asked behind the answers, once, kept, gone on with, and its numbers like any others."""

import json
import os
import signal
from dataclasses import replace

import pytest
from tests.evaluate.conftest import SAYS
from tests.support.judge_server import Says, error, judging
from typer.testing import CliRunner

from lapilli.base.errors import RecipeError, RunError
from lapilli.cli.main import app
from lapilli.evaluate.catalogue import judged_by, load_task
from lapilli.evaluate.compare import compare
from lapilli.evaluate.job import open_job
from lapilli.evaluate.report.write import write_report
from lapilli.evaluate.run import evaluate, score
from lapilli.evaluate.stopped import Stopped

MODEL = {"name": "parrot", "path": "x", "fingerprint": "1"}


def judged(folder, server, limit=None, **settings):
    how = {"url": server.url, "model": "judge/1", "attempts": 1, **settings}
    return folder.job(scorer="judge", options={"groups": ["kind"], "judge": how}, limit=limit)


def says_alike(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"question_id": i, "text": SAYS}) + "\n" for i in range(12)))
    return file


def grades(body, number):
    """1.0 where the reference is not `no`."""
    asked = body["messages"][1]["content"]
    return Says("0.0\nNo." if "[Reference]\nno" in asked else "1.0\nSame.")


def test_answers_are_graded_once_for_both_protocols_and_kept(folder, parrot, tmp_path, caplog):
    out = tmp_path / "out"
    with judging(grades) as server:
        (limited,) = evaluate([judged(folder, server, limit=3)], out, MODEL, lambda: parrot)
        assert len(server.asked) == 3
        job = judged(folder, server, price_in=1, price_out=2)
        (made,) = evaluate([job], out, MODEL, lambda: parrot)
        assert len(server.asked) == 12
        (again,) = evaluate([job], out, MODEL, lambda: pytest.fail("everything is answered"))
        evaluate([judged(folder, server, limit=3)], out, MODEL, lambda: parrot)
        assert len(server.asked) == 12  # fewer questions, then all of them: nothing is paid for twice
        evaluate([job], out, MODEL, lambda: parrot)
        assert len(server.asked) == 12
    assert limited.protocols["llava"].values == {"score": pytest.approx(100 * 2 / 3)}
    found = made.protocols["official"]
    assert found == made.protocols["llava"] == again.protocols["official"]
    assert found.values == {"score": pytest.approx(100 * 8 / 12)}
    assert found.groups["kind"]["first"] == {"score": pytest.approx(100 * 4 / 6)}
    assert found.interval[0] < 100 * 8 / 12 < found.interval[1]
    assert found.notes[0] == "judged by judge/1"
    assert "judge/1: 9 requests to ask, 3 answered already" in caplog.text
    assert (out / "mine" / "judge-judge-1" / "reviews.jsonl").is_file()


def test_a_judge_that_fails_leaves_the_answers_and_the_same_command_goes_on(folder, parrot, tmp_path):
    def falters(body, number):
        return error(500) if number == 2 else grades(body, number)

    with judging(falters) as server:
        job = judged(folder, server, concurrency=1)
        with pytest.raises(RunError, match="1 of 12 requests to the judge have no reply"):
            evaluate([job], tmp_path / "out", MODEL, lambda: parrot)
        assert not (tmp_path / "out" / "mine" / "results.json").exists()
        (made,) = evaluate([job], tmp_path / "out", MODEL, lambda: pytest.fail("everything is answered"))
        assert len(server.asked) == 13
    assert made.protocols["llava"].values == {"score": pytest.approx(100 * 8 / 12)}


def test_a_wish_to_stop_ends_the_judging_and_the_same_command_goes_on(folder, parrot, tmp_path):
    def stops(body, number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return replace(grades(body, number), delay=0.1 if number == 3 else 0)

    with judging(stops) as server:
        job = judged(folder, server, concurrency=1)
        with pytest.raises(Stopped, match="stopped by SIGTERM; the same command goes on with the judge"):
            evaluate([job], tmp_path / "out", MODEL, lambda: parrot)
        assert 4 <= len(server.asked) < 12
        (made,) = evaluate([job], tmp_path / "out", MODEL, lambda: pytest.fail("everything is answered"))
        assert len(server.asked) == 12
    without = folder.job(scorer=None, options={"groups": ["kind"]})
    (again,) = evaluate([without], tmp_path / "out", MODEL, lambda: pytest.fail("everything is answered"))
    assert again == made  # a command without a judge leaves what the judge found
    assert json.loads((tmp_path / "out" / "mine" / "task.json").read_text())["scorer"] == "judge"


def test_relative_scores_of_two_models_are_compared_and_reported_with_the_replies(folder, tmp_path):
    def rates(body, number):
        asked = body["messages"][1]["content"]
        second = asked.split("[Assistant 2]\n")[1]
        if "no. 7?" in asked and second.startswith("bad"):
            return Says("can't say")
        return Says("8 6\nA good answer." if second.startswith("good") else "8 4\nToo short.")

    with judging(rates) as server:
        for name in ("good", "bad"):
            file = tmp_path / f"{name}.jsonl"
            file.write_text("".join(json.dumps({"question_id": i, "text": f"{name} {i}"}) + "\n" for i in range(12)))
            score(judged(folder, server, style="text"), [file], tmp_path / name, name=name)
    llava, official = compare(tmp_path / "bad", tmp_path / "good")
    assert (official.a, official.b) == (50.0, 75.0)
    assert official.difference.value == pytest.approx(25)
    assert official.difference.questions == 11
    assert official.difference.p < 0.01
    assert "scored on one side only" in official.note
    assert llava.a == round(100 * (11 * 4 - 1) / (11 * 8 - 1), 1)  # the original's mean has -1 in it
    write_report([tmp_path / "good", tmp_path / "bad"], json=tmp_path / "r.json", html=tmp_path / "r.html")
    (task,) = json.loads((tmp_path / "r.json").read_text())["tasks"]
    shown = {case["id"]: case["replies"] for case in task["shown"]}
    assert [reply["said"] for reply in shown["3"]] == ["8 6\nA good answer.", "8 4\nToo short."]
    assert shown["3"][0]["parsed"]["official"] == "reference 8, ours 6"
    assert shown["7"][1]["said"] == "can't say"
    page = (tmp_path / "r.html").read_text()
    assert "the judge&#x27;s reply" in page
    assert "Too short." in page
    assert any(
        "1 reviews can't be read: no two scores" in n for n in task["results"]["bad"]["protocols"]["official"]["notes"]
    )


def test_both_orders_and_pictures_are_asked_for_in_the_yaml(folder, tmp_path):
    file = says_alike(tmp_path)
    with judging(Says("7 9")) as server:
        job = judged(folder, server, style="text", both_orders=True, pictures=True, limit=None)
        made = score(job, [file], tmp_path / "out")
        assert len(server.asked) == 24
        assert server.asked[0]["messages"][1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert made.protocols["official"].values == {"score": 100.0, "ours": 80.0, "reference": 80.0}
    assert any("for standing first" in note for note in made.protocols["official"].notes)


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({"modle": "x"}, 'options.judge.modle: unknown key (did you mean "model"?)'),
        ({"max_tokens": 0}, "options.judge.max_tokens"),
        ({"style": "graed"}, 'did you mean "grade"?'),
        ("gpt-4", "options.judge: must be a mapping"),
    ],
)
def test_what_is_wrong_in_the_yaml_is_said_when_it_is_read(folder, judge, said):
    with pytest.raises(RecipeError) as refused:
        folder.task(scorer="judge", options={"judge": judge})
    assert said in str(refused.value)


def test_a_key_price_or_address_that_is_wrong_is_said_before_any_question(folder, parrot, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for settings, said in (
        ({"url": "https://judge.example.com/v1", "key_env": "NO_SUCH_KEY"}, "is not set"),
        ({"url": "http://judge.example.com/v1", "key_env": "none", "price_in": 1}, "give both"),
        ({"url": "ftp://judge.example.com", "key_env": "none"}, "must be an address"),
    ):
        job = folder.job(scorer="judge", options={"judge": settings})
        with pytest.raises(RecipeError, match=said):
            evaluate([job], tmp_path / "out", MODEL, lambda: pytest.fail("a model was loaded"))
    file = says_alike(tmp_path)
    with judging(grades) as server, pytest.raises(RecipeError, match="--out"):
        score(judged(folder, server), [file])


def bench(root):
    """LLaVA-Bench with four questions."""
    records = [{"question_id": i, "image": f"{i}.jpg", "text": f"What {i}?", "category": "conv"} for i in range(4)]
    root.mkdir()
    for name, extra in (
        ("questions", lambda r: r),
        ("answers_gpt4", lambda r: {"question_id": r["question_id"], "text": "A cat."}),
        ("context", lambda r: {"image": r["image"], "caption": "There is a cat."}),
    ):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(extra(r)) + "\n" for r in records))
    (root / "images").mkdir()
    ours = root / "ours.jsonl"
    ours.write_text("".join(json.dumps({"question_id": i, "text": "Dog.", "model_id": "m"}) + "\n" for i in range(4)))
    return ours


def test_a_benchmark_without_a_scorer_is_judged_by_one_command(tmp_path):
    ours = bench(tmp_path / "data")
    with judging(Says("8 4\nA dog is no cat.")) as server:
        command = ["score", "llava-bench", "--answers", str(ours), "--data", str(tmp_path / "data")]
        told = CliRunner().invoke(
            app, [*command, "--out", str(tmp_path / "out"), "--judge", f"url={server.url}", "--judge", "model=m1"]
        )
        assert told.exception is None, told.output
        assert len(server.asked) == 4
    assert "[Context]\nThere is a cat." in server.contents()[0]
    made = json.loads((tmp_path / "out/llava-bench/results.json").read_text())
    assert made["protocols"]["llava"]["values"] == {"score": 50.0, "ours": 40.0, "reference": 80.0}
    assert made["protocols"]["llava"]["groups"]["category"]["conv"]["score"] == 50.0
    told = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "x"), "--judge", "key_env=NO_SUCH_KEY"])
    assert "is not set" in str(told.exception)
    (tmp_path / "data" / "answers_gpt4.jsonl").unlink()
    told = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "x"), "--judge", "key_env=none"])
    assert "not llava-bench (no reference answers)" in str(told.exception)
    with pytest.raises(RecipeError, match="task pope is scored by pope"):
        judged_by(load_task("pope"), ["model=m"])
    with pytest.raises(RecipeError, match="modell: unknown key"):
        judged_by(load_task("mm-vet"), ["modell=m"])
    with pytest.raises(RecipeError, match="NAME=VALUE"):
        judged_by(load_task("mm-vet"), ["model"])


def test_reviews_of_lapilli_judge_are_results_too(tmp_path):
    ours = bench(tmp_path / "data")
    with judging([Says("hm"), Says("8 4\nA dog is no cat.")]) as server:
        for name in ("a", "b"):
            command = ["judge", "--task", "llava-bench", "--data", str(tmp_path / "data"), "-a", str(ours)]
            more = ["-o", str(tmp_path / name), "--url", server.url, "--model", "m1", "--concurrency", "1"]
            told = CliRunner().invoke(app, [*command, *more])
            assert told.exception is None, told.output
    assert "lapilli report" in told.output
    one, _ = compare(tmp_path / "a", tmp_path / "b")
    assert (one.task, one.headline) == ("llava-bench-judged", "score")
    write_report([tmp_path / "a", tmp_path / "b"], json=tmp_path / "r.json", html=tmp_path / "r.html")
    (task,) = json.loads((tmp_path / "r.json").read_text())["tasks"]
    assert task["results"][f"m ({tmp_path}/a)"]["counts"]["missing"] == 1
    case = next(case for case in task["shown"] if case["id"] == "1")
    assert (case["text"], case["expected"], case["groups"]) == ("<image>\nWhat 1?", "A cat.", {"category": "conv"})
    assert (case["replies"][0]["text"], case["replies"][0]["said"]) == ("Dog.", "8 4\nA dog is no cat.")


def test_review_files_of_others_become_results(tmp_path):
    for name, second in (("review_a", 4), ("review_b", 6)):
        lines = [
            {"question_id": i, "category": "conv", "tuple": [8, second], "content": f"8 {second}"} for i in range(3)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [str(tmp_path / f"review_{name}.jsonl") for name in "ab"]
    told = CliRunner().invoke(app, ["judge", "summary", *files, "--out", str(tmp_path / "out")])
    assert told.exception is None, told.output
    one, _ = compare(tmp_path / "out/review_a", tmp_path / "out/review_b")
    assert (one.a, one.b, one.difference.value) == (50.0, 75.0, pytest.approx(25))
    write_report([tmp_path / "out/review_a", tmp_path / "out/review_b"], markdown=tmp_path / "r.md")
    assert "the judge: 8 6" in (tmp_path / "r.md").read_text()


def test_an_own_task_may_bring_rules_of_its_own(folder, tmp_path):
    (folder.root / "rules.json").write_text('{"grade": {"role": "Pupil", "prompt": "Mark it."}}')
    file = says_alike(tmp_path)
    with judging(Says("0.5")) as server:
        options = {"judge": {"url": server.url}}
        files = {"questions": "q.jsonl", "images": "pictures", "rules": "rules.json"}
        job = open_job(folder.task(scorer="judge", options=options, files=files), folder.root, ("llava",))
        assert score(job, [file], tmp_path / "out").protocols["llava"].values == {"score": 50.0}
        assert "[Pupil]" in server.contents()[0]
        assert "Mark it." in server.contents()[0]
