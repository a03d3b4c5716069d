"""Continuous batching: answers are those that each prompt gets alone, and what prompts share is computed once."""

import pytest
import torch
from tests.support.tiny import build_tiny, make_picture
from transformers import (
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Qwen2Config,
    Qwen3Config,
)

import lapilli
from lapilli.generate.decoding import Decoding
from lapilli.generate.slots_probe import why_not_slots

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 100,
}  # fmt: skip


class Joined:
    """As much of a joined model's configuration as the probe looks at."""

    def __init__(self, text_config):
        self.text_config = text_config


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        Qwen2Config(**SMALL),
        Qwen3Config(**SMALL, head_dim=8),
        MistralConfig(**SMALL, sliding_window=8),
        Gemma2Config(**SMALL, head_dim=8),
        GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
        GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=100),
    ],
    ids=lambda config: config.model_type,
)
def test_slots_give_the_logits_of_whole_texts(config):
    """Sliding windows, soft-capping and sinks included."""
    assert why_not_slots(Joined(config)) == ""


@pytest.mark.parametrize(
    "config",
    [
        MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=100),
        MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=100, state_size=8),
    ],
    ids=lambda config: config.model_type,
)
def test_what_slots_can_not_serve_is_found_out(config):
    assert why_not_slots(Joined(config)) != ""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return [make_picture(folder / f"{i}.jpg", seed=i) for i in range(3)]


def questions(pictures):
    asked = ["What is it?", "Why?", "Is the red dog on the left or on the right?", "Is it a bird?", "Where?"]
    return [(q, [p]) for p in pictures for q in asked] + [("What is it?", None), ("Why do you say so?", None)]


def test_every_answer_is_the_one_its_prompt_gets_alone(tiny, pictures):
    chats = questions(pictures)
    alone = [tiny.generate(*chat, max_new_tokens=6) for chat in chats]
    assert len(set(alone)) > 3
    for slots in (1, 3, 32):
        assert tiny.generate_batch(chats, max_new_tokens=6, batch_size=slots) == alone


def test_many_questions_about_one_picture_are_read_in_pieces(tiny, pictures):
    """Together they are longer than what one mask spans; the longest one is longer by itself."""
    words = ["the", "red", "dog", "on", "the", "left", "of", "the", "bird", "is", "it", "a", "cat", "or", "not"]
    chats = [(" ".join(words[i % 5 :] * (1 + 5 * (i == 4)) + words[: i % 7]), pictures[:1]) for i in range(9)]
    alone = [tiny.generate(*chat, max_new_tokens=6) for chat in chats]
    assert len(set(alone)) > 3
    assert tiny.generate_batch(chats, max_new_tokens=6, batch_size=9) == alone


def test_answers_of_different_lengths_leave_and_enter_at_any_time(tiny, pictures):
    prompts = [tiny.processor.prompt(*chat) for chat in questions(pictures)]
    decodings = [Decoding(max_new_tokens=1 + (5 * i) % 7) for i in range(len(prompts))]
    alone = [tiny.engine.generate([p], d)[0] for p, d in zip(prompts, decodings, strict=True)]
    assert tiny.engine.generate(prompts, decodings, batch_size=4) == alone


def test_a_picture_is_encoded_and_its_prefix_computed_once(tiny, pictures):
    scheduler = tiny.engine.scheduler(4)
    rows = []
    with torch.no_grad():
        for chat in questions(pictures[:2]):
            prompt = tiny.processor.prompt(*chat)
            rows.append(tiny.engine.growing(prompt, Decoding(max_new_tokens=3)))
            scheduler.add(rows[-1], prompt)
        while scheduler.waiting or scheduler.active:
            scheduler.step()
    assert all(row.ended for row in rows)
    assert scheduler.pictures == 2
    assert scheduler.calls["prefix"] == 3  # one for each picture, one for what questions without a picture share


def test_beams_find_an_answer_that_is_at_least_as_likely(tiny, pictures):
    prompt = tiny.processor.prompt("What is it?", pictures[:1])
    greedy, beams = (tiny.engine.generate([prompt], Decoding(8, num_beams=n))[0] for n in (1, 4))
    scores = [sum(tiny.engine.score(prompt, [a.token_ids])[0]) for a in (greedy, beams)]
    assert scores[1] >= scores[0] - 1e-4


def test_logprobs_are_those_of_the_whole_text(tiny, pictures):
    prompt = tiny.processor.prompt("What is it?", pictures[:1])
    answer = tiny.engine.generate([prompt], Decoding(6, logprobs=3))[0]
    assert [t.token_id for t in answer.logprobs] == list(answer.token_ids)
    assert all(t.top[0] == (t.token_id, pytest.approx(t.logprob)) for t in answer.logprobs)
    again = tiny.engine.score(prompt, [answer.token_ids, (5, 6)])
    assert again[0] == pytest.approx([t.logprob for t in answer.logprobs], abs=1e-4)
    assert len(again[1]) == 2


def test_a_prompt_beyond_the_memory_is_refused_with_the_reason(tiny, pictures, monkeypatch):
    from lapilli.base.errors import ModelError

    monkeypatch.setitem(tiny.engine.__dict__, "budget_tokens", 10)
    with pytest.raises(ModelError, match="there is memory for 10"):
        tiny.generate("What is it?", pictures[:1])


def test_a_small_memory_means_fewer_answers_at_a_time_and_the_same_answers(tiny, pictures, monkeypatch):
    chats = questions(pictures)
    expected = tiny.generate_batch(chats, max_new_tokens=4)
    monkeypatch.setitem(tiny.engine.__dict__, "budget_tokens", 150)
    assert tiny.generate_batch(chats, max_new_tokens=4) == expected


def test_a_vocabulary_without_an_image_token_needs_none(tmp_path, pictures):
    model = lapilli.load(build_tiny(tmp_path / "kept", keep_vocabulary=True))
    assert model.engine.never[0] >= model.model.get_output_embeddings().weight.shape[0]
    assert model.generate("What is it?", pictures[:1], max_new_tokens=3)


def test_thoughts_are_kept_apart():
    from lapilli.generate.text import without_thinking

    assert without_thinking("<think>a dog?\n</think>\n\na cat") == ("a dog?", "a cat")
    assert without_thinking("so\n</think> yes") == ("so", "yes")
    assert without_thinking("<think>never done") == ("never done", "")
    assert without_thinking("a < b") == ("", "a < b")
