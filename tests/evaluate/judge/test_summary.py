"""Tables of reviews against the originals' printed ones."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lapilli.base.errors import DataError
from lapilli.cli.main import app
from lapilli.evaluate.judge.summary import choose_files, read_organs, summarise

REFERENCE = Path(__file__).parents[2] / "reference" / "eval"


@pytest.fixture
def llava(tmp_path):
    known = json.loads((REFERENCE / "gpt_review_summary.json").read_text())
    path = tmp_path / "gpt4_review.jsonl"
    path.write_text("".join(json.dumps(review) + "\n" for review in known["reviews"]))
    return path, known["stdout"]


@pytest.fixture
def quilt(tmp_path):
    known = json.loads((REFERENCE / "quilt_gpt_summary.json").read_text())
    path, context = tmp_path / "Qreview-gpt4.jsonl", tmp_path / "captions.jsonl"
    reviews = [{"question_id": i, "category": c, "tuple": t} for i, c, t, _ in known["reviews"]]
    path.write_text("".join(json.dumps(review) + "\n" for review in reviews))
    organs = [{"question_id": i, "type": organ, "text": "x"} for i, _, _, organ in reversed(known["reviews"])]
    context.write_text("".join(json.dumps(record) + "\n" for record in organs))
    return path, context, known["stdout"]


def test_llavas_table_is_the_originals(llava):
    path, printed = llava
    assert summarise(path, "llava").text() == printed
    assert summarise(path, "official").text() == printed  # every review of it can be read


def test_quilts_table_with_organs_is_the_originals(quilt):
    path, context, printed = quilt
    assert summarise(path, "llava", organs=read_organs(context)).text() == printed
    assert printed.count("\n") == 19


def test_a_review_that_is_unreadable_is_minus_one_only_for_the_original(tmp_path):
    path = tmp_path / "review_x.jsonl"
    reviews = [
        {"question_id": 1, "category": "conv", "tuple": [8, 4], "content": "8 4\nx"},
        {"question_id": 2, "category": "conv", "tuple": [-1, -1], "content": "8, 6\nx"},
        {"question_id": 3, "category": "conv", "tuple": [-1, -1], "content": "sorry"},
    ]
    path.write_text("".join(json.dumps(review) + "\n" for review in reviews))
    original, meant = summarise(path, "llava"), summarise(path, "official")
    assert original.rows[0].text() == "all 33.4 20.0 6.7"
    assert "2 of 3 reviews" in original.notes[0]
    assert meant.rows[0].text() == "all 62.5 80.0 50.0"
    assert (meant.rows[0].questions, meant.unreadable) == (2, {"no two scores": 1})
    low, high = meant.rows[0].ratio_interval
    assert (low, high) == (50.0, 75.0)
    assert summarise(path, "official", ignore={"1"}).rows[0].text() == "all 75.0 80.0 60.0"


def test_means_of_zero_have_no_ratio(tmp_path):
    path = tmp_path / "review.jsonl"
    path.write_text('{"question_id": 1, "tuple": [0, 4]}\n{"question_id": 2, "score": [0, 2]}\n')
    row = summarise(path, "llava").rows[0]
    assert (row.ratio, row.first, row.second, row.ratio_interval) == (None, 0.0, 30.0, None)


def test_grades_have_rows_for_each_capability(tmp_path):
    path = tmp_path / "reviews.jsonl"
    kinds = (("ocr", "1.0"), ("ocr, math", "0.5\nhalf"), ("math", "0"), ("math", "no"))
    path.write_text(
        "".join(
            json.dumps({"question_id": i, "category": c, "content": t, "metadata": {"style": "grade"}}) + "\n"
            for i, (c, t) in enumerate(kinds)
        )
    )
    table = summarise(path, "official")
    assert {row.name: (row.second, row.questions) for row in table.rows} == {
        "all": (50.0, 3),
        "any math": (25.0, 2),
        "any ocr": (75.0, 2),
        "math": (0.0, 1),
        "ocr": (100.0, 1),
        "ocr, math": (50.0, 1),
    }
    assert table.unreadable == {"no single score in the first line": 1}
    assert summarise(path, "llava") is None


def test_wrong_files_are_named(tmp_path, quilt):
    path, context, _ = quilt
    context.write_text('{"question_id": 0, "type": "Bone"}\n')
    with pytest.raises(DataError, match=r"325 questions .* not in --context"):
        summarise(path, "llava", organs=read_organs(context))
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"question_id": 1, "tuple": [8, 4]}\n' * 2)
    with pytest.raises(DataError, match="reviewed twice"):
        summarise(twice, "official")
    twice.write_text('{"question_id": 1, "tuple": 8}\n')
    with pytest.raises(DataError, match='line 1: "tuple"'):
        summarise(twice, "llava")


def test_files_are_chosen_as_the_original_chooses(tmp_path):
    folder = tmp_path / "answers"
    folder.mkdir()
    for name in ("gpt4_text_a-0613.jsonl", "reviews_b.jsonl", "review_c.jsonl", "other.jsonl", "review_d.txt"):
        (folder / name).write_text("")
    names = [path.name for path in choose_files([], str(folder))]
    assert names == ["gpt4_text_a-0613.jsonl", "review_c.jsonl", "reviews_b.jsonl"]
    assert [path.name for path in choose_files([], str(folder), "0613")] == ["gpt4_text_a-0613.jsonl"]
    assert [path.name for path in choose_files([], str(folder), None, ["_c"])] == ["review_c.jsonl"]
    with pytest.raises(DataError, match="no review files"):
        choose_files([], str(folder), None, ["zzz"])


def test_the_command_prints_the_table_with_old_spellings(llava, quilt):
    path, printed = llava
    run = CliRunner().invoke(app, ["judge", "summary", "--plain", "--protocol", "llava", "-f", str(path), str(path)])
    assert run.stdout == printed * 2
    table = CliRunner().invoke(app, ["judge", "summary", str(quilt[0]), "-c", str(quilt[1]), "--protocol", "official"])
    assert "Soft tissue" in table.stdout
    found = json.loads(CliRunner().invoke(app, ["judge", "summary", "--json", str(path)]).stdout)
    assert [one["protocol"] for one in found] == ["llava", "official"]
    assert found[0]["rows"][0]["ratio"] == 100.2
