"""POPE has the original's numbers, with labels joined by what was asked and not by the order of lines."""

import re

import numpy as np
import pytest
from tests.support.benchmarks import SHORT, open_task, reference, score, write

from lapilli.base.errors import DataError
from lapilli.evaluate import pope


def printed(text):
    """The original's output: category to its numbers."""
    made = {}
    for part in text.split("====================================")[:-1]:
        category = re.search(r"Category: (\w+)", part)[1]
        numbers = dict(re.findall(r"^([A-Z][\w ]*): ([\d.]+)$", part, re.MULTILINE))
        made[category] = {name: float(value) for name, value in numbers.items()}
    return made


def test_numbers_are_the_originals(tmp_path):
    known = reference("pope.json")
    write(tmp_path / "llava_pope_test.jsonl", known["questions"])
    job = open_task("pope", tmp_path)
    scores = score(job, {str(line["question_id"]): line["text"] for line in known["answers"]})
    wanted = printed(known["stdout"])
    assert scores.groups["category"].keys() == wanted.keys() == {"random", "popular", "adversarial"}
    for category, numbers in wanted.items():
        made = scores.groups["category"][category]
        for name, key in (("F1 score", "f1"), ("Accuracy", "accuracy"), ("Precision", "precision")):
            assert made[key] == pytest.approx(100 * numbers[name], abs=1e-9)
        assert made["recall"] == pytest.approx(100 * numbers["Recall"], abs=1e-9)
        assert made["yes_ratio"] == pytest.approx(100 * numbers["Yes ratio"], abs=1e-9)
        assert scores.counts["category"][category] == 60
    assert scores.values["f1"] == pytest.approx(100 * np.mean([n["F1 score"] for n in wanted.values()]))
    assert scores.again is not None
    assert scores.again(np.arange(180)) == pytest.approx(scores.values["f1"])


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("No", "no"), ("No.", "no"), ("no, there is", "no"), ("There is no dog", "no"), ("It is not", "no"),
        ("NO", "yes"), ("Nope", "yes"), ("None", "yes"), ("", "yes"), ("Yes. No", "yes"), ("Yes", "yes"),
    ],
)  # fmt: skip
def test_answers_are_read_as_the_original_reads_them(answer, read):
    assert pope.read_answer(answer) == read


def files(data, labels=("yes", "no")):
    """Two categories that number their questions alike; the label files are in the other order."""
    asked, number = [], 0
    for category in ("random", "popular"):
        for thing in ("dog", "cat"):
            number += 1
            asked.append(
                {"question_id": number, "image": "a.jpg", "text": f"Is there a {thing}?{SHORT}", "category": category}
            )
        truths = zip(("cat", "dog"), labels if category == "random" else labels[::-1], strict=True)
        rows = [
            {"question_id": i, "image": "a.jpg", "text": f"Is there a {thing}?", "label": label}
            for i, (thing, label) in enumerate(truths, 1)
        ]
        write(data / "coco" / f"coco_pope_{category}.jsonl", rows)
        (data / "coco" / f"coco_pope_{category}.jsonl").rename(data / "coco" / f"coco_pope_{category}.json")
    write(data / "llava_pope_test.jsonl", asked)


def test_labels_are_joined_by_category_picture_and_question(tmp_path):
    files(tmp_path)
    job = open_task("pope", tmp_path)
    assert [q.truth for q in job.questions] == ["no", "yes", "yes", "no"]


def test_a_question_without_a_label_is_refused(tmp_path):
    files(tmp_path)
    path = tmp_path / "coco" / "coco_pope_popular.json"
    path.write_text(path.read_text().replace("a cat?", "a cow?"))
    with pytest.raises(DataError, match=r'coco_pope_popular.json has no label of "Is there a cat\?" on a.jpg'):
        open_task("pope", tmp_path)


def test_a_label_other_than_yes_or_no_is_refused(tmp_path):
    files(tmp_path, labels=("yes", "No"))
    with pytest.raises(DataError, match='"label" must be yes or no'):
        open_task("pope", tmp_path)


def test_a_category_without_a_right_yes_counts_as_0_and_is_noted(tmp_path):
    files(tmp_path)
    job = open_task("pope", tmp_path)
    scores = score(job, {"1": "No", "2": "No", "3": "Yes", "4": "No"})
    assert scores.values["f1"] == pytest.approx(50)
    assert scores.notes == ("no right yes in random: F1 counts as 0 there",)
