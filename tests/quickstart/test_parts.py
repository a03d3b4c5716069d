"""The parts' tokenizer and the batches that the contrastive loss sees; their training is the slow test's matter."""

import numpy as np
import pytest

from lapilli.quickstart.language import encode, pad, train_tokenizer
from lapilli.quickstart.questions import Dialogue, Question, all_words, random_dialogue
from lapilli.quickstart.scenes import COLOUR_NAMES, NUMBERS, Digit, Scene
from lapilli.quickstart.vision import CAPTION_TOKENS, caption_ids, distinct_scenes


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    turns = [turn for _ in range(60) for turn in random_dialogue(rng).turns()]
    return train_tokenizer([*all_words() * 5, *(text for turn in turns for text in turn)])


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


def test_only_answers_and_their_ends_are_supervised(tokenizer):
    asked = (Question("", "Which digit is it?", "six"), Question("", "What colour?", "red"))
    rows = [encode(Dialogue(lead, asked), tokenizer) for lead in ("a red six\n", "")]
    ids, labels = pad(rows, tokenizer.pad_token_id)
    assert ids.shape == labels.shape
    assert tokenizer.decode(ids[0]) == (
        "<s>USER: a red six\nWhich digit is it? ASSISTANT: six</s>USER: What colour? ASSISTANT: red</s>"
    )
    for row, wanted in zip(labels, ids, strict=True):
        assert tokenizer.decode(row[row != -100]) == " six</s> red</s>"
        assert (row[row != -100] == wanted[row != -100]).all()
