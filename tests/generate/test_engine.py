import logging

import pytest

from lapilli.base.errors import DataError, ModelError
from lapilli.generate.decoding import Decoding


def answer(assistant, question="What is it?", images=None, **fields):
    return assistant.answer(question, images, Decoding(**fields))


def test_an_end_token_ends_the_answer_and_is_not_text(parrot, picture):
    got = answer(parrot, images=[picture])
    assert (got.text, got.finish) == ("a red dog 음식", "stop")
    assert got.token_ids[-1] == parrot.tokenizer.eos_token_id
    assert got.note == ""


def test_a_stop_string_stops_generation(endless):
    got = answer(endless, stop=("e bi",), max_new_tokens=100)
    assert (got.text, got.finish) == ("one blu", "stop")
    assert len(got.token_ids) < 10
    assert endless.generate("What is it?", stop="e bi", max_new_tokens=100) == "one blu"


def test_a_template_with_a_stop_string_needs_no_end_token(endless):
    endless.engine.stop = ("bird",)
    try:
        assert answer(endless, max_new_tokens=100).text == "one blue"
    finally:
        endless.engine.stop = endless.template.stop


def test_lengths_are_kept_and_said(endless):
    got = answer(endless, max_new_tokens=7)
    assert (got.finish, len(got.token_ids)) == ("length", 7)
    assert "max_new_tokens" in got.note


def test_a_full_context_cuts_the_answer_aloud(endless, monkeypatch, caplog):
    prompt = endless.processor.prompt("What is it?")
    assert endless.engine.context_tokens == 512
    monkeypatch.setattr(endless.engine, "context_tokens", prompt.length + 5)
    got = answer(endless)
    assert (got.finish, len(got.token_ids)) == ("context", 5)
    with caplog.at_level(logging.WARNING):
        endless.generate("What is it?")
    assert "context is full" in caplog.text


def test_a_prompt_that_fills_the_context_is_refused(endless, picture, monkeypatch):
    prompt = endless.processor.prompt("What is it?", [picture])
    monkeypatch.setattr(endless.engine, "context_tokens", prompt.length)
    with pytest.raises(ModelError, match=rf"{prompt.length} tokens \(16 of them for 1 pictures\)"):
        answer(endless, images=[picture])


def test_pieces_come_while_the_answer_grows(parrot, endless):
    pieces: list[str] = []
    assert parrot.generate("What is it?", stream=pieces.append) == "".join(pieces) == "a red dog 음식"
    assert len(pieces) > 3

    seen: list[str] = []
    got = endless.answer("What is it?", stream=seen.append, cancelled=lambda: len(seen) >= 3)
    assert got.finish == "cancelled"
    assert got.text == "".join(seen)
    assert len(got.token_ids) < 10


def test_a_batch_gives_each_prompt_the_answer_it_gets_alone(tiny, picture):
    chats = [("Hi", None), ("What is it?", [picture]), ("<image> or <image>, and why?", [picture, picture])]
    fields = {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9, "seed": 3}
    for how in ({"max_new_tokens": 8}, fields):
        alone = [tiny.generate(*chat, **how) for chat in chats]
        assert tiny.generate_batch(chats, batch_size=2, **how) == alone
        assert len(set(alone)) > 1


def test_each_prompt_of_a_batch_has_its_own_decoding(tiny, parrot):
    prompts = [parrot.processor.prompt(t) for t in ("a", "What is it? What is it?")]
    pieces: dict[int, str] = {0: "", 1: ""}

    def add(index, piece):
        pieces[index] += piece

    first, second = parrot.engine.generate(prompts, [Decoding(2), Decoding(stop=("음",))], on_text=add)
    assert (first.finish, len(first.token_ids)) == ("length", 2)
    assert (second.text, second.finish) == ("a red dog", "stop")
    assert pieces == {0: first.text, 1: second.text}


def test_seeds_make_draws_repeatable(tiny):
    draw = lambda seed: tiny.generate("What is it?", temperature=1.0, seed=seed, max_new_tokens=8)  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


def test_where_padding_is_not_ignored_only_equal_lengths_share_a_batch(parrot, monkeypatch, caplog):
    texts = ("a", "b", "What is it?", "c")
    prompts = [parrot.processor.prompt(t) for t in texts]
    lengths = [p.length for p in prompts]
    assert parrot.engine._batches(lengths, 8) == [[2, 0, 1, 3]]
    parrot.engine.__dict__.pop("alone_because")
    monkeypatch.setattr("lapilli.generate.engine.why_not_padded", lambda _config: "padding matters")
    try:
        with caplog.at_level(logging.WARNING):
            assert parrot.engine._batches(lengths, 8) == [[2], [0, 1, 3]]
            answers = parrot.engine.generate(prompts)
        assert caplog.text.count("padding matters") == 1
    finally:
        parrot.engine.__dict__.pop("alone_because")
    assert [a.text for a in answers] == ["a red dog 음식"] * 4


def test_the_image_token_is_never_an_answer(endless, picture):
    """Even a model that wants to say nothing else."""
    head = endless.model.language_model.get_output_embeddings().weight
    kept = head.detach().clone()
    head.data[endless.model.config.image_token_id] = 100 * head.data.sum(0)
    try:
        got = answer(endless, images=[picture], max_new_tokens=5)
    finally:
        head.data.copy_(kept)
    assert endless.model.config.image_token_id not in got.token_ids


def test_wrong_questions_are_refused_before_anything_runs(tiny, picture, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        tiny.generate("a", images=[tmp_path / "none.png"])
    with pytest.raises(DataError, match="1 places"):
        tiny.generate("<image>?", images=[picture, picture])
    with pytest.raises(ModelError, match="batch_size"):
        tiny.engine.generate([tiny.processor.prompt("a")], batch_size=0)
