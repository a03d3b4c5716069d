"""Quilt-VQA, PVQA and PMC-VQA: Quilt-LLaVA's numbers to the last digit, and what official counts instead."""

import json
import math
from pathlib import Path

import pytest

from lapilli.base.errors import DataError
from lapilli.evaluate import choices, pmc, quilt
from lapilli.evaluate.catalogue import load_task
from lapilli.evaluate.job import open_job
from lapilli.evaluate.run import score
from lapilli.evaluate.task import Question

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "eval" / "quilt.json").read_text())
NAMES = {"pvqa": "pvqa", "quilt": "quilt-vqa"}


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write(folder, truth, name, anchor=None):
    folder.mkdir(exist_ok=True)
    kind = "quiltvqa" if name == "quilt" else "pvqa"
    asked = [{"question_id": t["id"], "image": "a.jpg", "text": "What is it?"} for t in truth]
    lines(folder / f"{kind}_test_wo_ans.jsonl", reversed(asked))
    (folder / f"{kind}_test_w_ans.json").write_text(json.dumps(truth))
    (folder / "images" / "test").mkdir(parents=True, exist_ok=True)
    if anchor:
        lines(folder / "anchor.jsonl", anchor)
    return open_job(load_task(NAMES[name]), folder, ["llava", "official"])


@pytest.mark.parametrize("name", ["pvqa", "quilt"])
@pytest.mark.parametrize("anchored", [False, True])
def test_protocol_llava_is_the_originals(name, anchored, tmp_path):
    known = REFERENCE[name]
    job = write(tmp_path / "data", known["truth"], name, known["anchor"] if anchored else None)
    said = lines(tmp_path / "said.jsonl", known["answers"])  # in another order than the questions
    values = score(job, [said]).protocols["llava"].values
    expected = [value for _, value in known["scores_anchor" if anchored else "scores"]]
    names = ("exact_match", "f1", "precision", "recall", "yes_no_accuracy")
    assert [values[key] for key in names] == pytest.approx(expected, abs=1e-9)


def test_pairs_are_the_originals():
    for said, true, exact, measures in REFERENCE["pairs"]:
        question = Question(id="1", text="q", truth=true)
        assert quilt._llava(quilt.normalise_quilt(said), question) == pytest.approx((exact, *measures)), (said, true)
    for text, normalised in REFERENCE["normalised"]:
        assert quilt.normalise_quilt(text) == normalised


def test_official_counts_whole_answers_and_every_word_once(tmp_path):
    truth = [
        {"id": 1, "answer": "nuclei and stroma", "answer_type": "OPEN"},
        {"id": 2, "answer": "A benign tumor.", "answer_type": "OPEN"},
        *({"id": k, "answer": "yes", "answer_type": "CLOSED"} for k in (3, 4, 5, 6)),
    ]
    said = {
        "1": "nuclei nuclei nuclei",
        "2": "benign tumor",
        "3": "maybe",
        "4": "Yes, no doubt",
        "5": "It is: yes",
        "6": "no",
    }
    job = write(tmp_path, truth, "pvqa")
    made = quilt.score(job.questions, said, {"parse": "fixed"})
    assert made.values["exact_match"] == 50
    assert made.values["recall"] == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert made.values["precision"] == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert made.values["yes_no_accuracy"] == 50
    assert any("1 of 4 answers" in note for note in made.notes)
    assert made.items == {"1": pytest.approx(1 / 3), "2": 1.0}
    kept = quilt.score(job.questions, said, {"parse": "llava"})
    assert kept.values["yes_no_accuracy"] == 50  # `maybe` is a yes there, `Yes, no doubt` a no
    assert {name for name, word in kept.parsed.items() if word == "yes"} == {"3", "5"}
    assert made.counts == {"answer_type": {"open": 2, "yes or no": 4}}


def test_without_open_questions_there_is_no_number_for_them(tmp_path):
    job = write(tmp_path / "d", [{"id": 1, "answer": "no", "answer_type": "CLOSED"}], "pvqa")
    assert math.isnan(quilt.score(job.questions, {"1": "no"}, {}).values["recall"])
    made = score(job, [lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "no"}])]).protocols["official"]
    assert made.values["recall"] is None
    assert made.values["yes_no_accuracy"] == 100


def test_a_truth_of_other_questions_is_refused(tmp_path):
    truth = [{"id": 1, "answer": "no", "answer_type": "CLOSED"}]
    with pytest.raises(DataError, match=r'answer of a CLOSED question is "perhaps"'):
        write(tmp_path / "a", [{**truth[0], "answer": "perhaps"}], "pvqa")
    with pytest.raises(DataError, match=r'"answer_type" is "BOTH"'):
        write(tmp_path / "b", [{**truth[0], "answer_type": "BOTH"}], "pvqa")
    with pytest.raises(DataError, match=r'has no "yes_no_answer"'):
        write(tmp_path / "c", truth, "quilt")
    job = write(tmp_path / "d", truth, "pvqa")
    (tmp_path / "d" / "pvqa_test_w_ans.json").write_text(json.dumps([{**truth[0], "id": 2}]))
    with pytest.raises(DataError, match=r'1 question \("1"\) of .*without a record.*1 record \("2"\)'):
        open_job(job.task, tmp_path / "d", ["llava"])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(("A", "A"), ("A: cat", "A"), ("A.", "A"), ("The answer is B.", "B"), ("I think C", "I"), ("option D.", "D")),
        *(("(B)", "B"), ("", None), ("none", None)),
    ],
)
def test_the_originals_reading_of_pmc(text, letter):
    assert choices.pmc(text) == letter


@pytest.mark.parametrize("anchored", [False, True])
def test_pmc_is_the_originals(anchored, tmp_path):
    known = REFERENCE["pmc"]
    (tmp_path / "pmcvqa_test_wo_ans.json").write_text(json.dumps(known["questions"]))
    (tmp_path / "pmcvqa_images").mkdir()
    if anchored:
        lines(tmp_path / "anchor.jsonl", known["anchor"])
    job = open_job(load_task("pmc-vqa"), tmp_path, ["llava", "official"])
    said = lines(tmp_path / "said.jsonl", reversed(known["answers"]))
    values = score(job, [said]).protocols["llava"].values
    stated = f"Accuracy: {values['accuracy']:.2f}%, IMG-Accuracy: {values['image_accuracy']:.2f}%"
    assert known["stdout_anchor" if anchored else "stdout"].endswith(stated)
    answers = {str(line["question_id"]): line["text"] for line in known["answers"]}
    if not anchored:
        scores = pmc.score(job.questions, answers, {"parse": "llava"})
        assert {name: letter or "FAILED" for name, letter in scores.parsed.items()} == known["results"]
        fixed = pmc.score(job.questions, answers, {"parse": "fixed"})
        assert fixed.values["accuracy"] > scores.values["accuracy"]
        thought = next(name for name, text in answers.items() if text.startswith("I think"))
        assert scores.parsed[thought] == "I"
    first = next(q for q in job.questions if q.images)
    assert first.text.startswith("<image>\nq")
    assert first.text.endswith("D:w\nAnswer with the option's letter from the given choices directly.")
    assert first.choices == ("x", "y", "z", "w")


def test_pmc_reads_the_published_table_as_the_original_converts_it(tmp_path):
    (tmp_path / "pmcvqa_images").mkdir()
    head = "Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,in_quilt\n"
    row = '{}.jpg,"a, b"," What is\n it?"," A:x y"," B:z"," C:v"," D:w",{},{}\n'
    table = tmp_path / "subset.csv"
    table.write_text(
        head + row.format("a", "B", "True") + row.format("b", "C", "False") + row.format("c", "D", "False")
    )
    job = open_job(load_task("pmc-vqa"), tmp_path, ["llava"], named={"questions": str(table)})
    assert [(q.id, q.images[0].path, q.truth) for q in job.questions] == [("0", "b.jpg", "C"), ("1", "c.jpg", "D")]
    lines_ = ["<image>", "What is", "it?", "A:x y", "B:z", "C:v", "D:w"]
    assert job.questions[0].record["prompt"].split("\n")[:7] == lines_
    assert job.questions[0].choices == ("x y", "z", "v", "w")
    table.write_text(head + row.format("a", "B", "maybe"))
    with pytest.raises(DataError, match=r'row 1: "in_quilt" is "maybe"'):
        open_job(load_task("pmc-vqa"), tmp_path, ["llava"], named={"questions": str(table)})
