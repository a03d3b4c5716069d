"""A task's data read as its protocols want it: once where they ask alike, and each by itself where they don't."""

import json

import pytest
from tests.support.tiny import make_picture

from lapilli.base.errors import DataError
from lapilli.evaluate import job as opening
from lapilli.evaluate.catalogue import all_tasks, load_task
from lapilli.evaluate.compare import compare
from lapilli.evaluate.job import open_job, open_jobs
from lapilli.evaluate.run import evaluate, score
from lapilli.evaluate.task import PROTOCOLS

MODEL = {"name": "parrot", "path": "x", "fingerprint": "1"}


@pytest.fixture
def chinese(tmp_path):
    folder = tmp_path / "qbench"
    (folder / "images_llvisionqa").mkdir(parents=True)
    make_picture(folder / "images_llvisionqa" / "a.png", 40, 40)
    records = [
        {"img_path": "a.png", "question": f"清晰吗{i}", "candidates": ["a red dog 음식", "否"], "correct_ans": "否"}
        for i in range(2)
    ]
    (folder / "质衡-问答-验证集.json").write_text(json.dumps(records, ensure_ascii=False))
    return folder


def small(task):
    return task.model_copy(update={"decoding": task.decoding.model_copy(update={"max_new_tokens": 12})})


def test_protocols_that_ask_differently_are_asked_one_by_one(chinese, parrot, tmp_path, caplog):
    task = small(load_task("qbench-zh"))
    jobs = open_jobs(task, chinese, PROTOCOLS)
    assert "task qbench-zh: its protocols ask different questions" in caplog.text
    assert [job.task.name for job in jobs] == ["qbench-zh-llava", "qbench-zh-official"]
    assert "\\在下列" in jobs[0].questions[0].text
    assert "\n在下列" in jobs[1].questions[0].text
    made = evaluate(jobs, tmp_path / "out", MODEL, lambda: parrot)
    assert [list(one.protocols) for one in made] == [["llava"], ["official"]]
    # One of them alone goes on in its own folder.
    (alone,) = open_jobs(task, chinese, ("official",))
    evaluate([alone], tmp_path / "out", MODEL, lambda: pytest.fail("everything is answered"))
    assert [one.task for one in compare(tmp_path / "out", tmp_path / "out")] == [
        "qbench-zh-llava",
        "qbench-zh-official",
    ]
    with pytest.raises(DataError, match="ask different questions"):
        open_job(task, chinese, PROTOCOLS)
    # Answers that are there already are scored by both, whatever they were asked.
    (job,) = open_jobs(task, chinese, PROTOCOLS, asking=False)
    made = score(job, [tmp_path / "out" / "qbench-zh-llava" / "answers.jsonl"])
    assert (made.task, list(made.protocols)) == ("qbench-zh", ["llava", "official"])


def test_only_these_tasks_ask_differently():
    apart = [task.name for task in all_tasks() if opening._read_by(task, "llava") != opening._read_by(task, "official")]
    assert apart == ["qbench-zh", "qbench-zh-test"]


def test_files_are_read_once_where_protocols_differ_in_scoring_only(folder, monkeypatch):
    entry, times = opening.READERS["own"], []
    counted = type(entry)(lambda *given: times.append(1) or entry.call(*given), entry.options)
    monkeypatch.setitem(opening.READERS, "own", counted)
    task = folder.task(protocols={"official": {"ignore_case": False}})
    job = open_job(task, folder.root, PROTOCOLS)
    assert len(times) == 1
    assert job.read["llava"] is job.read["official"]
