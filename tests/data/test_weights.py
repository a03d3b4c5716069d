"""Weights of parts: from a Sample's parts to each token's share of the loss."""

import numpy as np
import pytest

from lapilli.base.errors import DataError
from lapilli.data.encode import Encoder
from lapilli.data.sample import IGNORE, Image, Message, Sample, Text
from lapilli.data.template import TOKENIZER, get_template

PLAIN_JINJA = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{% if m.role == 'assistant' %}~{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def shares(example, tokenizer):
    """The supervised text by weight, in order: [(text, weight), ...]."""
    weights = (example.labels != IGNORE).astype(float) if example.weights is None else example.weights
    runs = []
    for token, label, weight in zip(example.input_ids, example.labels, weights, strict=True):
        assert (weight > 0) == (label != IGNORE)
        if weight:
            letter = tokenizer.convert_ids_to_tokens(int(token))
            if runs and runs[-1][2]:
                joined = runs[-1][1] == weight
                runs[-1] = (runs[-1][0] + letter, weight, True) if joined else runs[-1]
                if joined:
                    continue
            runs.append((letter, float(weight), True))
        elif runs:
            runs[-1] = (*runs[-1][:2], False)
    return [run[:2] for run in runs]


def conversation(*parts, question=("Q",), weight=1.0):
    made = (tuple(Text(p) if isinstance(p, str) else p for p in side) for side in (question, parts))
    return Sample("s", tuple(Message(r, p, weight) for r, p in zip(("user", "assistant"), made, strict=True)), "f")


@pytest.fixture(params=["v1", TOKENIZER])
def encode(request, make_encoder):
    own = make_encoder()
    own.tokenizer.chat_template = PLAIN_JINJA
    encoder = Encoder(own.tokenizer, get_template(request.param), own.layout, "<image>")
    mark = {"v1": (" ", "</s>"), TOKENIZER: ("", "~")}[request.param]
    return lambda sample: encoder.encode(sample, [(4, 4)] * len(sample.images)), mark, own.tokenizer


def test_fractions_become_weights_and_ones_and_zeros_do_not(encode):
    run, (lead, end), tokenizer = encode
    given = run(conversation(Text("one", 1), Text("half", 0.5), Text("none", 0), Text("three", 3)))
    assert shares(given, tokenizer) == [(lead + "one", 1), ("half", 0.5), ("three" + end, 3)]
    assert given.weights is not None
    assert given.weights.dtype == np.float32
    given = run(conversation(Text("one", 1), Text("none", 0), "more"))
    assert shares(given, tokenizer) == [(lead + "one", 1), ("more" + end, 1)]
    assert given.weights is None


def test_the_end_mark_counts_as_the_last_words_do(encode):
    run, (lead, _), tokenizer = encode
    assert shares(run(conversation(Text("a", 1), Text("b", 0))), tokenizer) == [(lead + "a", 1)]
    assert shares(run(conversation("a", Text("b", 2), weight=0.25)), tokenizer)[0] == (lead + "a", 0.25)


def test_questions_are_trained_where_a_part_says_so_and_pictures_never(encode):
    run, (lead, end), tokenizer = encode
    given = run(conversation("A", Image("a"), "B", question=("look ", Image("q"), Text("here", 0.5), "!")))
    found = shares(given, tokenizer)
    assert found == [("here", 0.5), (lead + "A", 1), ("B" + end, 1)]
    assert len(given.weights) == given.length
    for slot in given.images:
        assert not given.weights[slot.start : slot.start + slot.tokens].any()


def test_a_message_that_counts_half_counts_half_as_a_whole(make_encoder):
    encoder = make_encoder()
    given = encoder.encode(conversation("A", weight=0.5))
    assert shares(given, encoder.tokenizer) == [(" A</s>", 0.5)]


def test_a_template_that_changes_the_words_refuses_weights(make_encoder):
    own = make_encoder()
    own.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content | upper }}"
        "{% endgeneration %}{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
    )
    encoder = Encoder(own.tokenizer, get_template(TOKENIZER), own.layout, "<image>")
    assert encoder.encode(conversation("a")).supervised == 1
    with pytest.raises(DataError, match="can't be found verbatim and once"):
        encoder.encode(conversation(Text("a", 1), Text("b", 0.5)))
