import io

import PIL.Image
import pytest

from lapilli.base.errors import DataError
from lapilli.generate.conversation import open_picture, read_chat


def texts(messages):
    return [(m.role, m.text) for m in messages]


def test_a_question_alone():
    assert texts(read_chat("why?")[0]) == [("user", "why?")]


def test_pictures_without_a_place_stand_in_front_of_the_first_question():
    messages, pictures = read_chat("why?", ["a.png", "b.png"])
    assert texts(messages) == [("user", "<image>\n<image>\nwhy?")]
    assert pictures == ["a.png", "b.png"]
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    assert texts(read_chat(chat, ["a.png"])[0])[1] == ("user", "<image>\none")


def test_places_take_pictures_in_order_and_parts_bring_their_own():
    own = PIL.Image.new("RGB", (2, 2))
    chat = [
        {"role": "user", "content": "is <image> like"},
        {"role": "assistant", "content": "what?"},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": own},
                {"type": "text", "text": " or <image>"},
                {"type": "image"},
                {"type": "text", "text": "?"},
            ],
        },
    ]
    messages, pictures = read_chat(chat, ["a", "b", "c"])
    assert texts(messages)[0] == ("user", "is <image> like")
    assert texts(messages)[2] == ("user", "<image> or <image><image>?")
    assert pictures == ["a", own, "b", "c"]


def test_one_picture_need_not_stand_in_a_list():
    assert read_chat("why?", "a.png")[1] == ["a.png"]


@pytest.mark.parametrize(
    ("chat", "images", "said"),
    [
        ("<image> why?", None, "1 places .* 0 pictures"),
        ("<image> why?", ["a", "b"], "1 places .* 2 pictures"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None, "ends with a question"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], None, "alternate"),
        ([{"role": "robot", "content": "a"}], None, "unknown role"),
        ([{"role": "user"}], None, 'message 1: .*"content"'),
        ([{"role": "user", "content": [{"type": "video"}]}], None, "a part is"),
        ([{"role": "user", "content": [{"type": "image", "image": 3}]}], None, "not int"),
        ([{"role": "user", "content": 3}], None, "not int"),
        ([], None, "empty"),
    ],
)
def test_what_is_not_a_conversation_is_refused(chat, images, said):
    with pytest.raises(DataError, match=said):
        read_chat(chat, images)


def test_pictures_are_opened_from_files_links_and_bytes(tmp_path):
    made = PIL.Image.new("RGB", (3, 2), (9, 8, 7))
    made.save(tmp_path / "a.png")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b.png").symlink_to(tmp_path / "a.png")
    stream = io.BytesIO()
    made.save(stream, "PNG")
    for source in (made, tmp_path / "a.png", str(tmp_path / "links" / "b.png"), stream.getvalue()):
        opened = open_picture(source)
        assert (opened.size, opened.getpixel((0, 0))) == ((3, 2), (9, 8, 7))


def test_pictures_that_cannot_be_opened_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for path, said in ((tmp_path / "none.png", "no such file"), (tmp_path, "a folder"), (tmp_path / "a.txt", "format")):
        with pytest.raises(DataError, match=said) as raised:
            open_picture(path)
        assert str(path) in str(raised.value)
