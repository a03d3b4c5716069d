"""Tasks with choices from files to results, asked of a model that always says the same."""

import json

import pytest
from tests.evaluate.test_mmbench import pictures  # noqa: F401
from tests.evaluate.test_scienceqa import reference
from tests.evaluate.test_scienceqa import write as write_scienceqa
from tests.support.benchmark_files import mmbench_file as write
from tests.support.benchmark_files import mmbench_row as row
from tests.support.tiny import build_parrot, make_picture

import lapilli
from lapilli.evaluate.catalogue import load_task
from lapilli.evaluate.job import open_job
from lapilli.evaluate.run import evaluate, score

MODEL = {"name": "parrot", "path": "x", "fingerprint": "1"}


@pytest.fixture(scope="module")
def says_b(models):
    return lapilli.load(build_parrot(models / "b", " B."))


def small(name, folder):
    """A task, with answers no longer than the tiny model's context allows."""
    task = load_task(name)
    return open_job(
        task.model_copy(update={"decoding": task.decoding.model_copy(update={"max_new_tokens": 4})}),
        folder,
        ["llava", "official"],
    )


def test_mmbench_in_all_rotations(tmp_path, says_b, pictures):  # noqa: F811
    rows = [row(1, pictures[0], "B", options=("a", "b", "", "")), row(2, pictures[1], "B", options=("a", "", "", ""))]
    rows[1]["answer"] = "A"
    job = small("mmbench-circular", write(tmp_path / "d", rows))
    (made,) = evaluate([job], tmp_path / "out", MODEL, lambda: says_b)
    found = made.protocols["official"]
    assert found.values == {"accuracy": 0, "single_accuracy": 50}
    assert made.counts.asked == 3
    assert found.scored == 2
    answers = tmp_path / "out" / "mmbench-circular" / "answers.jsonl"
    written = sorted((line["question_id"], line["round_id"]) for line in map(json.loads, answers.open()))
    assert written == [(1, 0), (1, 1), (2, 0)]
    assert score(job, [answers]).protocols["official"].values == found.values
    again = evaluate([job], tmp_path / "out", MODEL, lambda: pytest.fail("everything is answered already"))
    assert again[0].protocols == made.protocols


def test_scienceqa_in_two_rounds(tmp_path, says_b):
    known = reference("scienceqa_forms.json")
    write_scienceqa(tmp_path / "d", known["problems"], known["split"])
    for name, file in (("7", "image.png"), ("11", "choice.png")):
        (tmp_path / "d" / "images" / "test" / name).mkdir()
        make_picture(tmp_path / "d" / "images" / "test" / name / file)
    (made,) = evaluate([small("scienceqa-lepa", tmp_path / "d")], tmp_path / "out", MODEL, lambda: says_b)
    answers = list(map(json.loads, (tmp_path / "out" / "scienceqa-lepa" / "answers.jsonl").open()))
    assert {line["text"] for line in answers} == {"B.\n The answer is B."}
    assert {line["prompt"].startswith("<image>\n") for line in answers if line["question_id"] in ("7", "11")} == {True}
    for outcome in made.protocols.values():
        assert outcome.values == {"accuracy": 25, "image_accuracy": 50}
