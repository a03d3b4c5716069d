"""Ids and labels against the original's, row by row, and supervision checked without using spans."""

import gzip
import json
from itertools import groupby
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import LlamaTokenizer

from lapilli.base.layout import ImageLayout
from lapilli.data.encode import Encoder
from lapilli.data.read.llava import RawRecord, parse
from lapilli.data.sample import IGNORE
from lapilli.data.template import get_template
from lapilli.data.tokenizer import load_tokenizer

REFERENCE = Path(__file__).parents[1] / "reference"
TEMPLATES = ["v1", "v1_mmtag", "llava_llama_2", "mistral_instruct", "plain", "v0", "v0_mmtag", "mpt"]
RIGHT_IN_THE_ORIGINAL = {"v1": 72, "v1_mmtag": 69, "llava_llama_2": 120, "mistral_instruct": 120, "plain": 120}
END = {"v0": "\n###", "v0_mmtag": "\n###", "mpt": "<|im_end|>", "plain": "\n", "llava_llama_2": " </s>"}
END |= {"mistral_instruct": " </s>", "v1": "</s>", "v1_mmtag": "</s>"}


def rows(name):
    with gzip.open(REFERENCE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sample_of(row, placement):
    value = {"id": "row", "conversations": row["conversations"]}
    if row["has_image"]:
        value["image"] = "picture.jpg"
    return parse(RawRecord("reference", 1, value), placement)


@pytest.fixture(scope="module")
def tokenizers():
    def make(legacy, chatml):
        made = LlamaTokenizer.from_pretrained(REFERENCE / "tokenizer", add_bos_token=True, legacy=legacy)
        if chatml:
            made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        return made

    return {(legacy, chatml): make(legacy, chatml) for legacy in (True, False) for chatml in (True, False)}


def encoded(row, tokenizers):
    tokenizer = tokenizers[row["legacy"], row["template"] == "mpt"]
    template = get_template(row["template"])
    encoder = Encoder(tokenizer, template, None, None, im_start_end=row["mm_use_im_start_end"])
    ids, labels = encoder.encode_unexpanded(sample_of(row, "front"))
    return ids.tolist(), labels.tolist()


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_of_every_row_and_labels_where_the_original_is_right(template, tokenizers):
    labels_compared = 0
    for number, row in enumerate(rows(f"masks/{template}")):
        ids, labels = encoded(row, tokenizers)
        assert ids == row["input_ids"], number
        if template in RIGHT_IN_THE_ORIGINAL and not row["mismatch"]:
            assert labels == row["labels"], number
            labels_compared += 1
    assert labels_compared == RIGHT_IN_THE_ORIGINAL.get(template, 0)


def learnt_texts(ids, labels, tokenizer):
    """The supervised tokens, run by run, as text."""
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    runs = [
        [token for token, _ in run]
        for supervised, run in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORE)
        if supervised
    ]
    return [tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False) for run in runs]


@pytest.mark.parametrize("template", TEMPLATES)
def test_exactly_the_answers_and_their_end_marks_are_supervised(template, tokenizers):
    """Wherever the original's own labels drift or are empty too."""
    for number, row in enumerate(rows(f"masks/{template}")):
        ids, labels = encoded(row, tokenizers)
        turns = row["conversations"]
        if turns[0]["from"] == "gpt" and not template.startswith("v0"):
            turns = turns[1:]
        answers = [turn["value"] + END[template] for turn in turns if turn["from"] == "gpt"]
        learnt = learnt_texts(ids, labels, tokenizers[row["legacy"], template == "mpt"])
        assert [text.lstrip(" ") for text in learnt] == [answer.lstrip(" ") for answer in answers], number


@pytest.mark.parametrize("template", ["llava_v1", "v0"])
def test_june_2023_ids(template):
    layout = ImageLayout(tile_height=4, tile_width=4, grid_height=4, grid_width=4)
    dated = get_template(f"{template}-2023-06")
    for number, row in enumerate(rows(f"v0-2023/training-{template}")):
        tokenizer = load_tokenizer(REFERENCE / "tokenizer")
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in row["added_tokens"]])
        assert {t: tokenizer.convert_tokens_to_ids(t) for t in row["added_tokens"]} == row["added_tokens"]
        sample = sample_of(row, "keep")
        if row["sep_image_conv_front"]:
            sample = dated.separate_pictures(sample)
        example = Encoder(tokenizer, dated, layout, "<im_patch>", im_start_end=row["mm_use_im_start_end"]).encode(
            sample
        )
        assert example.input_ids.tolist() == row["input_ids"], number
        if template == "llava_v1":
            assert example.labels.tolist() == row["labels"], number
        else:
            answers = [turn["value"] + "\n###" for turn in row["conversations"] if turn["from"] == "gpt"]
            learnt = learnt_texts(example.input_ids.tolist(), example.labels.tolist(), tokenizer)
            assert [text.lstrip(" ") for text in learnt] == answers, number
