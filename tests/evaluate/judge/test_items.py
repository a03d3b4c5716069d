"""Questions, contexts and answers joined by id, and the prompt that comes of them."""

import json

import pytest
from tests.support.judge_server import Says, judging
from typer.testing import CliRunner

from lapilli.base.errors import DataError, RecipeError
from lapilli.cli.main import app
from lapilli.evaluate.judge.items import read_items, task_items
from lapilli.evaluate.judge.prompt import Asking, body, content, requests
from lapilli.evaluate.judge.rules import load_rules
from lapilli.evaluate.task import Question


def test_files_in_any_order_are_joined_by_id(bench):
    first = bench.items()[0]
    assert first.answers == ("Reference 0.", "Ours 0.")
    assert first.answer_ids == ("r0", "o0")
    assert (first.number, first.category, first.context) == (1, "llava_bench_conv", "Caption 0.")


def test_the_prompt_is_the_originals(bench, tmp_path):
    rules = tmp_path / "rule.json"
    rules.write_text(json.dumps({"llava_bench_conv": {"role": "Assistant", "prompt": "Rate them."}}))
    bench.make(1)
    item = read_items(
        bench.root / "q.jsonl",
        [bench.root / "ref.jsonl", bench.root / "ours.jsonl"],
        load_rules(rules),
        context=bench.root / "c.jsonl",
    )[0]
    assert content(item, "12") == (
        "[Context]\nCaption 0.\n\n[Question]\nWhat is it, 0?\n\n"
        "[Assistant 1]\nReference 0.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nOurs 0.\n\n[End of Assistant 2]\n\n"
        "[System]\nRate them.\n\n"
    )
    swapped = content(item, "21")
    assert swapped.index("[Assistant 1]\nOurs 0.") < swapped.index("[Assistant 2]\nReference 0.")
    sent = body(item, "12", Asking("m"))
    assert (sent["temperature"], sent["max_tokens"], sent["messages"][0]["role"]) == (0.2, 1024, "system")
    other = body(item, "12", Asking("m", None, 7, "max_completion_tokens"))
    assert other["max_completion_tokens"] == 7
    assert not {"temperature", "max_tokens"} & set(other)


def test_each_original_context_is_known_by_its_fields(bench):
    assert bench.items(context=None)[0].style == "text"
    box = {"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}
    bench.write("v.jsonl", [{"image": f"{i}.jpg", "captions": ["A.", "B."], "instances": [box]} for i in range(3)])
    visual = bench.items(context=bench.root / "v.jsonl")[0]
    assert (visual.style, visual.category) == ("visual", "conv")
    assert visual.context == "A.\nB.\n\ncat: [0.1, 0.2, 0.3, 0.4]"
    bench.write("k.jsonl", [{"question_id": i, "text": f"Said {i}", "type": "Bone"} for i in (2, 0, 1)])
    quilt = bench.items(context=bench.root / "k.jsonl")[1]
    assert (quilt.style, quilt.category, quilt.context) == ("quilt", "detail", "Said 1")
    assert "histopathology" in quilt.rule.prompt


@pytest.mark.parametrize(
    ("file", "records", "said"),
    [
        ("ours.jsonl", [{"question_id": i, "text": "x"} for i in (0, 1, 7)], '1 question ("2")'),
        ("ours.jsonl", [{"question_id": i, "text": "x"} for i in (0, 1, 1, 2)], '1 id ("1") on more than one'),
        ("ref.jsonl", [{"question_id": i, "text": "x"} for i in range(4)], '1 record ("3")'),
        ("ref.jsonl", [{"question_id": i} for i in range(3)], 'has no "text"'),
        ("c.jsonl", [{"image": "0.jpg", "caption": "x"}], '2 questions ("1", "2") without a context'),
        ("c.jsonl", [{"image": "0.jpg", "words": "x"}], 'contexts have "captions"'),
        (
            "q.jsonl",
            [{"question_id": i, "image": f"{i}.jpg", "text": "x", "category": "odd"} for i in range(3)],
            "rule",
        ),
    ],
)
def test_what_does_not_join_is_named(bench, file, records, said):
    bench.write(file, records)
    with pytest.raises(DataError) as caught:
        bench.items()
    assert said in str(caught.value)


def test_rules_and_styles_that_are_wrong_are_named(bench, tmp_path):
    wrong = tmp_path / "rule.json"
    wrong.write_text('{"conv": {"role": "Assistant"}}')
    with pytest.raises(DataError, match=r'rule "conv": needs "prompt"'):
        load_rules(wrong)
    with pytest.raises(RecipeError, match='did you mean "visual"'):
        bench.items(style="visuall")
    with pytest.raises(RecipeError, match='looks like "bench"'):
        bench.items(style="quilt")
    with pytest.raises(RecipeError, match="two files"):
        read_items(bench.root / "q.jsonl", [bench.root / "ref.jsonl"], load_rules(None))


def test_a_task_with_references_is_compared_or_graded(bench):
    rules = load_rules(None)
    pair = Question("0", "<image>\nQ", groups={"category": "conv"}, record={"reference": "R", "context": "C"})
    item = task_items("llava-bench", [pair], bench.write("a.jsonl", [{"question_id": "0", "text": "A"}]), rules)[0]
    assert (item.style, item.category, item.question) == ("bench", "llava_bench_conv", "Q")
    assert (item.answers, item.context) == (("R", "A"), "C")
    own = Question("0", "Q", truth=("yes", "yep"), groups={})
    grade = task_items("mine", [own], bench.root / "a.jsonl", rules)[0]
    assert (grade.style, grade.answers, grade.context) == ("grade", ("A",), "yes <OR> yep")
    assert "[Reference]\nyes <OR> yep\n\n[Assistant]\nA\n\n[End of Assistant]" in content(grade, "12")
    assert [r.order for r in requests([grade], Asking("m"), both_orders=True)] == ["12"]
    with pytest.raises(DataError, match="no reference answer"):
        task_items("mine", [Question("0", "Q")], bench.root / "a.jsonl", rules)
    with pytest.raises(DataError, match="without an answer"):
        task_items("mine", [own, Question("1", "Q", truth="x")], bench.root / "a.jsonl", rules)


def test_the_benchmarks_that_are_judged_can_be_named(tmp_path, monkeypatch):
    root = tmp_path / "llava-bench-in-the-wild"
    (root / "images").mkdir(parents=True)
    (tmp_path / "mm-vet" / "images").mkdir(parents=True)
    question = {"question_id": 0, "image": "1.jpg", "text": "What?"}
    (root / "questions.jsonl").write_text(json.dumps({**question, "category": "conv"}))
    (root / "answers_gpt4.jsonl").write_text(json.dumps({"question_id": 0, "text": "Gold.", "answer_id": "g"}))
    (root / "context.jsonl").write_text(json.dumps({"id": "1", "image": "1.jpg", "caption": ["A.", "B."]}))
    (tmp_path / "mm-vet" / "llava-mm-vet.jsonl").write_text(json.dumps(question))
    (tmp_path / "mm-vet" / "mm-vet.json").write_text(
        json.dumps({"v1_0": {"imagename": "1.jpg", "question": "What?", "answer": "x<AND>y", "capability": ["ocr"]}})
    )
    (tmp_path / "answers.jsonl").write_text(json.dumps({"question_id": 0, "text": "Ours."}))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for task, said in (
        ("llava-bench", "[Context]\nA.\nB.\n\n[Question]\nWhat?\n\n[Assistant 1]\nGold.\n\n[End of"),
        ("mm-vet", "[Question]\nWhat?\n\n[Reference]\nx<AND>y\n\n[Assistant]\nOurs.\n\n[End of"),
    ):
        with judging(Says("0.5 ") if task == "mm-vet" else Says("8, 6")) as server:
            arguments = ["--task", task, "--data", str(tmp_path), "-a", str(tmp_path / "answers.jsonl")]
            out = tmp_path / task
            run = CliRunner().invoke(app, ["judge", *arguments, "-o", str(out), "--url", server.url, "-m", "judge"])
        assert run.exit_code == 0, run.output
        assert said in server.contents()[0]
        assert server.keys == [None]
        table = CliRunner().invoke(app, ["judge", "summary", str(out), "--json", "--protocol", "official"])
        assert json.loads(table.stdout)[0]["rows"][0]["second"] == {"llava-bench": 60.0, "mm-vet": 50.0}[task]
