"""Answers files: ours survive a kill, anybody's are read, and what does not belong is refused."""

import json

import pytest

from lapilli.base.errors import DataError, RunError
from lapilli.data.sample import Image
from lapilli.evaluate.answers import AnswerLog, answer_line, join, read_answers
from lapilli.evaluate.task import Question


def question(name, text="<image>\nWhat?", **record):
    return Question(id=name, text=text, images=(Image(path="a.png"),), record=record)


def texts(questions, lines):
    return {name: line.text for name, line in join(questions, lines).answers.items()}


def write(path, *values):
    path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values))
    return path


def test_lines_have_the_originals_fields_and_the_records_own_id(tmp_path):
    line = answer_line(question("7", "<image>\nWhat?", question_id=7), "음식", "m", {"finish": "stop"})
    assert set(line) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert (line["question_id"], line["prompt"], line["text"]) == (7, "What?", "음식")
    other = answer_line(question("x#2", question_id="x", prompt="<image>\nas it is"), "y", "m", {})
    assert (other["question_id"], other["prompt"], other["metadata"]) == ("x", "<image>\nas it is", {"id": "x#2"})


def test_what_was_written_is_read_again_and_a_torn_line_is_cut_off(tmp_path, caplog):
    path = tmp_path / "answers.jsonl"
    with AnswerLog(path) as log:
        log.add(answer_line(question("1"), "하나", "m", {}))
        log.add(answer_line(question("2"), "둘", "m", {}))
    whole = path.read_bytes()
    for keep in range(len(whole) - 1, len(whole) // 2, -7):  # cut anywhere in the second line, inside a character too
        path.write_bytes(whole[:keep])
        assert [line.text for line in read_answers(path, torn=True)] == ["하나"]
    caplog.clear()
    with AnswerLog(path) as log:
        log.add(answer_line(question("3"), "셋", "m", {}))
    assert "not finished" in caplog.text
    assert [line.question_id for line in read_answers(path)] == ["1", "3"]
    path.write_bytes(b'{"question_id": 1, "te')
    assert read_answers(path, torn=True) == []
    with pytest.raises(DataError, match=r"answers\.jsonl: line 1: not JSON"):
        read_answers(path)


def test_one_process_at_a_time_writes_a_log(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerLog(path), pytest.raises(RunError, match="another process is writing"), AnswerLog(path):
        pass
    with AnswerLog(tmp_path / "answers.jsonl"):
        pass


def test_answers_of_other_systems(tmp_path):
    made = [question("1"), question("2")]
    right = {"1": "x", "2": "y"}
    lines = write(tmp_path / "a", {"question_id": 1, "text": "x"}, {"question_id": 2, "text": "y"})
    assert texts(made, read_answers(lines)) == right
    behind = tmp_path / "b"  # KoLLaVA's Q-Bench script writes no line breaks
    behind.write_text('{"id": "1", "question": "?", "response": "x"}{"id": "2", "question": "?", "response": "y"}')
    assert texts(made, read_answers(behind)) == right
    listed = tmp_path / "c"
    listed.write_text(json.dumps([{"questionId": "1", "prediction": "x"}, {"questionId": "2", "prediction": "y"}]))
    assert texts(made, read_answers(listed)) == right
    mapped = tmp_path / "d"
    mapped.write_text(json.dumps({"1": "x", "2": "y"}, indent=1))
    assert texts(made, read_answers(mapped)) == right


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"question_id": 1}, "needs a text"),
        ({"question_id": 1, "text": 3}, "needs a text"),
        ({"question_id": 1.5, "text": "x"}, "needs its question's id"),
        ({"question_id": None, "text": "x"}, "needs its question's id"),
        ([[3]], "an answer is a JSON object"),
    ],
)
def test_a_line_that_is_no_answer_is_refused_with_its_place(tmp_path, value, said):
    with pytest.raises(DataError, match="a: record 1") as refused:
        read_answers(write(tmp_path / "a", value))
    assert said in str(refused.value)


def test_ids_that_questions_share_are_told_apart_by_prompt_round_and_order(tmp_path):
    made = [
        question("p#1", "<image>\nHow many?", question_id="p"),
        question("p#2", "<image>\nWhat colour?", question_id="p"),
        question("p#3", "<image>\nWhat colour?", question_id="p"),
        question("r", question_id="r", answer_fields={"round_id": 0}),
        question("r@1", question_id="r", answer_fields={"round_id": 1}),
    ]
    path = write(
        tmp_path / "a",
        {"question_id": "p", "prompt": "What colour?", "text": "red"},
        {"question_id": "r", "round_id": 1, "prompt": "What?", "text": "second round"},
        {"question_id": "p", "prompt": "How many?", "text": "two"},
        {"question_id": "p", "prompt": "<image>\nWhat colour?", "text": "blue"},
        {"question_id": "r", "round_id": 0, "prompt": "What?", "text": "first round"},
    )
    found = texts(made, read_answers(path))
    assert found == {"p#1": "two", "p#2": "red", "p#3": "blue", "r": "first round", "r@1": "second round"}
    ours = [answer_line(q, f"to {q.id}", "m", {}) for q in reversed(made)]
    assert texts(made, read_answers(write(tmp_path / "b", *ours))) == {q.id: f"to {q.id}" for q in made}


def test_strangers_and_second_answers_are_counted_with_examples(tmp_path):
    path = write(
        tmp_path / "a",
        *({"question_id": i, "text": "x"} for i in (1, 8, 9, 10, 11, 1)),
    )
    joined = join([question("1"), question("2")], read_answers(path))
    with pytest.raises(DataError) as refused:
        joined.check("a")
    assert '4 answers ("8", "9", "10", ...) without a question' in str(refused.value)
    assert '1 answer ("1") to a question that has one already' in str(refused.value)
    assert "a: record 2" in str(refused.value)
    assert "a: record 6" in str(refused.value)
