"""ScienceQA reads, scores and converts as the original does, and says what is wrong with its files."""

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lapilli.base.errors import DataError, RecipeError
from lapilli.cli.data import app
from lapilli.evaluate import choices, scienceqa, scienceqa_forms
from lapilli.evaluate.catalogue import load_task
from lapilli.evaluate.job import open_job
from lapilli.evaluate.task import Question

REFERENCE = Path(__file__).parents[1] / "reference" / "eval"


def reference(name):
    return json.loads((REFERENCE / name).read_text())


def write(folder, problems, split=None, **files):
    folder.mkdir(exist_ok=True)
    (folder / "images" / "test").mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": split or list(problems)}))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def open_(folder, task="scienceqa", protocols=("llava", "official")):
    return open_job(load_task(task), folder, protocols)


def test_numbers_are_the_originals(tmp_path):
    known = reference("scienceqa.json")
    said = {line["question_id"]: line for line in known["predictions"]}
    asked = [
        {"id": name, "conversations": [{"from": "human", "value": said.get(name, {"prompt": "lost"})["prompt"]}]}
        | ({"image": f"{name}/image.png"} if "<image>" in said.get(name, {"prompt": ""})["prompt"] else {})
        for name in known["problems"]
    ]
    job = open_(write(tmp_path, known["problems"], **{"llava_test_CQM-A": asked}))
    answered = [q for q in job.questions if q.id in said]
    missing = [q for q in job.questions if q.id not in said]
    options = {**job.task.options_for("llava"), "missing": missing}
    scores = scienceqa.score(answered, {q.id: said[q.id]["text"] for q in answered}, options)

    results = known["results"]
    assert scores.values["accuracy"] == pytest.approx(results["acc"], abs=1e-9)
    assert sum(scores.items.values()) == results["correct"]
    assert len(scores.items) == results["count"]
    stated = f"Accuracy: {scores.values['accuracy']:.2f}%, IMG-Accuracy: {scores.values['image_accuracy']:.2f}%"
    assert stated in known["stdout"]
    # A missing answer is wrong among all, and unknown among those with a picture.
    lost = [q for q in answered if q.images][:1]
    rest = [q for q in answered if q not in lost]
    fewer = scienceqa.score(rest, {q.id: said[q.id]["text"] for q in rest}, {**options, "missing": [*missing, *lost]})
    pictured = [scores.items[q.id] for q in rest if q.images]
    assert len(fewer.items) == results["count"]
    assert fewer.values["image_accuracy"] == pytest.approx(100 * sum(pictured) / len(pictured))
    for question in answered:
        letter = scores.parsed[question.id]
        index = "ABCDE".index(letter) if letter and letter in "ABCDE"[: len(question.choices)] else -1
        assert index == results["results"][question.id]
    # The fixed reading finds what the original's loses, and never less.
    fixed = scienceqa.score(answered, {q.id: said[q.id]["text"] for q in answered}, job.task.options_for("official"))
    gained = [name for name, right in fixed.items.items() if right > scores.items[name]]
    assert gained
    forms = ("{}", "{}) c", "I think The answer is {}", "The answer is {0}. The answer is {0}.")
    assert {said[name]["text"] for name in gained} <= {form.format(x) for form in forms for x in "ABCDEabcde"}
    assert all(fixed.items[name] >= scores.items[name] for name in fixed.items)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("A.", None),
        ("A. cat", "A"),
        ("The answer is B.", "B"),
        ("The answer is B. The answer is C.", None),
        ("B)", None),
        ("b", None),
        ("Answer: C", None),
        ("", None),
        ("AB", None),
    ],
)
def test_the_originals_reading(text, letter):
    assert choices.scienceqa(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b\n", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. two", "B"),
        ("two", "B"),
        ("LECTURE: A choice a day. The answer is B", "B"),
        ("The answer is B. The answer is C.", None),
        ("The answer is E.", None),
        ("", None),
        ("I don't know", None),
        ("I think C", "C"),
        ("It is 'B': it floats", "B"),
        ("A cat, I'd say", None),
        ("A or B", None),
        ("A cat, so A", "A"),
        ("D", None),
    ],
)
def test_the_fixed_reading(text, letter):
    assert choices.fixed(text, ("one", "two", "three")) == letter


@pytest.mark.parametrize("name", list(reference("scienceqa_forms.json")["sha256"]))
def test_every_form_is_the_originals_to_the_byte(name, tmp_path):
    known = reference("scienceqa_forms.json")
    write(tmp_path, known["problems"], known["split"])
    for style, digest in zip(("llava", "jsonl"), known["sha256"][name], strict=True):
        path = scienceqa_forms.convert(tmp_path, "test", name, style)
        assert path.name in (f"llava_test_{name}.json", f"scienceqa_test_{name}.jsonl")
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] == digest
        if style == "llava" and name in known["files"]:
            assert json.loads(path.read_text()) == known["files"][name]


def test_the_verb_writes_the_file(tmp_path):
    known = reference("scienceqa_forms.json")
    write(tmp_path, known["problems"], known["split"])
    result = CliRunner().invoke(app, ["convert-scienceqa", str(tmp_path), "--split", "test", "--form", "QCM-ALE"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "llava_test_QCM-ALE.json").read_text()) == known["files"]["QCM-ALE"]


def test_unknown_forms_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r'unknown output form "LEPP" \(did you mean "LEPA"'):
        scienceqa_forms.convert(tmp_path, "test", "QCM-LEPP")


def test_prompts_are_the_same_made_here_or_read_from_the_originals_file(tmp_path):
    known = reference("scienceqa_forms.json")
    made = open_(write(tmp_path / "a", known["problems"], known["split"])).questions
    read = open_(
        write(tmp_path / "b", known["problems"], known["split"], **{"llava_test_CQM-A": known["files"]["CQM-A"]})
    ).questions
    assert [(q.id, q.text, q.images, q.truth) for q in made] == [(q.id, q.text, q.images, q.truth) for q in read]
    first = made[0]
    assert first.text.startswith("<image>\nContext: Look at the picture.")
    assert first.text.endswith("\nAnswer with the option's letter from the given choices directly.")
    assert first.images[0].path == "7/image.png"
    assert first.truth == "B"
    assert dict(first.groups)["grades"] == "7-12"
    assert [q.id for q in open_(tmp_path / "a", "scienceqa-img").questions] == ["7", "11"]
    assert not open_(tmp_path / "a", "scienceqa-lepa").questions[0].text.endswith("directly.")


def test_gpt4_numbers_are_the_originals(tmp_path):
    known = reference("scienceqa_gpt4.json")
    ours = {line["question_id"]: line["text"] for line in known["ours"]}
    job = open_(write(tmp_path, known["problems"], gpt4={"outputs": known["gpt4"]}))
    values = scienceqa.score(job.questions, ours, job.task.options_for("llava")).values
    stated = [values["gpt4_complement"], values["gpt4_complement_upper"], values["gpt4_no_answer"]]
    assert [line.rsplit(": ", 1)[1] for line in known["stdout"]] == [f"{value:.2f}%" for value in stated]

    write(tmp_path, known["problems"], gpt4={"outputs": known["gpt4_all"]})
    (tmp_path / "gpt4_requery.jsonl").write_text("".join(json.dumps(line) + "\n" for line in known["requery"]))
    job = open_(tmp_path)
    scores = scienceqa.score(job.questions, ours, job.task.options_for("llava"))
    names = ["gpt4_ours", "gpt4_alone", "gpt4_no_answer", "gpt4_complement", "gpt4_judge", "gpt4_judge_upper"]
    stated = [f"{scores.values[name]:.2f}%" for name in names]
    assert [line.rsplit(": ", 1)[1] for line in known["stdout_requery"]] == stated


def test_what_the_original_draws_by_chance_is_counted_and_the_same_again(tmp_path):
    known = reference("scienceqa_gpt4.json")
    job = open_(write(tmp_path, known["problems"], gpt4={"outputs": known["gpt4"]}))
    ours = {q.id: "I do not know." for q in job.questions}
    runs = [scienceqa.score(job.questions, ours, job.task.options_for("llava")) for _ in range(2)]
    assert runs[0] == runs[1]
    assert any("letters are drawn by chance" in note for note in runs[0].notes)
    fixed = scienceqa.score(job.questions, ours, job.task.options_for("official"))
    assert not any("chance" in note for note in fixed.notes)
    assert fixed.values["gpt4_complement"] <= 100 - fixed.values["gpt4_no_answer"]


def test_faults_name_file_and_record(tmp_path):
    problem = {"question": "q", "choices": ["a", "b"], "answer": 1, "hint": "", "image": None}
    with pytest.raises(DataError, match=r'1 problem \("9"\) of split test'):
        open_(write(tmp_path, {"1": problem}, ["1", "9"]))
    with pytest.raises(DataError, match=r'problem 1: "answer" is 2; there are choices 0 to 1'):
        open_(write(tmp_path, {"1": {**problem, "answer": 2}}))
    turns = [{"from": "human", "value": "q"}]
    other = {"llava_test_CQM-A": [{"id": "2", "conversations": turns}]}
    with pytest.raises(DataError, match=r'1 question \("1"\) of .* without a record .*; 1 record \("2"\)'):
        open_(write(tmp_path, {"1": problem}, **other))
    same = {"llava_test_CQM-A": [{"id": "1", "conversations": turns}] * 2}
    with pytest.raises(DataError, match=r'1 id \("1"\) on more than one record'):
        open_(write(tmp_path, {"1": problem}, **same))


def test_mmbench_reading():
    options = ("a red cat", "two dogs", "ice")
    read = {t: choices.mmbench(t, options) for t in ("B", "B.", "The answer is (C)", "two dogs", "A or B", "", "Z")}
    assert read == {"B": "B", "B.": "B", "The answer is (C)": "C", "two dogs": "B", "A or B": None, "": None, "Z": None}
    # A letter far from the end is an article, not an answer.
    assert choices.mmbench("A thing I see there is blue and shiny", options) is None
    assert isinstance(Question(id="1", text="q").choices, tuple)
