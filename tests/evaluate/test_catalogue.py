"""Task files: complete, checked, and wrong ones told what is wrong."""

import pytest

from lapilli.base.errors import DataError, RecipeError
from lapilli.evaluate.catalogue import all_tasks, load_task, read_task, task_names
from lapilli.evaluate.files import digests, locate, read_overrides

GOOD = """
name: mine
title: Mine
about: x
source: [here]
files: {questions: q.jsonl, images: pictures}
optional: [images]
reader: own
scorer: exact
"""


def test_every_task_that_comes_with_lapilli_is_whole():
    for task in all_tasks():
        assert task.source, task.name
        assert task.about, task.name
        assert task.obtain, task.name
        assert task.title, task.name
    assert len(all_tasks()) == len(task_names())


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("titel: x", 'titel: unknown key (did you mean "title"?)'),
        ("options: {sufix: x}", 'options: unknown option "sufix" (did you mean "suffix"?)'),
        ("protocols: {llava: {ignorecase: true}}", 'protocols.llava: unknown option "ignorecase" (did you mean'),
        ("protocols: {lava: {}}", "lava"),
        ("submission: vqa9", 'submission: unknown submission "vqa9"'),
        ("decoding: {max_new_tokens: 0}", "decoding.max_new_tokens"),
        ("decoding: {max_tokens: 3}", "decoding.max_tokens: unknown key"),
    ],
)
def test_a_wrong_key_or_option_is_named_with_the_nearest(added, said):
    with pytest.raises(RecipeError) as refused:
        read_task(GOOD + added, "mine.yaml")
    assert "mine.yaml: " in str(refused.value)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("reader: own", "reader: onw", 'reader: unknown reader "onw" (did you mean "own"?)'),
        ("scorer: exact", "scorer: exactly", 'scorer: unknown scorer "exactly" (did you mean "exact"?)'),
        ("optional: [images]", "optional: [truth]", 'optional: "truth" is not one of its files (questions, images)'),
        ("name: mine", "name: a/b", "can't name a folder"),
        ("source: [here]", "", "source: is missing"),
    ],
)
def test_names_of_parts_are_checked(old, new, said):
    with pytest.raises(RecipeError, match=r"mine\.yaml") as refused:
        read_task(GOOD.replace(old, new), "mine.yaml")
    assert said in str(refused.value)


def test_an_unknown_task_and_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match='unknown task "no-such-task"'):
        load_task("no-such-task")
    with pytest.raises(RecipeError, match=r"no\.yaml: can't be read"):
        load_task(str(tmp_path / "no.yaml"))


def test_files_lie_in_the_tasks_folder_or_where_one_task_is_asked_for_in_the_data_folder(tmp_path):
    task = read_task(GOOD, "mine.yaml")
    (tmp_path / "q.jsonl").write_text("{}")
    assert locate(task, tmp_path) == {"questions": tmp_path / "q.jsonl"}
    with pytest.raises(DataError, match=r"mine/q.jsonl \(questions\)"):
        locate(task, tmp_path, alone=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "q.jsonl").write_text("{}")
    assert locate(task, tmp_path)["questions"] == tmp_path / "mine" / "q.jsonl"


def test_files_named_by_hand_and_files_that_are_missing(tmp_path):
    task = read_task(GOOD + "obtain: https://example.org/eval.zip", "mine.yaml")
    (tmp_path / "other.jsonl").write_text("abc")
    found = locate(task, tmp_path, read_overrides([f"questions={tmp_path}/other.jsonl"]))
    assert digests(found)["questions"]["sha256"].startswith("ba7816bf")
    with pytest.raises(DataError, match=r"task mine: no file .*q.jsonl \(questions\); get it: https://example.org"):
        locate(task, tmp_path)
    with pytest.raises(DataError, match=r"nowhere \(images\)"):  # optional, but asked for by name
        locate(task, tmp_path, {"questions": f"{tmp_path}/other.jsonl", "images": "nowhere"})
    with pytest.raises(RecipeError, match='unknown file of task mine "question"'):
        locate(task, tmp_path, {"question": "x"})
    with pytest.raises(RecipeError, match="PART=PATH"):
        read_overrides(["questions"])
