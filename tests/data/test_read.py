"""LLaVA's files: what is accepted, where pictures end up, and how each mistake is named."""

import json

import pytest

from lapilli.base.errors import DataError
from lapilli.data.read.llava import RawRecord, parse, read, read_records
from lapilli.data.sample import Image, Text

TURNS = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


def record(**value):
    return RawRecord("chat.json", 17, {"id": "000123", "conversations": TURNS} | value)


def turns(*texts, first="human"):
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


def written(sample):
    """Turns as text, each picture as its name in < >."""
    return ["".join(p.text if isinstance(p, Text) else f"<{p.path}>" for p in m.parts) for m in sample.messages]


def test_list_and_lines_give_the_same_samples_whatever_the_file_is_called(tmp_path):
    values = [{"id": i, "conversations": turns(f"Q{i} \u2028", "A")} for i in range(3)]
    (tmp_path / "a.txt").write_text("\ufeff" + json.dumps(values, indent=1), encoding="utf-8")
    lines = "\r\n".join(json.dumps(v, ensure_ascii=False) for v in values)
    (tmp_path / "b.json").write_text(f"\n{lines}\n\n", encoding="utf-8")
    assert [s.messages for s in read(tmp_path / "a.txt")] == [s.messages for s in read(tmp_path / "b.json")]
    assert [(s.id, s.where) for s in read(tmp_path / "b.json")][2] == ("2", f"{tmp_path}/b.json: record 3 (id 2)")


def test_roles_and_keys_of_both_kinds():
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "<image>Q"},
        {"role": "assistant", "content": "A", "weight": 0},
    ]
    sample = parse(RawRecord("f", 4, {"images": ["a.png"], "messages": messages}))
    assert [(m.role, m.text, m.weight) for m in sample.messages] == [
        ("system", "S", 1), ("user", "<image>Q", 1), ("assistant", "A", 0),
    ]  # fmt: skip
    assert (sample.id, sample.images) == ("4", (Image("a.png"),))


def test_the_model_may_speak_first():
    sample = parse(record(conversations=turns("A", "Q", "A", first="gpt")))
    assert [m.role for m in sample.messages] == ["assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("texts", "images", "keep", "front"),
    [
        (["Q <image> x", "A"], "a", ["Q <a> x", "A"], ["<a>\nQ  x", "A"]),
        (["Q\n<image>", "A"], "a", ["Q\n<a>", "A"], ["<a>\nQ", "A"]),
        (["<image>", "A"], ["a"], ["<a>", "A"], ["<a>", "A"]),
        (["<image>\n<image> Q", "A"], "a", None, ["<a>\nQ", "A"]),
        (["x <image> y <image>", "A"], ["a", "b"], ["x <a> y <b>", "A"], ["<a>\n<b>\nx  y", "A"]),
        (
            ["<image> 1", "A", "2 <image>", "B"],
            ["a", "b"],
            ["<a> 1", "A", "2 <b>", "B"],
            ["<a>\n1", "A", "<b>\n2", "B"],
        ),
        (["<image><image> 1", "A", "2 <image>", "B"], ["a", "b"], None, ["<a>\n1", "A", "<b>\n2", "B"]),
        (["Q", "see <image>"], "a", ["Q", "see <a>"], ["Q", "<a>\nsee"]),
        ([" Q ", "A"], None, [" Q ", "A"], [" Q ", "A"]),
        (["<image><image>", "A", "<image>", "B"], ["a"], None, None),
    ],
)
def test_where_pictures_stand(texts, images, keep, front):
    given = record(conversations=turns(*texts), image=images)
    for placement, expected in (("keep", keep), ("front", front)):
        if expected is None:
            with pytest.raises(DataError, match=r"chat.json: record 17 \(id 000123\): `image` names . picture"):
                parse(given, placement)
        else:
            assert written(parse(given, placement)) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"conversations": None}, "`conversations` is missing"),
        ({"conversations": {}}, "`conversations` must be a list of turns, not an object"),
        ({"conversations": []}, "`conversations` is empty"),
        ({"conversations": ["hi"]}, "conversations turn 1: must be an object with `from` and `value`, not text"),
        ({"conversations": [{"value": "Q"}]}, "conversations turn 1: needs `from` or `role`"),
        ({"conversations": [{"from": "human", "role": "user", "value": "Q"}]}, "needs `from` or `role`, not both"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn 1: `value` must be text, not null"),
        ({"conversations": [{"from": "humann", "value": ""}]}, 'unknown role "humann" (did you mean "human"?)'),
        ({"conversations": [TURNS[0], TURNS[0]]}, "turns 1 and 2 are both from the user"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": " "}]}, "turn 2, an answer, is empty"),
        ({"conversations": [*TURNS, {"from": "system", "value": "S"}]}, "turn 3 is a system message"),
        ({"conversations": [{**TURNS[0], "weight": 0.5}, TURNS[1]]}, "`weight` must be 0 (not trained) or 1, not 0.5"),
        ({"image": "a.png"}, "`image` names 1 picture(s), but the text has 0 <image>"),
        ({"conversations": turns("<image>", "A")}, "the text has 1 <image>, but the record has no `image`"),
        ({"image": 3}, "`image` must be a path or a list of paths, not a number"),
        ({"image": ["a", None]}, "`image` 2 must be a path, not null"),
        ({"image": ""}, "`image` 1 must be a path, not empty"),
        ({"image": "a", "images": ["a"]}, "has both `image` and `images`"),
    ],
)
def test_mistakes_name_record_and_field(value, message):
    with pytest.raises(DataError) as error:
        parse(record(**value))
    assert str(error.value).startswith("chat.json: record 17 (id 000123): ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"id": 1},\n {"id": }]', "not JSON: Expecting value (line 2, column 9)"),
        (b"id,image\n", "begins with 'i': neither a JSON list"),
        (b" \n", "the file is empty"),
        (b'["\xff"]', "not UTF-8 at byte 2"),
        (b"[" * 100_000, "can't be read as JSON"),
    ],
)
def test_files_that_can_not_be_read(tmp_path, content, message):
    file = tmp_path / "chat.json"
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_records(file))
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.json: can't read it \(No such file"):
        list(read_records(tmp_path / "nothing.json"))


def test_one_bad_line_does_not_hide_the_others(tmp_path):
    good = json.dumps({"conversations": TURNS})
    file = tmp_path / "chat.jsonl"
    file.write_text(f"{good}\n{{bad\n[]\n{good}\n")
    problems, samples = [], []
    for raw in read_records(file):
        try:
            samples.append(parse(raw).id)
        except DataError as error:
            problems.append(str(error).removeprefix(f"{file}: "))
    assert samples == ["1", "4"]
    assert problems == [
        "record 2: not JSON: Expecting property name enclosed in double quotes (line 2, column 2)",
        "record 3: a record must be an object with `conversations`, not a list",
    ]
