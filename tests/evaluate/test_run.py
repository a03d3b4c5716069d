"""A whole evaluation with tiny models: asked once, resumed, shared, refused, compared."""

import json

import pytest
from tests.evaluate.conftest import SAYS
from tests.support.tiny import build_parrot

import lapilli
from lapilli.base.errors import DataError, RunError
from lapilli.evaluate.asking import continued
from lapilli.evaluate.compare import compare
from lapilli.evaluate.ranks import Rank
from lapilli.evaluate.results import read_items, read_results
from lapilli.evaluate.run import Settings, evaluate, score
from lapilli.generate.decoding import Decoding

MODEL = {"name": "parrot", "path": "x", "fingerprint": "1"}


class Bring:
    """Hands out an assistant and counts how often."""

    def __init__(self, assistant):
        self.assistant, self.times = assistant, 0

    def __call__(self):
        self.times += 1
        return self.assistant


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_written_and_scored_with_groups_and_interval(folder, parrot, tmp_path):
    (made,) = evaluate([folder.job()], tmp_path / "out", MODEL, lambda: parrot)
    assert read_results(tmp_path / "out" / "mine") == made
    found = made.protocols["llava"]
    assert found.values == {"accuracy": pytest.approx(100 * 8 / 12)}
    assert found.groups["kind"]["first"]["accuracy"] == pytest.approx(100 * 4 / 6)
    assert found.interval[0] < 100 * 8 / 12 < found.interval[1]
    assert (made.counts.asked, made.counts.answered, made.counts.missing, made.counts.cut) == (12, 12, 0, 0)
    assert {"lapilli", "torch", "transformers", "python"} <= set(made.versions)
    assert len(made.files["questions"]["sha256"]) == 64
    written = lines(tmp_path / "out" / "mine" / "answers.jsonl")
    assert {line["text"] for line in written} == {SAYS}
    assert {line["metadata"]["finish"] for line in written} == {"stop"}
    assert made.seconds == pytest.approx(sum(line["metadata"]["seconds"] for line in written), abs=0.01)
    assert read_items(tmp_path / "out" / "mine", "official")["1"] == 1.0


def test_answers_are_those_that_each_question_gets_alone(folder, tiny, tmp_path):
    job = folder.job(scorer="contains")
    evaluate([job], tmp_path / "out", MODEL, lambda: tiny, Settings(batch_size=5))
    found = {line["question_id"]: line["text"] for line in lines(tmp_path / "out" / "mine" / "answers.jsonl")}
    for question in job.asked[:5]:
        picture = folder.root / "pictures" / question.images[0].path
        assert found[int(question.id)] == tiny.answer(question.text, [picture], Decoding(12)).text
    assert len(set(found.values())) > 3  # else this shows nothing of the texts


def test_a_picture_is_opened_once_whatever_the_order_of_the_questions(folder, parrot, tmp_path, monkeypatch):
    from lapilli.evaluate import asking

    opened = []
    real = asking.open_image
    monkeypatch.setattr(asking, "open_image", lambda image, *rest: opened.append(image.path) or real(image, *rest))
    evaluate([folder.job()], tmp_path / "out", MODEL, lambda: parrot)
    assert sorted(opened) == ["0.png", "1.png", "2.png"]


def test_what_is_answered_is_not_asked_again(folder, parrot, tmp_path):
    out, bring = tmp_path / "out", Bring(parrot)
    (limited,) = evaluate([folder.job(limit=5)], out, MODEL, bring)
    assert (limited.counts.asked, limited.counts.limit) == (5, 5)
    assert "limited to the first 5 of 12 questions" in limited.notes[0]
    first = lines(out / "mine" / "answers.jsonl")
    with (out / "mine" / "answers.jsonl").open("a") as stream:
        stream.write('{"question_id": 9, "text": "killed he')
    (whole,) = evaluate([folder.job()], out, MODEL, bring)
    assert lines(out / "mine" / "answers.jsonl")[:5] == first
    assert len(lines(out / "mine" / "answers.jsonl")) == 12
    assert bring.times == 2
    (again,) = evaluate([folder.job()], out, MODEL, bring)
    assert bring.times == 2  # nothing is open, so no model is loaded
    assert again.protocols == whole.protocols


@pytest.mark.parametrize(
    ("model", "task", "said"),
    [
        ({"fingerprint": "2"}, {}, "model.fingerprint: 1 before, 2 now"),
        ({}, {"decoding": {"max_new_tokens": 13}}, "decoding.max_new_tokens: 12 before, 13 now"),
        ({}, {"options": {"suffix": "!"}}, "questions.sha256"),
        ({"path": "moved"}, {}, None),
        ({}, {"options": {"ignore_case": False}}, None),
    ],
)
def test_a_log_never_mixes_two_sources(folder, parrot, tmp_path, model, task, said):
    evaluate([folder.job(limit=2)], tmp_path / "out", MODEL, lambda: parrot)
    job = folder.job(limit=2, **task)
    if said is None:
        evaluate([job], tmp_path / "out", {**MODEL, **model}, lambda: parrot)
        return
    with pytest.raises(RunError, match="its answers come from something else") as refused:
        evaluate([job], tmp_path / "out", {**MODEL, **model}, lambda: parrot)
    assert said in str(refused.value)


def test_answers_without_an_origin_are_not_added_to(folder, parrot, tmp_path):
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "answers.jsonl").write_text('{"question_id": 1, "text": "x"}\n')
    with pytest.raises(RunError, match="lapilli score"):
        evaluate([folder.job()], tmp_path / "out", MODEL, lambda: parrot)


def test_missing_pictures_are_refused_before_a_model_is_loaded(folder, parrot, tmp_path):
    (folder.root / "pictures" / "1.png").unlink()
    bring = Bring(parrot)
    with pytest.raises(DataError, match="4 of 12 questions lack their picture") as refused:
        evaluate([folder.job()], tmp_path / "out", MODEL, bring, Settings(allow_missing=3))
    assert "q.jsonl: line 2" in str(refused.value)
    assert bring.times == 0
    (made,) = evaluate([folder.job()], tmp_path / "out", MODEL, bring, Settings(allow_missing=4))
    assert (made.counts.answered, made.counts.missing) == (8, 4)
    assert made.protocols["llava"].values == {"accuracy": 50.0}  # of the eight
    assert "4 of 12 questions have no answer" in made.notes[0]
    assert [line["id"] for line in lines(tmp_path / "out" / "mine" / "missing.jsonl")] == ["1", "4", "7", "10"]


def test_damaged_pictures_and_long_prompts_cost_only_their_questions(folder, parrot, tmp_path):
    picture = folder.root / "pictures" / "2.png"
    picture.write_bytes(picture.read_bytes()[:-200])
    records = lines(folder.root / "q.jsonl")
    records[0]["text"] = "long " * 600
    folder.questions(records)
    with pytest.raises(RunError, match="5 of 12 questions have no answer"):
        evaluate([folder.job()], tmp_path / "out", MODEL, lambda: parrot)
    reasons = {line["id"]: line["reason"] for line in lines(tmp_path / "out" / "mine" / "missing.jsonl")}
    assert "the model's context holds 512" in reasons["0"]
    assert all("damaged" in reasons[name] for name in ("2", "5", "8", "11"))
    (made,) = evaluate([folder.job()], tmp_path / "out", MODEL, lambda: parrot, Settings(allow_missing=5))
    assert made.counts.answered == 7


def test_one_tasks_failure_leaves_the_others_their_numbers(folder, parrot, tmp_path):
    jobs = [folder.job(), folder.job(name="good", limit=2)]
    picture = folder.root / "pictures" / "2.png"
    picture.write_bytes(picture.read_bytes()[:-200])
    seen = []
    with pytest.raises(RunError, match="task mine: 4 of 12"):
        evaluate(jobs, tmp_path / "out", MODEL, lambda: parrot, Settings(), seen.append)
    assert [made.task for made in seen] == ["good"]


def test_processes_share_the_questions_and_the_first_gathers(folder, tiny, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    (one,) = evaluate([folder.job()], alone, MODEL, lambda: tiny)
    assert evaluate([folder.job()], shared, MODEL, lambda: tiny, Settings(rank=Rank(1, 2))) == []
    assert not (shared / "mine" / "results.json").exists()
    (two,) = evaluate([folder.job()], shared, MODEL, lambda: tiny, Settings(rank=Rank(0, 2)))
    files = sorted((shared / "mine").glob("answers-*.jsonl"))
    assert [file.name for file in files] == ["answers-00-of-02.jsonl", "answers-01-of-02.jsonl"]
    assert sorted(len(lines(file)) for file in files) == [4, 8]  # three pictures of four questions each
    assert one.protocols == two.protocols
    texts = {line["question_id"]: line["text"] for file in files for line in lines(file)}
    assert texts == {line["question_id"]: line["text"] for line in lines(alone / "mine" / "answers.jsonl")}
    bring = Bring(tiny)
    evaluate([folder.job()], shared, MODEL, bring)  # alone again: all of it is there
    assert bring.times == 0


def test_a_reasoning_is_gone_on_with_in_the_models_own_turn(folder, tiny, tmp_path):
    follow_up = {"text": " ###\nANSWER:", "max_new_tokens": 4, "joined": "\nThe answer is "}
    job = folder.job(follow_up=follow_up, limit=3)
    evaluate([job], tmp_path / "out", MODEL, lambda: tiny)
    for line in lines(tmp_path / "out" / "mine" / "answers.jsonl"):
        question = next(q for q in job.asked if q.id == str(line["question_id"]))
        picture = folder.root / "pictures" / question.images[0].path
        first = tiny.answer(question.text, [picture], Decoding(12))
        prompt = tiny.processor.prompt(question.text, [picture])
        longer = continued(tiny, prompt, first, follow_up["text"])
        (second,) = tiny.engine.generate([longer], Decoding(4))
        assert line["text"] == f"{first.text}\nThe answer is {second.text}"


def test_what_a_model_thinks_aloud_is_kept_apart_and_not_scored(folder, models, tmp_path):
    thinks = lapilli.load(build_parrot(models / "thinks", "2</think>B."))
    folder.questions([{"question_id": 1, "text": "Which?", "answer": "B", "kind": "x"}])
    (made,) = evaluate([folder.job(decoding={"max_new_tokens": 20})], tmp_path / "out", MODEL, lambda: thinks)
    (line,) = lines(tmp_path / "out" / "mine" / "answers.jsonl")
    assert (line["text"], line["metadata"]["thinking"]) == ("B.", "2")
    assert made.protocols["llava"].values == {"accuracy": 100}


def test_answers_of_any_system_are_scored(folder, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"question_id": i, "text": SAYS, "model_id": "m"}) + "\n" for i in range(12)))
    made = score(folder.job(), [path], tmp_path / "out")
    assert made.protocols["official"].values == {"accuracy": pytest.approx(100 * 8 / 12)}
    assert (made.model, made.decoding, made.seconds) == ({"name": "m"}, None, None)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    with pytest.raises(RunError, match="2 of 12 questions have no answer"):
        score(folder.job(), [path])
    assert score(folder.job(), [path], allow_missing=2).counts.missing == 2
    with pytest.raises(DataError, match="to a question that has one already"):
        score(folder.job(), [path, path])


def test_two_models_are_compared_by_question(folder, tmp_path):
    for name, right in (("a", 3), ("b", 8)):
        path = tmp_path / f"{name}.jsonl"
        texts = ("no" if i % 3 == 0 else SAYS for i in range(12))
        made = [{"question_id": i, "text": text if i < right else "?"} for i, text in enumerate(texts)]
        path.write_text("".join(json.dumps(line) + "\n" for line in made))
        score(folder.job(), [path], tmp_path / name)
    one, other = compare(tmp_path / "a", tmp_path / "b" / "mine")
    assert (one.protocol, other.protocol) == ("llava", "official")
    found = one.difference
    assert (one.a, one.b) == (25.0, pytest.approx(100 * 8 / 12))
    assert found.value == pytest.approx(100 * 5 / 12)
    assert (found.a_better, found.b_better, found.p) == (0, 5, pytest.approx(2 / 2**5))
    assert found.low > 0
    with pytest.raises(DataError, match=r"no results\.json"):
        compare(tmp_path / "a", tmp_path / "data")


def test_without_public_answers_nothing_is_scored_and_that_is_said(folder, parrot, tmp_path):
    folder.questions([{"question_id": 1, "text": "What?", "kind": "x"}])
    (made,) = evaluate([folder.job()], tmp_path / "out", MODEL, lambda: parrot)
    assert made.protocols == {}
    assert "not public" in made.notes[0]
