"""VQA accuracy has the numbers of LLaVA's evaluator and of the VQA evaluation, to the last of their quirks."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.benchmarks import SHORT, open_task, reference, score, submit, write

from lapilli.base.errors import DataError
from lapilli.evaluate import vqa
from lapilli.evaluate.task import Question
from lapilli.evaluate.vqa_files import asked_in


def test_answers_are_normalised_as_llava_does():
    wrong = [(text, made) for text, made in reference("vqa_normalisation.json") if vqa.normalise_llava(text) != made]
    assert not wrong


@pytest.mark.parametrize(
    ("text", "llava", "official"),
    [
        ("The cat's hat", "cat 's hat", "cat's hat"),
        ("1,000 cells/day", "1000 cells day", "1000 cellsday"),  # a comma in a number, and no mark becomes a blank
        ("yes,no", "yesno", "yes no"),
        ("3.", "3", "3"),
        ("3.5", "3.5", "3.5"),
        ("ten-speed", "10 speed", "10 speed"),
        ("shes Dont", "shes don't", "shes don't"),
        ("somebody'd", "somebodyd", "somebodyd"),
    ],
)
def test_the_two_normalisations(text, llava, official):
    assert vqa.normalise_llava(text) == llava
    assert vqa.normalise_official(text) == official


def test_only_32_periods_go():
    assert vqa.normalise_official("." * 40) == "." * 8


@given(st.text(alphabet="ab 1.,'s;-/\n", max_size=30))
def test_normalised_text_has_single_blanks_and_no_articles(text):
    words = vqa.normalise_llava(text).split(" ")
    assert words == [""] or all(words)
    assert "a" not in words


@pytest.mark.parametrize("kind", vqa.NORMALISATIONS)
def test_accuracy_is_the_evaluators(kind):
    known = reference("vqa_accuracy.json")
    asked = [
        Question(id=str(i), text="", truth=tuple(case["truths"]), groups={"answer_type": case["answer_type"]})
        for i, case in enumerate(known["cases"])
    ]
    answers = {str(i): case["answer"] for i, case in enumerate(known["cases"])}
    scores = vqa.score(asked, answers, {"normalisation": kind, "people": 10})
    assert [scores.items[q.id] for q in asked] == pytest.approx([case[kind] for case in known["cases"]], abs=1e-9)
    if kind == "official":
        assert scores.values["accuracy"] == pytest.approx(known["official"]["overall"], abs=1e-4)
        for name, value in known["official"]["perAnswerType"].items():
            assert scores.groups["answer_type"][name]["accuracy"] == pytest.approx(value, abs=1e-4)


def test_textvqa_number_is_llavas():
    known = reference("textvqa.json")
    asked = [Question(id=str(i), text="", truth=tuple(pair["gt_answers"])) for i, pair in enumerate(known["pairs"])]
    scores = vqa.score(asked, {str(i): p["pred_answer"] for i, p in enumerate(known["pairs"])}, {"people": 10})
    assert scores.values["accuracy"] == pytest.approx(100 * known["accuracy"], abs=1e-10)


def test_soft_accuracy_of_equal_answers():
    assert [vqa.leave_one_out(n, 10) for n in range(6)] == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])


def test_too_few_people_are_refused():
    one = Question(id="7", text="", truth=("red",), where="q.jsonl: line 1")
    with pytest.raises(DataError, match=r"line 1: 1 answers to question 7.*score it as exact"):
        vqa.score([one], {"7": "red"}, {})
    with pytest.raises(DataError, match="10 people were asked"):
        vqa.score([one], {"7": "red"}, {"people": 10})


# ---- files ---------------------------------------------------------------------------------------------------------


def vqav2_val(data, **annotation):
    write(
        data / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"questions": [{"question_id": 9, "image_id": 42, "question": "What is it?"}]},
    )
    people = [{"answer": "Dog's", "answer_id": i} for i in range(9)] + [{"answer": "cat", "answer_id": 9}]
    known = {"question_id": 9, "answer_type": "other", "question_type": "what is", "answers": people}
    write(data / "v2_mscoco_val2014_annotations.json", {"annotations": [{**known, **annotation}]})


def test_vqav2_val_by_both_protocols(tmp_path):
    vqav2_val(tmp_path)
    job = open_task("vqav2-val", tmp_path)
    (asked,) = job.questions
    assert asked.text == f"<image>\nWhat is it?{SHORT}"
    assert asked.images[0].path == "COCO_val2014_000000000042.jpg"
    assert score(job, {"9": "The dog's"}).values["accuracy"] == pytest.approx(100)
    official = score(job, {"9": "The dog's"}, "official")  # submitted as "dog 's", which is not what people said
    assert official.values["accuracy"] == 0
    assert official.groups["answer_type"] == {"other": {"accuracy": 0}}


def test_annotations_of_another_split_are_refused(tmp_path):
    vqav2_val(tmp_path, question_id=10)
    with pytest.raises(DataError, match=r"1 of \d questions have no answer there; the first:\n.*question 9"):
        open_task("vqav2-val", tmp_path)


def test_submission_has_every_question_of_test2015(tmp_path):
    asked = [{"question_id": i, "image": f"{i}.jpg", "text": f"{i}?{SHORT}"} for i in range(5)]
    write(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", asked)
    write(tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl", asked[1:3])
    job = open_task("vqav2", tmp_path)
    made = submit(job, {"1": "Two Dogs.", "2": "no, it's not"}, tmp_path / "out")
    assert made == [
        {"question_id": 0, "answer": ""},
        {"question_id": 1, "answer": "2 dogs"},
        {"question_id": 2, "answer": "no it 's not"},
        {"question_id": 3, "answer": ""},
        {"question_id": 4, "answer": ""},
    ]
    write(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", asked[2:])
    with pytest.raises(DataError, match=r'lacks 1 question \("1"\)'):
        submit(job, {"1": "a", "2": "b"}, tmp_path / "out")


def test_vizwiz_submission_and_val(tmp_path):
    asked = [{"question_id": f"{i}.jpg", "image": f"{i}.jpg", "text": f"{i}?{SHORT}"} for i in range(2)]
    write(tmp_path / "llava_test.jsonl", asked)
    made = submit(open_task("vizwiz", tmp_path), {"1.jpg": "Unanswerable."}, tmp_path / "out")
    assert made == [{"image": "0.jpg", "answer": ""}, {"image": "1.jpg", "answer": "unanswerable"}]

    people = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 4 + [{"answer": "soup"}] * 6
    record = {"image": "0.jpg", "question": "What?", "answers": people, "answer_type": "unanswerable", "answerable": 0}
    write(tmp_path / "val.json", [record])
    job = open_task("vizwiz-val", tmp_path)
    assert job.questions[0].text == (
        "<image>\nWhat?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        "\nAnswer the question using a single word or phrase."
    )
    for protocol in ("llava", "official"):
        assert score(job, {"0.jpg": "Unanswerable"}, protocol).values["accuracy"] == pytest.approx(100)


# ---- TextVQA -------------------------------------------------------------------------------------------------------


def textvqa(data):
    texts = [f"What is {i}?\nReference OCR token: A, B{SHORT}" for i in range(2)] + [f"What is it?{SHORT}"]
    images = ["x", "x", "y"]
    write(
        data / "llava_textvqa_val_v051_ocr.jsonl",
        [{"question_id": n, "image": f"{n}.jpg", "text": t} for n, t in zip(images, texts, strict=True)],
    )
    truths = [("x", "what is 0?", "a"), ("x", "What is 1?", "b"), ("y", "what is it?", "c")]
    write(
        data / "TextVQA_0.5.1_val.json",
        {"data": [{"image_id": n, "question": q, "answers": [a] * 10} for n, q, a in truths]},
    )


def test_textvqa_joins_by_picture_and_question(tmp_path):
    textvqa(tmp_path)
    job = open_task("textvqa", tmp_path)
    assert [(q.id, q.truth[0]) for q in job.questions] == [("x#1", "a"), ("x#2", "b"), ("y", "c")]
    assert score(job, {"x#1": "a", "x#2": "a", "y": "c"}).values["accuracy"] == pytest.approx(200 / 3)


def test_textvqa_without_ocr_tokens(tmp_path):
    textvqa(tmp_path)
    job = open_task("textvqa-noocr", tmp_path)
    assert [q.text for q in job.questions[:2]] == [f"<image>\nWhat is {i}?{SHORT}" for i in range(2)]
    assert [q.truth[0] for q in job.questions] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "prompt",
    [
        "OCR tokens: a, b. Question: What Is it? Short answer:",
        "Reference OCR token: a\nWhat is it?\nAnswer.",
        "What is it?\nReference OCR token: a\nAnswer.",
        "What is it?\nAnswer.",
    ],
)
def test_questions_of_every_prompt_form(prompt):
    assert asked_in(prompt, "here") == "what is it?"


def test_an_unknown_prompt_form_is_refused(tmp_path):
    textvqa(tmp_path)
    write(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", [{"question_id": "x", "image": "x.jpg", "text": "What is 0?"}])
    with pytest.raises(DataError, match=r"line 1: can't tell the question"):
        open_task("textvqa", tmp_path)


def test_a_question_without_text_is_named(tmp_path):
    (tmp_path / "llava_test.jsonl").write_text(json.dumps({"question_id": "a", "image": "a.jpg", "txt": "?"}) + "\n")
    with pytest.raises(DataError, match=r'line 1: has no "text" \(did you mean "txt"\?\)'):
        open_task("vizwiz", tmp_path)
