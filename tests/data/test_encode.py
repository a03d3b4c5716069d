"""Encoding: every kind of tokenizer, lengths, pictures, refusals."""

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lapilli.base.errors import DataError, ModelError
from lapilli.base.layout import ImageLayout
from lapilli.data.encode import Encoder, TooLongError
from lapilli.data.sample import IGNORE, Image, Message, Sample, Text
from lapilli.data.template import get_template
from lapilli.data.tokenizer import load_tokenizer

REFERENCE = Path(__file__).parents[1] / "reference"
CORPUS = [
    "A chat between a curious user and an assistant.",
    "USER: What is it? ASSISTANT: a red cat</s>",
    "무엇 é \n\n x",
]
LAYOUT = ImageLayout(tile_height=4, tile_width=4, grid_height=2, grid_width=3)


def wrapped(tokenizer, **special):
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


def byte_level(trim_offsets):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return wrapped(tokenizer, bos_token="<s>", eos_token="</s>")


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return wrapped(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]", "</s>"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer, unk_token="[UNK]", eos_token="</s>")


def sentencepiece():
    tokenizer = load_tokenizer(REFERENCE / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


MAKERS = {
    "byte-level": lambda: byte_level(False),
    "byte-level trimmed": lambda: byte_level(True),
    "unigram": unigram,
    "wordpiece": word_piece,
    "sentencepiece": sentencepiece,
}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: make() for name, make in MAKERS.items()}


def conversation(*texts, images=()):
    """A Sample of alternating turns; the questions whose index is in `images` begin with a picture."""
    turns = []
    for i, text in enumerate(texts):
        picture = (Image(f"{i}.jpg"),) if i in images else ()
        turns.append(Message(("user", "assistant")[i % 2], (*picture, Text(text))))
    return Sample("s", tuple(turns), "data.json: record 1 (id s)")


def runs(ids, labels):
    pairs = groupby(zip(ids.tolist(), labels.tolist(), strict=True), key=lambda pair: pair[1] != IGNORE)
    return [[token for token, _ in run] for supervised, run in pairs if supervised]


words = st.lists(st.sampled_from(["cat", "a", "무엇", "é", "\n", " ", "x?", ".", "it", "👀"]), min_size=1, max_size=6)
answers = words.map(" ".join).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(words.map("".join), answers), min_size=1, max_size=3), st.booleans())
@pytest.mark.parametrize("template", ["vicuna_v1", "llava_llama_2", "v0", "chatml", "plain"])
@pytest.mark.parametrize("kind", MAKERS)
def test_supervised_tokens_are_the_answers(tokenizers, kind, template, exchanges, picture):
    if template == "plain":  # without a picture and a BOS there may be one token alone, which nothing predicts
        exchanges, picture = exchanges[:1], True
    tokenizer = tokenizers[kind]
    sample = conversation(*(t for exchange in exchanges for t in exchange), images=[0] if picture else [])
    encoder = Encoder(tokenizer, get_template(template), LAYOUT, "<image>")
    example = encoder.encode(sample)
    learnt = runs(example.input_ids, example.labels)
    assert len(learnt) == len(exchanges)
    end = {"vicuna_v1": "</s>", "llava_llama_2": " </s>", "v0": "\n###", "chatml": "<|im_end|>", "plain": "\n"}[
        template
    ]
    for run, (_, answer) in zip(learnt, exchanges, strict=True):
        text = tokenizer.decode(run, skip_special_tokens=False)
        expected = answer + end
        if kind in ("unigram", "wordpiece"):  # lossy: unknown characters, case, blanks
            kept = tokenizer.decode(tokenizer(expected, add_special_tokens=False)["input_ids"])
            text, expected = ("".join(t.replace("##", "").lower().split()) for t in (text, kept))
        # A token may hold the end of the prompt too, such as a line break that merges with the answer's own.
        assert text.lstrip() == expected.lstrip()
    assert (example.input_ids == encoder.image_token_id).sum() == 6 * picture
    assert [(s.tokens, example.input_ids[s.start]) for s in example.images] == [(6, encoder.image_token_id)] * picture


def test_exactly_one_bos(tokenizers):
    sample = conversation("Q", "A")
    for kind, first in (("sentencepiece", [1]), ("unigram", [1]), ("byte-level", [])):
        tokenizer = tokenizers[kind]
        ids = Encoder(tokenizer, get_template("vicuna_v1"), None, None).encode_unexpanded(sample)[0].tolist()
        assert ids[:1] == first or not first
        assert ids.count(tokenizer.bos_token_id) == len(first)
    tokenizer = sentencepiece()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    ids = Encoder(tokenizer, get_template("tokenizer"), None, None).encode_unexpanded(sample)[0].tolist()
    assert ids.count(1) == 1
    assert ids[0] == 1


def test_prompt_is_the_head_of_the_training_ids(tokenizers):
    """With the pictures at their places, also where several stand inside a question."""
    parts = (Text("left "), Image("a"), Text(" right "), Image("b"), Text(" which?"))
    sample = Sample("s", (Message("user", parts), Message("assistant", (Text("it"),))))
    for tokenizer in tokenizers.values():
        encoder = Encoder(tokenizer, get_template("vicuna_v1"), LAYOUT, "<image>")
        ids, slots = encoder.encode_prompt(sample.messages[:1])
        example = encoder.encode(sample)
        assert example.input_ids[: len(ids)].tolist() == ids.tolist()
        assert (example.labels[: len(ids)] == IGNORE).all()
        assert example.labels[len(ids)] != IGNORE
        assert example.images == slots
        assert [s.image.path for s in slots] == ["a", "b"]


def test_anyres_takes_places_by_size(tokenizers):
    layout = ImageLayout(
        mode="anyres", tile_height=336, tile_width=336, grid_height=24, grid_width=24,
        pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    )  # fmt: skip
    encoder = Encoder(tokenizers["sentencepiece"], get_template("vicuna_v1"), layout, "<image>")
    sample = conversation("Q", "A", "Q", "A", images=[0, 2])
    assert [s.tokens for s in encoder.encode(sample, [(640, 480), (300, 1000)]).images] == [2340, 2232]
    with pytest.raises(ValueError, match="anyres needs"):
        encoder.encode(sample)


class TestTooLong:
    sample = conversation("Q", "A cat", "Q", "A cat", "Q", "A cat", images=[4])

    def encoder(self, tokenizers, limit, policy):
        tokenizer = tokenizers["sentencepiece"]
        return Encoder(tokenizer, get_template("vicuna_v1"), LAYOUT, "<image>", max_length=limit, too_long=policy)

    def length(self, tokenizers, exchanges):
        head = Sample("s", self.sample.messages[: 2 * exchanges])
        return self.encoder(tokenizers, None, "error").encode(head).length

    def test_error_names_record_length_and_limit(self, tokenizers):
        full = self.length(tokenizers, 3)
        assert self.encoder(tokenizers, full, "error").encode(self.sample).length == full
        message = (
            rf"data.json: record 1 \(id s\): {full} tokens \(6 of them for pictures\), but max_length is {full - 1}"
        )
        with pytest.raises(TooLongError, match=message):
            self.encoder(tokenizers, full - 1, "error").encode(self.sample)

    def test_drop(self, tokenizers):
        encoded = self.encoder(tokenizers, self.length(tokenizers, 3) - 1, "drop").encode_noted(self.sample)
        assert encoded.example is None
        assert encoded.notes == ("dropped: longer than max_length",)

    @pytest.mark.parametrize("kept", [1, 2])
    @pytest.mark.parametrize("spare", [0, 3])
    def test_truncate_turns_keeps_whole_exchanges(self, tokenizers, kept, spare):
        limit = self.length(tokenizers, kept) + spare
        encoded = self.encoder(tokenizers, limit, "truncate_turns").encode_noted(self.sample)
        assert encoded.example.length == self.length(tokenizers, kept)
        assert encoded.example.images == ()
        assert encoded.notes == (f"last {6 - 2 * kept} turns dropped: longer than max_length",)

    def test_truncate_turns_with_a_too_long_first_exchange(self, tokenizers):
        encoded = self.encoder(tokenizers, 20, "truncate_turns").encode_noted(self.sample)
        assert encoded.example is None
        assert encoded.notes == ("dropped: even the first exchange is longer than max_length",)

    def test_truncate_turns_does_not_keep_a_dropped_opening_alone(self, tokenizers):
        sample = Sample("s", (Message("assistant", (Text("Hello"),)), *self.sample.messages))
        limit = self.length(tokenizers, 1)
        assert self.encoder(tokenizers, limit, "truncate_turns").encode(sample).length == limit
        assert self.encoder(tokenizers, limit - 1, "truncate_turns").encode(sample) is None


def test_nothing_to_learn_is_refused(tokenizers):
    encoder = Encoder(tokenizers["sentencepiece"], get_template("vicuna_v1"), LAYOUT, "<image>")
    for sample in (
        conversation("Q"),
        Sample("s", (Message("assistant", (Text("A"),)), Message("user", (Text("Q"),))), "data.json: record 1 (id s)"),
    ):
        with pytest.raises(DataError, match=r"data.json: record 1 \(id s\): nothing to learn"):
            encoder.encode(sample)


def test_image_token_written_as_text_is_refused(tokenizers):
    encoder = Encoder(tokenizers["sentencepiece"], get_template("vicuna_v1"), LAYOUT, "<image>")
    with pytest.raises(DataError, match="the text itself contains the image token <image>"):
        encoder.encode(conversation("what is <image>?", "A"))


def test_missing_image_token_is_refused(tokenizers):
    with pytest.raises(ModelError, match='does not hold the image token "<picture>"'):
        Encoder(tokenizers["sentencepiece"], get_template("vicuna_v1"), LAYOUT, "<picture>")


@pytest.mark.parametrize("roles", ["uu", "uaa", "us", "s", ""])
def test_roles_that_do_not_alternate_are_refused(tokenizers, roles):
    names = {"u": "user", "a": "assistant", "s": "system"}
    sample = Sample("s", tuple(Message(names[r], (Text("x"),)) for r in roles), "data.json: record 1")
    with pytest.raises(DataError, match=r"data\.json: record 1: "):
        Encoder(tokenizers["sentencepiece"], get_template("vicuna_v1"), LAYOUT, "<image>").encode(sample)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
SPACED = "{% for m in messages %}{{ ('[INST] %s [/INST]' if m.role == 'user' else ' %s</s>') % m.content }}{% endfor %}"


class TestTokenizersOwnTemplate:
    def learnt(self, source, sample):
        tokenizer = sentencepiece()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>"]})
        tokenizer.chat_template = source
        encoder = Encoder(tokenizer, get_template("tokenizer"), LAYOUT, "<image>")
        example = encoder.encode(sample)
        assert len(example.images) == len(sample.images)
        spans = encoder.template.training_spans(sample)
        return [span.text for span in spans if not isinstance(span, Image) and span.supervised], encoder

    def test_answers_are_found_even_where_their_words_stand_elsewhere(self):
        sample = conversation("is the assistant's answer yes?", "assistant", "yes", " yes ", images=[0])
        learnt, encoder = self.learnt(CHATML, sample)
        assert learnt == ["assistant<|im_end|>", "yes<|im_end|>"]
        assert encoder.template.stop == ("<|im_end|>", "</s>")

    def test_generation_marks_are_taken(self):
        assert self.learnt(MARKED, conversation("Q", "A", "A", "B"))[0] == ["A</s>", "B</s>"]

    def test_the_space_that_the_prompt_lacks_is_learnt(self):
        assert self.learnt(SPACED, conversation("Q", "A"))[0] == [" A</s>"]

    @pytest.mark.parametrize("change", ["m.content | upper", "m.content ~ m.content", "''"])
    def test_refused_where_answers_are_not_verbatim_and_once(self, change):
        with pytest.raises(DataError, match=r"data.json: record 1 .*: the answers can't be found verbatim"):
            self.learnt(CHATML.replace("m.content | trim", change), conversation("Q", "answer"))

    def test_a_tokenizer_without_one_is_refused(self):
        with pytest.raises(ModelError, match="has no chat_template"):
            self.learnt(None, conversation("Q", "A"))

    def test_exported_jinja_takes_pictures(self):
        _, encoder = self.learnt(CHATML, conversation("Q", "A"))
        encoder.tokenizer.chat_template = encoder.template.jinja()
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nQ"}]}]
        rendered = encoder.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert rendered == encoder.template.prompt([Message("user", (Image("a"), Text("\nQ")))])


def test_labels_are_ids_or_ignored_and_first_is_never_learnt(tokenizers):
    example = Encoder(tokenizers["byte-level"], get_template("chatml"), LAYOUT, "<image>").encode(
        conversation("Q", "A")
    )
    assert example.input_ids.dtype == example.labels.dtype == np.int64
    assert set(np.unique(example.labels[example.labels != example.input_ids])) == {IGNORE}
