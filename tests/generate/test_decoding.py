import pytest
import torch

from lapilli.base.errors import ModelError
from lapilli.generate.decoding import Answer, Decoding, Draws, draw

SCORES = torch.log(torch.tensor([0.5, 0.1, 0.3, 0.1]))


def frequencies(temperature, top_p, draws=2000):
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(SCORES, temperature, top_p, generator) for _ in range(draws)]
    return torch.bincount(torch.tensor(drawn), minlength=4) / draws


def test_draws_follow_the_probabilities():
    assert torch.allclose(frequencies(1.0, None), torch.tensor([0.5, 0.1, 0.3, 0.1]), atol=0.04)
    hot = torch.softmax(SCORES / 2, 0)
    assert torch.allclose(frequencies(2.0, None), hot, atol=0.04)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    assert torch.allclose(frequencies(1.0, 0.7), torch.tensor([0.625, 0.0, 0.375, 0.0]), atol=0.04)
    assert frequencies(1.0, 0.4, draws=50)[0] == 1.0
    assert (frequencies(1.0, 0.95) > 0).all()


def test_a_tiny_temperature_is_greedy():
    assert frequencies(1e-30, None, draws=20)[0] == 1.0


def test_draws_of_a_seed_are_the_same_whatever_is_drawn_beside_them():
    scores = torch.randn(50, generator=torch.Generator().manual_seed(1))
    warm = Decoding(temperature=1.0, seed=5)
    assert Draws(Decoding()).choose(scores) is None
    beside = Draws(Decoding(temperature=1.0, seed=6))
    first, second = Draws(warm), Draws(warm)
    drawn = [(first.choose(scores), beside.choose(scores)) for _ in range(5)]
    assert [second.choose(scores) for _ in range(5)] == [mine for mine, _ in drawn]


def test_top_k_keeps_the_likeliest_tokens():
    generator = torch.Generator().manual_seed(0)
    assert {draw(SCORES, 1.0, None, generator, top_k=2) for _ in range(200)} == {0, 2}


def test_without_a_seed_draws_differ_and_the_global_state_is_left_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    scores = torch.zeros(100_000)
    assert len({Draws(Decoding(temperature=1.0)).choose(scores) for _ in range(5)}) > 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_values_without_a_meaning_are_refused(fields, said):
    with pytest.raises(ModelError, match=said):
        Decoding(**fields)


def test_an_answer_says_why_it_ended_early():
    assert Answer("a", (1,), "stop", 3).note == ""
    assert "after 2 tokens (max_new_tokens)" in Answer("a", (1, 2), "length", 3).note
    assert "3 in the prompt" in Answer("a", (1, 2), "context", 3).note
