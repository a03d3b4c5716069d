"""OpenAI's messages, ShareGPT, semantic data arrays, captions and pairs: what is read, and how mistakes are named."""

import base64
import json
from pathlib import Path

import pytest

from lapilli.base.errors import DataError
from lapilli.data.read.open import RawRecord, open_source
from lapilli.data.read.sda import Regions
from lapilli.data.read.sda import parse as parse_sda
from lapilli.data.read.shapes import parse, shape_of
from lapilli.data.sample import Image, Message, Text
from lapilli.recipe.schema import Source


def read(value, placement="keep"):
    return parse(RawRecord("f", 3, value), placement)


def shown(sample):
    """Turns as (role, text with each picture as its name in < >)."""
    name = lambda p: p.text if isinstance(p, Text) else f"<{p.path or 'bytes'}>"  # noqa: E731
    return [(m.role[0], "".join(name(p) for p in m.parts)) for m in sample.messages]


def asked(*content, answer="A", **record):
    return {
        "messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}],
        **record,
    }


def text(words, **more):
    return {"type": "text", "text": words, **more}


DATA_URL = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
OPENAI = {
    "paths and data addresses": (
        asked(text("a "), {"type": "image_url", "image_url": {"url": "x.png"}}, text(" b "),
              {"type": "image_url", "image_url": DATA_URL}),
        "a <x.png> b <bytes>",
    ),
    "file addresses": (asked({"type": "image_url", "image_url": {"url": "file:///d/x.png"}}, text("Q")), "</d/x.png>Q"),
    "responses": (
        asked({"type": "input_text", "text": "Q"}, {"type": "input_image", "image_url": "x.png"}), "Q<x.png>"
    ),
    "bare parts": (asked({"type": "image"}, text("Q"), {"type": "image"}, images=["1", "2"]), "<1>Q<2>"),
    "empty columns": (asked({"type": "image", "text": None, "image": {"bytes": None, "path": "p"}}), "<p>"),
}  # fmt: skip


@pytest.mark.parametrize(("value", "question"), OPENAI.values(), ids=OPENAI)
def test_openai_parts_in_their_order(value, question):
    assert shape_of(value) == "openai"
    assert shown(read(value)) == [("u", question), ("a", "A")]


def test_openai_pictures_first_as_llava_has_them():
    value = asked(text(" a "), {"type": "image", "image": "x"}, text(" b "))
    assert shown(read(value, "front"))[0] == ("u", "<x>\na  b")


def test_openai_text_content_takes_the_records_pictures():
    turns = asked(text("Q "), {"type": "image"})["messages"]
    more = [{"role": "user", "content": "and <image>?"}, {"role": "assistant", "content": "B", "weight": 0}]
    sample = read({"messages": [{"role": "developer", "content": "S"}, *turns, *more], "images": ["1", "2"]})
    assert shown(sample) == [("s", "S"), ("u", "Q <1>"), ("a", "A"), ("u", "and <2>?"), ("a", "B")]
    assert [m.weight for m in sample.messages] == [1, 1, 1, 1, 0]


def test_openai_parts_may_weigh_differently():
    sample = read(asked(text("Q"), answer=[text("a", weight=0), text("b", weight=0.5), text("c")]))
    assert sample.messages[1].parts == (Text("a", 0), Text("b", 0.5), Text("c"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            asked({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}),
            'the address "https://x.org/a.png"',
        ),
        (asked({"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}}), "is not base64"),
        (asked({"type": "image_url"}), "turn 1, part 1: names no picture"),
        (asked({"type": "image"}), "`images` has none left"),
        (asked(text("Q"), images=["1"]), "`images` names 1 pictures, and no part takes the last 1"),
        (asked({"type": "audio"}), 'part 1: unknown type "audio"'),
        (asked({"text": "Q"}), "`type` must be text, not null"),
        (asked(7), "part 1: must be an object"),
        (asked(text("\ud800")), "half of a character"),
        (asked(text("Q"), answer=None), "turn 2: `content` must be text, not null"),
        (asked(text("Q"), answer=[text("A", weight=-1)]), "`weight` must be a number from 0"),
        ({"messages": [{"role": "tool", "content": [text("Q")]}]}, 'unknown role "tool"'),
        ({"messages": [{"role": "system", "content": [{"type": "image", "image": "a"}]}]}, "can't hold a picture"),
        ({"prompt": "hello"}, "`conversations` is missing: the record has prompt, but needs"),
        (17, "a record must be an object with `conversations`"),
    ],
)
def test_mistakes_name_the_part(value, message):
    with pytest.raises(DataError) as error:
        read(value)
    assert str(error.value).startswith("f: record 3: ")
    assert message in str(error.value)


def test_sharegpt_with_a_system_text_beside_the_turns():
    turns = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]
    sample = read({"conversations": turns, "system": "S", "images": ["x"]})
    assert shown(sample) == [("s", "S"), ("u", "<x>Q"), ("a", "A")]


@pytest.mark.parametrize(
    ("value", "turns"),
    [
        ({"image": "x", "caption": " a cat \n"}, [("u", "<x>"), ("a", "a cat")]),
        ({"image_url": "x", "caption": "a cat"}, [("u", "<x>"), ("a", "a cat")]),
        ({"images": ["x", "y"], "txt": "two cats"}, [("u", "<x><y>"), ("a", "two cats")]),
        ({"image": "x", "question": "Q?", "answer": "A"}, [("u", "<x>\nQ?"), ("a", "A")]),
        ({"image": "x", "question": "Q <image>?", "answer": "A"}, [("u", "Q <x>?"), ("a", "A")]),
        ({"prompt": "Q?", "completion": "A"}, [("u", "Q?"), ("a", "A")]),
        (
            {"images": ["x"], "texts": [{"user": "Q", "assistant": "A"}, {"user": "R", "assistant": "B"}]},
            [("u", "<x>\nQ"), ("a", "A"), ("u", "R"), ("a", "B")],
        ),
    ],
)
def test_records_without_turns(value, turns):
    assert shown(read(value)) == turns


def turn(kind, *content, **lists):
    return {"type": kind, "content": list(content), **lists}


def test_semantic_data_array_keeps_order_weights_and_regions():
    sample = read([
        turn("user", {"text": "Compare "}, {"image": "a"}, {"hint": "h"}, {"text": " and "}, {"image": "b"},
             semantic_drop_mask=[False, False, True, False, False], semantic_loss_weight=[0, 0, 0, 0.5, 0]),
        turn("assistant", {"text": "x"}, {"rationale": "y", "include_tags": True}, semantic_loss_weight=[2, None]),
    ])  # fmt: skip
    assert sample.messages == (
        Message("user", (Text("Compare ", 0), Image("a"), Text(" and ", 0.5), Image("b"))),
        Message("assistant", (Text("x", 2), Text("<rationale>y</rationale>"))),
    )


def test_tags_stand_around_pictures_too():
    sample = read([turn("user", {"image": "a", "include_tags": True}), turn("assistant", {"text": "A"})])
    assert sample.messages[0].parts == (Text("<image>"), Image("a"), Text("</image>"))


def test_semantic_settings_by_region_hold_where_the_turn_says_nothing():
    value = [turn("prompt", {"text": "Q"}), turn("completion", {"why": "w"}, {"hidden": "h"}, {"text": "A"})]
    regions = Regions(loss_weight={"why": 0}, drop={"hidden": True})
    sample = parse_sda(RawRecord("f", 1, value), regions=regions)
    assert sample.messages[1].parts == (Text("w", 0), Text("A"))


def test_documents_of_pretraining_are_one_answer_after_their_first_pictures():
    sample = read([{"content": [{"image": "a"}, {"text": "x ", "include_tags": True}, {"image": "b"}, {"text": "y"}]}])
    assert shown(sample) == [("u", "<a>"), ("a", "<|text|>x <|text|><b>y")]
    assert shown(read([{"content": [{"text": "x"}]}])) == [("u", ""), ("a", "x")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([turn("user", {"text": "Q"}, semantic_loss_weight=[])], "`semantic_loss_weight` must be a list of 1"),
        ([turn("user", {"text": "Q"}, semantic_loss_weight=["x"])], "must be a number from 0"),
        ([turn("user", {"text": "Q"}, semantic_drop_mask=["no"])], "must hold true or false, not 'no'"),
        ([turn("user", {"text": "Q"}, semantic_attention_mask=[False])], "hides this part from attention"),
        ([turn("user", {"text": "Q", "image": "a"})], "one region such as `text` or `image`; this one has text, image"),
        ([turn("user", {"text": ""})], "part 1: `text` is empty"),
        ([turn("usr", {"text": "Q"})], 'unknown type "usr" (did you mean "user"?)'),
        ([turn("system", {"image": "a"})], "a system turn can hold neither"),
    ],
)
def test_mistakes_in_semantic_data_arrays(value, message):
    with pytest.raises(DataError) as error:
        read({"sda": json.dumps(value), "id": "x"})
    assert str(error.value).startswith("f: record 3 (id x): turn 1")
    assert message in str(error.value)


def test_lines_of_bare_arrays_are_lines_and_not_one_list(tmp_path: Path):
    line = json.dumps([turn("user", {"text": "Q"}), turn("assistant", {"text": "A"})])
    for content, count in ((f"{line}\n{line}\n", 2), (line, 1), (f"[{line},\n {line}]", 2)):
        (tmp_path / "d").write_text(content)
        reader = open_source(Source(path=str(tmp_path / "d")))
        samples = [reader.parse(raw) for raw in reader.records()]
        assert reader.format == "sda"
        assert [shown(s) for s in samples] == [[("u", "Q"), ("a", "A")]] * count
