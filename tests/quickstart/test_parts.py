"""The parts' tokenizer and the batches that the contrastive loss sees; their training is the slow test's matter."""

import numpy as np
import pytest

from lapilli.quickstart.language import EOS, train_tokenizer
from lapilli.quickstart.questions import all_words, language_texts
from lapilli.quickstart.scenes import COLOUR_NAMES, NUMBERS, Digit, Scene
from lapilli.quickstart.vision import CAPTION_TOKENS, caption_ids, distinct_scenes


@pytest.fixture(scope="module")
def tokenizer():
    texts = language_texts(np.random.default_rng(0), 300, EOS)
    return train_tokenizer([*all_words() * 5, *texts])


def test_tokenizer_is_like_llamas(tokenizer):
    ids = tokenizer("a red seven")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    assert tokenizer("six</s>")["input_ids"][-1] == tokenizer.eos_token_id
    assert (
        tokenizer.decode(tokenizer("Ünknown ﬁgure 7!\n")["input_ids"], skip_special_tokens=True) == "Ünknown ﬁgure 7!\n"
    )


def test_every_answer_word_is_one_token(tokenizer):
    for word in (*NUMBERS, *COLOUR_NAMES):
        assert len(tokenizer.tokenize(f" {word}")) == 1, word


def test_longest_caption_fits_and_ends(tokenizer):
    caption = Scene((Digit(3, "yellow"), Digit(7, "purple"))).caption
    [row] = caption_ids([caption], tokenizer)
    assert row.shape == (CAPTION_TOKENS,)
    assert (row == tokenizer.eos_token_id).sum() == 1


def test_a_batch_has_no_caption_twice():
    scenes = distinct_scenes(np.random.default_rng(0), 200, ("red", "blue"))
    assert len({s.caption for s in scenes}) == 200
