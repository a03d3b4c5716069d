"""MMBench: prompts and rounds as the original asks them, CircularEval, and the Excel file for the server."""

import base64
import json

import openpyxl
import pytest
from tests.support.benchmark_files import HEAD
from tests.support.benchmark_files import mmbench_file as write
from tests.support.benchmark_files import mmbench_row as row
from tests.support.tiny import make_picture

from lapilli.base.errors import DataError
from lapilli.evaluate import mmbench
from lapilli.evaluate.answers import answer_line, join, read_answers
from lapilli.evaluate.catalogue import load_task
from lapilli.evaluate.job import open_job
from lapilli.evaluate.run import score


@pytest.fixture
def pictures(tmp_path):
    made = []
    for seed in range(2):
        make_picture(tmp_path / f"{seed}.png", seed=seed)
        made.append(base64.b64encode((tmp_path / f"{seed}.png").read_bytes()).decode())
    return made


def open_(folder, task="mmbench"):
    return open_job(load_task(task), folder, ["llava", "official"])


def test_a_row_is_asked_as_the_original_asks_it(tmp_path, pictures):
    rows = [
        row(7, pictures[0], hint="Look\nclosely."),
        row(
            9, "7", options=("red", "N/A", "blue", "x"), answer="A"
        ),  # a picture named by its row, a choice pandas drops
    ]
    first, second = open_(write(tmp_path / "d", rows)).questions
    assert first.text == (
        "<image>\nLook\nclosely.\nWhat is it?\nA. a cat\nB. two dogs\nC. ice\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert second.text.split("\n")[1:-1] == ["What is it?", "A. red"]
    assert first.images[0].data == second.images[0].data == base64.b64decode(pictures[0])
    line = answer_line(first, "B", "m", {})
    assert line["prompt"] == "Look\nclosely.\nWhat is it?\nA. a cat\nB. two dogs\nC. ice"
    assert (line["question_id"], line["round_id"], line["option_char"]) == (7, 0, ["A", "B", "C"])
    assert "image" not in json.dumps(first.record)
    chinese = open_(write(tmp_path / "cn", rows, "mmbench_dev_cn_20231003.tsv"), "mmbench-cn").questions
    assert chinese[0].text.endswith("C. ice\n请直接回答选项字母。")


def test_rounds_rotate_the_choices_under_fixed_letters(tmp_path, pictures):
    job = open_(write(tmp_path / "d", [row(7, pictures[0]), row(1_000_007, pictures[0])]), "mmbench-circular")
    assert [q.id for q in job.questions] == ["7", "7-1", "7-2"]
    assert [q.choices for q in job.questions][1] == ("two dogs", "ice", "a cat")
    assert [q.truth for q in job.questions] == ["B", "A", "C"]
    for question in job.questions:  # the truth names the same text in every round
        assert question.choices["ABC".index(question.truth)] == "two dogs"
    # The original's lines tell the rounds apart by round_id.
    lines = [{"question_id": 7, "round_id": k, "text": q.truth} for k, q in enumerate(job.questions)]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    joined = join(job.questions, read_answers(path))
    joined.check("x")
    assert {name: line.text for name, line in joined.answers.items()} == {"7": "B", "7-1": "A", "7-2": "C"}


def test_a_question_is_right_if_every_rotation_is(tmp_path, pictures):
    rows = [row(k, pictures[0], category="naming" if k < 3 else "logic") for k in (1, 2, 3)]
    rows += [
        row(k + 1_000_000, pictures[0], "A", options=("two dogs", "ice", "a cat", ""), category=rows[k - 1]["category"])
        for k in (1, 2, 3)
    ]
    job = open_(write(tmp_path / "d", rows))
    said = {
        "1": "B",
        "1000001": "two dogs.",
        "2": "B",
        "1000002": "C",
        "3": "I think (B)",
        "1000003": "The answer is A",
    }
    scores = mmbench.score(job.questions, said, {})
    assert scores.items == {"1": 1.0, "2": 0.0, "3": 1.0}
    assert scores.values == {"accuracy": pytest.approx(200 / 3), "single_accuracy": 100.0}
    assert scores.groups["category"] == {"logic": {"accuracy": 100.0}, "naming": {"accuracy": 50.0}}
    assert scores.parsed["1000001"] == "A"
    missing = [q for q in job.questions if q.id == "1000003"]
    rest = mmbench.score([q for q in job.questions if q.id != "1000003"], said, {"missing": missing})
    assert rest.items["3"] == 0.0
    assert any("1 questions lack" in note for note in rest.notes)


def test_the_excel_file_has_the_servers_columns(tmp_path, pictures):
    head = [name for name in HEAD if name != "answer"]
    rows = [row(7, pictures[0], options=("a cat", "two dogs", "", "")), row(8, pictures[1])]
    folder = write(tmp_path / "d", rows, head=head)
    said = {"7": "=1+1", "8": "B\x0b"}
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps({"question_id": int(k), "text": v}) + "\n" for k, v in said.items()))
    results = score(open_(folder), [path], tmp_path / "out")
    assert results.protocols == {}
    sheet = openpyxl.load_workbook(results.submissions[0]).active
    assert [list(line) for line in sheet.iter_rows(values_only=True)] == [
        ["index", "question", "A", "B", "C", "D", "prediction", "split"],
        [7, "What is it?", "a cat", "two dogs", None, None, "=1+1", "dev"],
        [8, "What is it?", "a cat", "two dogs", "ice", None, "B", "dev"],
    ]
    assert sheet["G2"].data_type == "s"
    # Rotations made here are rows of their own, as in the server's files.
    job = open_(folder, "mmbench-circular")
    [made] = mmbench.submit(job.questions, {q.id: "A" for q in job.questions}, {}, tmp_path)
    table = [list(line) for line in openpyxl.load_workbook(made).active.iter_rows(values_only=True)]
    assert [line[0] for line in table[1:]] == [7, 1_000_007, 8, 1_000_008, 2_000_008]
    assert table[2][2:5] == ["two dogs", "a cat", None]


def test_faults_name_the_row(tmp_path, pictures):
    with pytest.raises(DataError, match=r"index 7: its image is not base64"):
        open_(write(tmp_path / "d", [row(7, "?!")]))
    with pytest.raises(DataError, match=r'index 7: answer "D" must be one of A, B, C'):
        open_(write(tmp_path / "d", [row(7, pictures[0], "D")]))
    with pytest.raises(DataError, match=r'1 id \("7"\) on more than one question'):
        open_(write(tmp_path / "d", [row(7, pictures[0]), row(7, pictures[0])]))
    with pytest.raises(DataError, match=r"no column A, image"):
        open_(write(tmp_path / "d", [row(7, pictures[0])], head=["index", "question", "B"]))
    with pytest.raises(DataError, match=r"index 7: has no choices"):
        open_(write(tmp_path / "d", [row(7, pictures[0], options=("nan", "b", "", ""))]))
