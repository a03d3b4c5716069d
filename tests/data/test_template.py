"""Templates: the originals' prompts, the exported Jinja, users' files, refusals."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from lapilli.base.errors import DataError, LapilliError, RecipeError
from lapilli.data.sample import Image, Message, Sample, Text
from lapilli.data.template import TEMPLATES, TOKENIZER, Span, Template, get_template

REFERENCE = Path(__file__).parents[1] / "reference"
OWN = [name for name in TEMPLATES if name != TOKENIZER]


def messages(*texts):
    return [Message(("user", "assistant")[i % 2], (Text(text),)) for i, text in enumerate(texts)]


@pytest.mark.parametrize(("file", "date"), [("prompts", ""), ("v0-2023/prompts", "-2023-06")])
def test_prompts_and_stop_strings_of_the_original(file, date):
    seen = set()
    with gzip.open(REFERENCE / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            template = get_template(row["template"] + date)
            texts = [text for exchange in row["messages"] for text in exchange if text is not None]
            assert template.prompt(messages(*texts)) == row["prompt"]
            if "stop" in row:
                assert template.stop == (row["stop"],)
            seen.add(row["template"])
    assert len(seen) == (11 if date else 12)


def test_every_name_of_the_originals_is_known():
    names = "default v0 v1 vicuna_v1 llama_2 mistral_instruct chatml_direct mistral_direct plain v0_plain llava_v0 "
    names += "v0_mmtag llava_v1 v1_mmtag llava_llama_2 mpt mistral kollava_mistral chatml llama_3 tokenizer"
    assert set(names.split()) <= set(TEMPLATES)


def test_kollava_prompts_and_trains_on_different_text():
    template = get_template("kollava_mistral")
    system = template.system
    assert template.prompt(messages("Q", "A", "Q2")) == (
        f"{system} <|im_start|>user\n: Q <|im_start|>assistant\n: A<|im_end|><|im_start|>user\n: Q2 "
        "<|im_start|>assistant\n:"
    )
    spans = template.training_spans(Sample("x", tuple(messages("Q", "A"))))
    assert spans == [
        Span(f"{system}\n\n### <|im_start|>user\n: Q\n### <|im_start|>assistant\n:"),
        Span(" A\n###", supervised=True),
        Span(" "),
    ]


@pytest.mark.parametrize("name", [n for n in OWN if TEMPLATES[n].training is None and n not in ("plain", "v0_plain")])
def test_training_text_begins_with_the_prompt(name):
    """What the model is asked at inference is what it was trained to go on from."""
    template = TEMPLATES[name]
    conversation = messages("Q", "A", "Q2", "A2")
    trained = "".join(s.text for s in template.training_spans(Sample("x", tuple(conversation))))
    for end in (1, 3):
        assert trained.startswith(template.prompt(conversation[:end]))


texts = st.lists(st.sampled_from([*"ab \n'\"\\{}%#<>é무\u2028", "<image>", "{{", "{%"]), max_size=8).map("".join)
contents = st.one_of(texts, st.lists(st.one_of(texts, st.none()), max_size=4))


@st.composite
def conversations(draw):
    turns = draw(st.lists(contents, min_size=1, max_size=5))
    roles = ["user", "assistant"] if draw(st.booleans()) else ["assistant", "user"]
    chat = [(roles[i % 2], turn) for i, turn in enumerate(turns)]
    if draw(st.booleans()):
        chat.insert(0, ("system", draw(texts)))
    return chat


def as_message(role, content):
    if isinstance(content, str):
        return Message(role, (Text(content),))
    return Message(role, tuple(Image("x.jpg") if part is None else Text(part) for part in content))


def as_chat(role, content):
    if not isinstance(content, str):
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content]
    return {"role": role, "content": content}


@settings(max_examples=25, deadline=None)
@given(conversations(), st.booleans(), st.booleans())
@pytest.mark.parametrize("name", OWN)
def test_exported_jinja_renders_what_the_template_renders(name, chat, generation_prompt, image_marks):
    template = TEMPLATES[name].with_image_marks() if image_marks else TEMPLATES[name]
    try:
        prompt = template.prompt([as_message(*turn) for turn in chat], generation_prompt)
    except DataError:
        return  # refused by us; Jinja has no way to refuse
    rendered, _ = render_jinja_template(
        [[as_chat(*turn) for turn in chat]], chat_template=template.jinja(), add_generation_prompt=generation_prompt
    )
    assert rendered == [prompt]


def test_unknown_name_says_the_nearest():
    with pytest.raises(RecipeError, match=r'unknown template "vicuna_v2" \(did you mean "vicuna_v1"\?\)'):
        get_template("vicuna_v2")


def test_own_template_from_yaml(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text('base: vicuna_v1\nsystem: Short.\nanswer_prefix: "BOT:"\n')
    template = get_template(str(file))
    assert template.name == "mine"
    assert template.prompt(messages("Q", "A", "Q2")) == "Short. USER: Q BOT: A</s>USER: Q2 BOT:"
    assert Template.model_validate_json(template.model_dump_json()) == template


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user_prefiks: x\nanswer_end: y", 'user_prefiks: unknown key .did you mean "user_prefix"'),
        ("user_prefix: x", "answer_end is missing"),
        ("- a", "a template file is a mapping"),
        ("a: [", "not YAML"),
        ("base: nosuch", 'unknown template "nosuch"'),
        ("base: v1\nstop: 3", "stop"),
    ],
)
def test_bad_yaml_is_refused_by_name(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(LapilliError, match=message):
        get_template(str(file))


def test_missing_yaml_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing\.yaml: can't read"):
        get_template(str(tmp_path / "nothing.yaml"))


def test_what_is_left_out_is_said():
    opening = Sample("x", (Message("assistant", (Text("Hello"),)), *messages("Q", "A", "Q2")))
    assert get_template("v1").notes(opening) == (
        "answer before the first question dropped",
        "last question has no answer",
    )
    assert get_template("v0").notes(opening) == ("last question has no answer",)
    assert get_template("plain").notes(Sample("x", tuple(messages("Q", "A")))) == ("question text dropped",)


def test_plain_refuses_what_it_can_not_hold():
    with pytest.raises(DataError, match=r"record 3: template plain holds one question and one answer"):
        get_template("plain").training_spans(Sample("x", tuple(messages("Q", "A", "Q2", "A2")), "d.json: record 3"))


def test_weight_0_is_not_supervised():
    sample = Sample("x", (Message("user", (Text("Q"),)), Message("assistant", (Text("A"),), 0.0)))
    assert not any(s.supervised for s in get_template("v1").training_spans(sample))
