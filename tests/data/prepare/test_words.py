"""Word by word gives what whole texts give, or is not done."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from lapilli.data.prepare import words
from lapilli.data.prepare.words import WordTokens, whole_texts
from lapilli.data.tokenizer import load_tokenizer

REFERENCE = Path(__file__).parents[2] / "reference"
PARTS = (
    " ", "  ", "▁", "\n", " \n", "a", "the", "The", " dog", "é", "e\u0301", "日本語", "😀", "<s>", "</s>", "</s", "/s>",
    "<", "<unk>", "<0x41>", "\t", "\u00a0", "\0", ".", "USER:", "ing", "s",
)  # fmt: skip


@pytest.fixture(scope="module")
def backend():
    return load_tokenizer(REFERENCE / "tokenizer").backend_tokenizer


def test_gives_what_whole_texts_give(backend, monkeypatch):
    """Spaces in all places, added tokens whole and torn, bytes; also where what was learnt is forgotten meanwhile."""
    rng = random.Random(0)
    known = WordTokens.of(backend)
    for turn in range(60):
        monkeypatch.setattr(words, "MOST_LETTERS", 10**6 if turn % 10 else 0)
        texts = ["".join(rng.choices(PARTS, k=rng.randint(0, 25))) for _ in range(50)]
        for found, wanted in zip(known.tokens(texts), whole_texts(backend, texts), strict=True):
            np.testing.assert_array_equal(found, wanted)
            assert found.dtype == wanted.dtype


def test_what_is_known_is_not_asked_again(backend, monkeypatch):
    known = WordTokens.of(backend)
    before = known.tokens(["a dog</s>the dog"])
    monkeypatch.setattr(words, "whole_texts", None)
    found = known.tokens(["a dog</s>the dog", "the dog dog</s>"])
    assert found.counts.tolist()[0] == before.counts.tolist()[0]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("pre_tokenizer",), {"type": "Split", "pattern": {"String": "g"}, "behavior": "Isolated", "invert": False}),
        (("normalizer",), None),
        (("added_tokens", 1, "lstrip"), True),
        (("added_tokens", 1, "normalized"), True),
        (("model", "dropout"), 0.5),
        (("model", "ignore_merges"), True),
    ],
)
def test_other_tokenizers_are_asked_for_whole_texts(backend, path, value):
    said = json.loads(backend.to_str())
    place = said
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert WordTokens.of(Tokenizer.from_str(json.dumps(said))) is None


def test_a_merge_over_a_space_is_seen(backend):
    said = json.loads(backend.to_str())
    said["model"]["vocab"]["a▁"] = len(said["model"]["vocab"])
    said["model"]["merges"].insert(0, ["a", "▁"])
    joining = Tokenizer.from_str(json.dumps(said))
    assert joining.encode("q a b").tokens != backend.encode("q a b").tokens
    assert WordTokens.of(joining) is None
