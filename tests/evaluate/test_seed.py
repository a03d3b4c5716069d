"""SEED-Bench, Q-Bench, MM-Vet and LLaVA-Bench: what is asked, counted and submitted."""

import json
from pathlib import Path

import pytest

from lapilli.base.errors import DataError
from lapilli.evaluate import seed
from lapilli.evaluate.answers import join, read_answers
from lapilli.evaluate.catalogue import load_task
from lapilli.evaluate.job import open_job
from lapilli.evaluate.run import score

REFERENCE = Path(__file__).parents[1] / "reference" / "eval"


def lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def seed_folder(folder, annotation):
    folder.mkdir(exist_ok=True)
    asked = [{"question_id": q["question_id"], "image": "a.jpg", "text": "q"} for q in annotation["questions"]]
    lines(folder / "llava-seed-bench.jsonl", reversed(asked))
    (folder / "SEED-Bench.json").write_text(json.dumps(annotation))
    return folder


def test_seed_numbers_are_the_originals(tmp_path):
    known = json.loads((REFERENCE / "seed.json").read_text())
    job = open_job(load_task("seed-bench"), seed_folder(tmp_path / "d", known["annotation"]), ["llava", "official"])
    said = {str(line["question_id"]): line["text"] for line in known["answers"]}
    missing = [q for q in job.questions if q.id not in said]
    assert len(missing) == 2
    answered = [q for q in job.questions if q.id in said]
    made = seed.score(answered, said, {"parse": "llava", "missing": missing})
    stated = [f"{name}: {value['accuracy']:.2f}%" for name, value in made.groups["type"].items()]
    stated += [f"Total accuracy: {made.values['accuracy']:.2f}%"]
    stated += [f"{kind} accuracy: {made.values[f'{kind}_accuracy']:.2f}%" for kind in ("image", "video")]
    assert sorted(stated) == sorted(known["stdout"])
    fixed = seed.score(answered, said, {"parse": "fixed"})
    assert fixed.values["accuracy"] > made.values["accuracy"]
    assert not any("stops with an error" in note for note in made.notes)
    without = seed.score(answered, said, {"parse": "llava"})
    assert any('1 type ("Counting") without a right answer' in note for note in without.notes)
    results = score(job, [lines(tmp_path / "a.jsonl", known["answers"])], tmp_path / "out", allow_missing=2)
    assert results.protocols["llava"].values["accuracy"] == pytest.approx(made.values["accuracy"])


def test_seed_submission_has_the_leaderboards_ids(tmp_path):
    known = json.loads((REFERENCE / "seed.json").read_text())
    job = open_job(load_task("seed-bench"), seed_folder(tmp_path / "d", known["annotation"]), ["official"])
    [path] = seed.submit(job.questions, {q.id: f"say {q.id}" for q in job.questions}, {}, tmp_path)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == [
        {"question_id": q["question_id"], "prediction": f"say {q['question_id']}"}
        for q in known["annotation"]["questions"]
    ]


def test_seed_faults(tmp_path):
    known = json.loads((REFERENCE / "seed.json").read_text())["annotation"]
    folder = seed_folder(tmp_path / "d", known)
    (folder / "SEED-Bench.json").write_text(json.dumps({**known, "questions": known["questions"][2:]}))
    with pytest.raises(DataError, match=r"2 questions \(.*\) of .*without a record"):
        open_job(load_task("seed-bench"), folder, ["llava"])
    (folder / "SEED-Bench.json").write_text(json.dumps({**known, "questions": [known["questions"][0]] * 2}))
    with pytest.raises(DataError, match=r"1 id .* on more than one question"):
        open_job(load_task("seed-bench"), folder, ["llava"])


RECORDS = [
    {"img_path": "1.jpg", "question": "Is it sharp?", "candidates": ["Yes", "No"], "correct_ans": "No", "type": 0},
    {"img_path": "2.jpg", "question": "How bright?", "candidates": ["Dark", "Bright", "Fair"], "correct_ans": "Dark"},
    {"img_path": "2.jpg", "question": "How noisy?", "candidates": ["Low", "High", "None"], "correct_ans": "High"},
]


def qbench_folder(folder, name="llvisionqa_dev.json", records=RECORDS):
    folder.mkdir(exist_ok=True)
    (folder / "images_llvisionqa").mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(records))
    return folder


def test_qbench_asks_as_the_original_and_reads_its_answers(tmp_path):
    job = open_job(load_task("qbench"), qbench_folder(tmp_path / "d"), ["llava", "official"])
    assert job.questions[0].text == (
        "<image>\nIs it sharp?\nChoose between one of the options as follows:\nA. Yes\nB. No\n"
    )
    # The original writes its records one behind the other, without line ends.
    said = ["B. No", "bright", "The answer is B."]
    path = tmp_path / "said.jsonl"
    written = [{**record, "response": text} for record, text in zip(RECORDS, said, strict=True)]
    path.write_text("".join(map(json.dumps, reversed(written))))
    joined = join(job.questions, read_answers(path))
    joined.check("x")
    assert [joined.answers[q.id].text for q in job.questions] == said
    results = score(job, [path], tmp_path / "out")
    assert results.protocols["official"].values["accuracy"] == pytest.approx(200 / 3)
    [submission] = results.submissions
    assert [json.loads(line) for line in Path(submission).read_text().splitlines()] == written


def test_qbench_in_chinese_keeps_the_typing_error_under_llava_alone(tmp_path):
    folder = qbench_folder(tmp_path / "d", "质衡-问答-验证集.json")
    task = load_task("qbench-zh")
    assert (
        open_job(task, folder, ["llava"])
        .questions[0]
        .text.startswith("<image>\nIs it sharp?\\在下列选项中选择一个:\nA.")
    )
    assert open_job(task, folder, ["official"]).questions[0].text.startswith("<image>\nIs it sharp?\n在下列")
    with pytest.raises(DataError, match="ask different questions"):
        open_job(task, folder, ["llava", "official"])


def test_qbench_faults(tmp_path):
    wrong = [{**RECORDS[0], "correct_ans": "Maybe"}]
    with pytest.raises(DataError, match=r'record 1: "correct_ans" is "Maybe"; it must be one of Yes, No'):
        open_job(load_task("qbench"), qbench_folder(tmp_path / "d", records=wrong), ["official"])
    unknown = [{key: value for key, value in RECORDS[0].items() if key != "correct_ans"}]
    folder = qbench_folder(tmp_path / "t", "llvisionqa_test.json", unknown)
    assert open_job(load_task("qbench-test"), folder, ["official"]).questions[0].truth is None


def bench_folder(folder, references=(0, 1), pictures=("1.jpg", "2.jpg")):
    folder.mkdir(exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    asked = [{"question_id": k, "image": f"{k + 1}.jpg", "text": f"q{k}", "category": "conv"} for k in (0, 1)]
    lines(folder / "questions.jsonl", asked)
    lines(folder / "answers_gpt4.jsonl", [{"question_id": k, "text": f"r{k}", "answer_id": "x"} for k in references])
    lines(folder / "context.jsonl", [{"id": "x", "image": p, "caption": f"about {p}"} for p in pictures])
    return folder


def test_llava_bench_joins_reference_and_context_by_id(tmp_path):
    task = load_task("llava-bench")
    job = open_job(task, bench_folder(tmp_path / "d", references=(1, 0)), ["llava", "official"])
    assert [(q.text, q.record["reference"], q.record["context"]) for q in job.questions] == [
        ("<image>\nq0", "r0", "about 1.jpg"),
        ("<image>\nq1", "r1", "about 2.jpg"),
    ]
    assert job.questions[0].groups == {"category": "conv"}
    results = score(job, [lines(tmp_path / "a.jsonl", [{"question_id": k, "text": "t"} for k in (1, 0)])])
    assert results.protocols == {}
    assert any("free text is for a judge" in note for note in results.notes)
    with pytest.raises(DataError, match=r'1 question \("1"\) .*without a record in .*answers_gpt4'):
        open_job(task, bench_folder(tmp_path / "e", references=(0,)), ["llava"])
    twice = bench_folder(tmp_path / "g")
    with (twice / "questions.jsonl").open("a") as stream:
        stream.write(json.dumps({"question_id": 1, "image": "1.jpg", "text": "again"}) + "\n")
    with pytest.raises(DataError, match=r'questions.jsonl: 1 id \("1"\) on more than one question'):
        open_job(task, twice, ["llava"])
    with pytest.raises(DataError, match=r'context.jsonl: 1 picture \("2.jpg"\) not in it'):
        open_job(task, bench_folder(tmp_path / "f", pictures=("1.jpg",)), ["llava"])


def test_mm_vet_writes_what_its_notebook_takes(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "images").mkdir()
    lines(folder / "llava-mm-vet.jsonl", [{"question_id": k, "image": "a.jpg", "text": "q"} for k in (0, 1)])
    truth = {f"v1_{k}": {"answer": "5", "capability": ["ocr", "math"], "imagename": "a.jpg"} for k in (0, 1)}
    (folder / "mm-vet.json").write_text(json.dumps(truth))
    said = lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "é"}, {"question_id": 0, "text": "4"}])
    results = score(open_job(load_task("mm-vet"), folder, ["llava", "official"]), [said], tmp_path / "out")
    [written] = results.submissions
    assert json.loads(Path(written).read_text()) == {"v1_0": "4", "v1_1": "é"}
    assert open_job(load_task("mm-vet"), folder, ["llava"]).questions[0].groups == {"capabilities": "ocr, math"}
    (folder / "mm-vet.json").write_text(json.dumps({"v1_0": truth["v1_0"], "v1_2": truth["v1_1"]}))
    with pytest.raises(DataError, match=r'1 question \("v1_1"\)'):
        open_job(load_task("mm-vet"), folder, ["llava"])
