"""A user's own questions: read with every fault named, scored by plain rules."""

import json

import pytest

from lapilli.base.errors import DataError
from lapilli.evaluate.own import read, read_choice, score_choice, score_contains, score_exact
from lapilli.evaluate.task import Question, Task

TASK = Task(name="t", title="t", about="t", source=("t",), files={"questions": "q"}, reader="own")


def questions(tmp_path, *records, **options):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return read(TASK, {"questions": path}, options)


def test_pictures_stand_in_front_choices_behind_and_the_suffix_last(tmp_path):
    record = {"question_id": 7, "text": "Which?", "image": ["a.png", "b.png"], "choices": ["x", "y"], "answer": 1}
    (made,) = questions(tmp_path, record, suffix="\nLetter.")
    assert made.text == "<image>\n<image>\nWhich?\nA. x\nB. y\nLetter."
    assert [image.path for image in made.images] == ["a.png", "b.png"]
    assert (made.id, made.truth, made.record["question_id"]) == ("7", "B", 7)


def test_fields_have_the_names_that_the_options_say(tmp_path):
    (made,) = questions(
        tmp_path,
        {"id": "a", "question": "Hm <image>?", "picture": "a.png", "gold": ["x", 2], "year": 1999},
        id="id", text="question", image="picture", answer="gold", groups=["year"],
    )  # fmt: skip
    assert (made.text, made.truth, made.groups) == ("Hm <image>?", ("x", "2"), {"year": "1999"})


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{"question_id": 1, "text": "a"}, {"question_id": "1", "text": "b"}], '1 id ("1") on more than one question'),
        ([{"question_id": 1}], 'line 1: has no "text"'),
        ([{"question_ids": 1, "text": "a"}], '(did you mean "question_ids"?)'),
        ([{"question_id": True, "text": "a"}], '"question_id" must be str or int, not bool'),
        ([{"question_id": 1, "text": "<image> a"}], "1 <image> in the text, 0 pictures"),
        ([{"question_id": 1, "text": "a", "choices": ["x", "y"], "answer": "z"}], "one of the choices, a letter A-B"),
        ([{"question_id": 1, "text": "a", "choices": ["x", "y"], "answer": 2}], "from 0 to 1"),
        ([{"question_id": 1, "text": "a", "answer": {"x": 1}}], '"answer" must be a text or a list'),
        ([{"question_id": 1, "text": "a", "image": 3}], '"image" must be a text or a list'),
        ([[1]], "must be a JSON object, not int"),
        ([], "no questions in it"),
    ],
)
def test_what_is_wrong_with_a_record_is_said_with_its_place(tmp_path, records, said):
    with pytest.raises(DataError, match=r"q\.jsonl") as refused:
        questions(tmp_path, *records)
    assert said in str(refused.value)


def asked(truth, choices=(), **kinds):
    return Question(id="1", text="", truth=truth, choices=choices, groups=kinds)


@pytest.mark.parametrize(
    ("truth", "answer", "options", "right"),
    [
        (("a cat",), " A  Cat. ", {}, 1),
        (("a cat",), "A cat", {"ignore_case": False}, 0),
        (("a cat",), "a cat.", {"ignore_punctuation": False}, 0),
        (("a cat", "cat"), "cat", {}, 1),
        (("3.5",), "3.5.", {}, 1),
        (("3.5",), "35", {}, 0),
        (("-",), "-", {}, 1),
    ],
)
def test_exact(truth, answer, options, right):
    assert score_exact([asked(truth)], {"1": answer}, options).items == {"1": right}


@pytest.mark.parametrize(
    ("answer", "right"), [("There is a Cat.", 1), ("cats", 0), ("concatenate", 0), ("the red cat!", 1), ("", 0)]
)
def test_contains_whole_words(answer, right):
    assert score_contains([asked(("cat",))], {"1": answer}, {}).items == {"1": right}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", "B"), ("B.", "B"), ("(B)", "B"), ("B) a dog", "B"), ("B: a dog", "B"), ("a dog", "B"),
        ("A dog.", "B"), ("The answer is B.", "B"), ("The answer is (b)", "B"), ("Option C", "C"), 
        ("A cat and a dog", None),
        ("E", None), ("", None), ("A. a cat, the answer is B", None), ("I think so", None), ("nothing", "C"),
    ],
)  # fmt: skip
def test_the_choice_that_an_answer_names(answer, letter):
    assert read_choice(answer, ("a cat", "a dog", "nothing")) == letter


def test_choices_are_counted_by_group_and_unreadable_answers_said():
    made = [Question(id=str(i), text="", truth="A", choices=("x", "y"), groups={"k": "ab"[i % 2]}) for i in range(4)]
    scores = score_choice(made, {"0": "A", "1": "B", "2": "A", "3": "dunno"}, {})
    assert scores.values == {"accuracy": 50.0}
    assert scores.groups == {"k": {"a": {"accuracy": 100.0}, "b": {"accuracy": 0.0}}}
    assert scores.counts == {"k": {"a": 2, "b": 2}}
    assert scores.notes == ("1 of 4 answers name no choice; they count as wrong",)
