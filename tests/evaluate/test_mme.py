"""MME's points: accuracy and accuracy+ by subject, as its calculation.py counts them."""

import random

import numpy as np
import pytest
from tests.support.benchmarks import SHORT, open_task, score, write

from lapilli.base.errors import DataError
from lapilli.evaluate import mme

ASK = " Please answer yes or no."


def files(data, subjects, pictures=3):
    """Each subject's pictures with two questions; one subject keeps its answers in a folder of their own."""
    asked, root = [], data / "MME_Benchmark_release_version"
    for number, subject in enumerate(subjects):
        folder = root / subject / ("questions_answers_YN" if number == 0 else "")
        folder.mkdir(parents=True)
        for i in range(pictures):
            lines = [f"Is it {n}? {ASK}\t{answer}" for n, answer in enumerate(("Yes", "No"))]
            (folder / f"{i}.txt").write_text("\n".join(lines) + "\n")
            name = f"{subject}/{i}.jpg"
            asked += [{"question_id": name, "image": name, "text": f"Is it {n}?{SHORT}"} for n in range(2)]
    write(data / "llava_mme.jsonl", asked)


def counted(rows):
    """MME's arithmetic, line by line: (subject, picture, truth, answer) to subject to (accuracy, accuracy+)."""
    made = {}
    for subject in dict.fromkeys(row[0] for row in rows):
        mine = [row for row in rows if row[0] == subject]
        right = [truth == said for _, _, truth, said in mine]
        pairs = [right[i] and right[i + 1] for i in range(0, len(right), 2)]
        made[subject] = 100 * sum(right) / len(right), 100 * sum(pairs) / len(pairs)
    return made


def test_points_are_those_of_its_arithmetic(tmp_path):
    subjects = ["artwork", "color", "OCR", "code_reasoning", "text_translation"]
    files(tmp_path, subjects)
    job = open_task("mme", tmp_path)
    drawn = random.Random(0)
    said = {q.id: drawn.choice(["Yes", "No", "yes.", "No, it is", "Maybe"]) for q in job.questions}
    scores = score(job, said)
    rows = [(q.groups["category"], mme.picture(q), q.truth, mme.read_answer(said[q.id])) for q in job.questions]
    wanted = counted(rows)
    for subject, (accuracy, plus) in wanted.items():
        assert scores.groups["category"][subject] == pytest.approx(
            {"accuracy": accuracy, "accuracy_plus": plus, "score": accuracy + plus}
        )
    perception = sum(map(sum, (wanted[name] for name in subjects[:3])))
    cognition = sum(map(sum, (wanted[name] for name in subjects[3:])))
    assert scores.values == pytest.approx(
        {"perception": perception, "cognition": cognition, "total": perception + cognition}
    )
    assert scores.counts["category"]["color"] == 6
    assert scores.again is not None
    assert len(scores.order) == 15  # pictures, not questions, are drawn again
    assert scores.again(np.arange(15)) == pytest.approx(perception)
    others = sum(mme.read_answer(text) == "other" for text in said.values())
    assert f"{others} of 30 answers are neither yes nor no" in scores.notes[0]
    assert "no questions of existence, count" in scores.notes[1]


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", "yes"), ("no.", "no"), ("NO", "no"), ("Not sure", "no"), (" yes", "yes"),
        ("Know it", "no"), ("It is. Yes", "other"), ("", "other"),
    ],
)  # fmt: skip
def test_the_first_four_letters_decide(answer, read):
    assert mme.read_answer(answer) == read


def test_questions_of_one_picture_have_ids_of_their_own_and_both_answers(tmp_path):
    files(tmp_path, ["artwork"], pictures=1)
    job = open_task("mme", tmp_path)
    assert [(q.id, q.truth) for q in job.questions] == [("artwork/0.jpg#1", "yes"), ("artwork/0.jpg#2", "no")]
    assert score(job, {"artwork/0.jpg#1": "Yes", "artwork/0.jpg#2": "No"}).values["perception"] == 200


def test_a_picture_with_one_question_is_refused(tmp_path):
    files(tmp_path, ["artwork"], pictures=2)
    path = tmp_path / "llava_mme.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r'1 picture \("artwork/1.jpg"\) without two questions'):
        open_task("mme", tmp_path)


def test_a_question_without_an_answer_is_named(tmp_path):
    files(tmp_path, ["artwork"], pictures=1)
    place = tmp_path / "MME_Benchmark_release_version" / "artwork" / "questions_answers_YN" / "0.txt"
    place.write_text(f"Is it 0?{ASK}\tYes\nIs it 7?{ASK}\tNo\n")
    with pytest.raises(
        DataError, match=r'1 of \d+ questions have no answer there; the first:\n.*line 2: "Is it 1\?" on'
    ):
        open_task("mme", tmp_path)
    place.write_text("Is it 0? Yes\n")
    with pytest.raises(DataError, match=r"0.txt: line 1: must be a question, a tab, and Yes or No"):
        open_task("mme", tmp_path)


def test_an_unknown_subject_is_refused(tmp_path):
    write(tmp_path / "llava_mme.jsonl", [{"question_id": "art/0.jpg", "image": "art/0.jpg", "text": "?"}] * 2)
    with pytest.raises(DataError, match=r'question_id "art/0.jpg" must begin with a subject'):
        open_task("mme", tmp_path)
