"""GQA's numbers are those of its eval.py; what its files do not allow is left out and said."""

import pytest
from tests.support.benchmarks import SHORT, open_task, reference, score, submit, write

from lapilli.base.errors import DataError

QUESTIONS, TRUTH = "data/llava_gqa_testdev_balanced.jsonl", "data/testdev_balanced_questions.json"


@pytest.fixture
def known():
    return reference("gqa.json")


def test_numbers_are_the_evaluations(known, tmp_path):
    write(tmp_path / "all.json", known["questions"])
    (tmp_path / "data").mkdir()
    (tmp_path / "all.json").rename(tmp_path / QUESTIONS)  # GQA's own file of all questions
    write(tmp_path / TRUTH, {"1": {}})  # of another split, and not looked at
    write(tmp_path / "data/testdev_choices.json", known["choices"])
    job = open_task("gqa", tmp_path)
    assert job.questions[0].text.endswith(f"?{SHORT}")
    scores = score(job, known["answers"])
    assert scores.values == pytest.approx(known["values"], abs=1e-9)
    names = {"attr": "attribute", "cat": "category", "global": "scene", "obj": "object", "rel": "relation"}
    for kind, groups in known["groups"].items():
        for group, (value, count) in groups.items():
            name = names.get(group, group)
            assert scores.groups[kind][name]["accuracy"] == pytest.approx(value)
            assert scores.counts[kind][name] == count
    assert "outside the balanced set" in scores.notes[0]


def llava_files(data, known):
    balanced = {name: q for name, q in known["questions"].items() if q["isBalanced"]}
    asked = [
        {"question_id": name, "image": f"{q['imageId']}.jpg", "text": q["question"] + SHORT}
        for name, q in balanced.items()
    ]
    write(data / QUESTIONS, asked)
    write(data / TRUTH, balanced)
    return balanced


def test_llavas_files_give_accuracy_and_say_what_is_missing(known, tmp_path):
    balanced = llava_files(tmp_path, known)
    job = open_task("gqa", tmp_path)
    scores = score(job, {name: known["answers"][name] for name in balanced})
    for name in ("accuracy", "binary", "open", "distribution"):
        assert scores.values[name] == pytest.approx(known["values"][name])
    assert not {"consistency", "validity", "plausibility"} & scores.values.keys()
    assert "questions that follow from the balanced ones were not asked" in scores.notes[0]
    assert scores.notes[1].startswith("no validity and plausibility")


def test_predictions_file(known, tmp_path):
    balanced = llava_files(tmp_path, known)
    first, second = list(balanced)[:2]
    made = submit(open_task("gqa", tmp_path), {first: "Left..", second: "The Dog. "}, tmp_path / "out")
    assert made == [
        {"questionId": first, "prediction": "left"},
        {"questionId": second, "prediction": "the dog. "},  # a blank behind the period saves it, as in the original
    ]


def test_a_truth_of_another_split_is_refused(known, tmp_path):
    balanced = llava_files(tmp_path, known)
    lost = next(iter(balanced))
    write(tmp_path / TRUTH, {name: q for name, q in balanced.items() if name != lost})
    with pytest.raises(DataError, match=f"lacks 1 of the questions .first: {lost}.*another split"):
        open_task("gqa", tmp_path)


def test_without_truth_nothing_is_scored(known, tmp_path):
    llava_files(tmp_path, known)
    (tmp_path / TRUTH).unlink()
    assert {q.truth for q in open_task("gqa", tmp_path).questions} == {None}
