import base64
import json
from pathlib import Path

import pytest
from tests.support.tiny import make_picture

from lapilli.base.errors import DataError
from lapilli.data.read.llava import read
from lapilli.generate.decoding import Answer, Decoding
from lapilli.generate.session import Session


@pytest.fixture
def prompts(parrot, monkeypatch):
    """Every prompt the engine is given from now on."""
    seen = []
    generate = parrot.engine.generate
    monkeypatch.setattr(parrot.engine, "generate", lambda p, *a, **k: seen.extend(p) or generate(p, *a, **k))
    return seen


def test_the_history_holds_each_end_mark_once(parrot, prompts, picture):
    session = Session(parrot)
    session.add_image(picture)
    for _ in range(3):
        assert session.ask("What is it?").text == "a red dog 음식"
    ends = [int((p.input_ids == parrot.tokenizer.eos_token_id).sum()) for p in prompts]
    assert ends == [0, 1, 2]
    assert [p.image_tokens for p in prompts] == [16, 16, 16]


def test_pictures_stand_in_front_of_their_own_question_or_where_it_says(parrot, prompts, picture, tmp_path):
    session = Session(parrot, system="Be brief.")
    other = make_picture(tmp_path / "b.png", 30, 40)
    session.ask("Hi")
    session.add_image(picture)
    assert session.add_image(other) == (30, 40)
    session.ask("Is <image> like <image>?")
    session.add_image(other)
    session.ask("And this?")
    turns = session.record("x")
    assert turns["image"] == [str(picture.resolve()), str(other.resolve()), str(other.resolve())]
    said = [t["value"] for t in turns["conversations"]]
    assert said[0::2] == ["Be brief.", "a red dog 음식", "a red dog 음식", "a red dog 음식"]
    assert said[1::2] == ["Hi", "Is <image> like <image>?", "<image>\nAnd this?"]
    assert prompts[-1].sizes == ((93, 57), (30, 40), (30, 40))


def test_what_is_saved_is_a_record_that_data_reads(parrot, picture, tmp_path):
    session = Session(parrot)
    with pytest.raises(DataError, match="nothing to save"):
        session.save(tmp_path / "chat.json")
    session.add_image(picture)
    session.ask("What is it?")
    session.save(tmp_path / "chat.json")
    (sample,) = read(tmp_path / "chat.json")
    assert [m.role for m in sample.messages] == ["user", "assistant"]
    assert sample.messages[0].text == "<image>\nWhat is it?"
    assert json.loads((tmp_path / "chat.json").read_text())[0]["id"] == "chat"
    with pytest.raises(DataError, match="exists already"):
        session.save(tmp_path / "chat.json")
    with pytest.raises(DataError, match="can't write"):
        session.save(tmp_path / "none" / "chat.json")


def test_what_can_not_be_asked_leaves_no_trace(parrot, picture):
    session = Session(parrot)
    with pytest.raises(DataError, match="2 <image>, but 0 new pictures"):
        session.ask("<image> <image>?")
    session.add_image(picture)
    with pytest.raises(DataError, match="2 <image>, but 1 new pictures"):
        session.ask("<image> <image>?")
    assert (session.exchanges, session.waiting) == (0, [picture.name])
    session.ask("What is it?")
    session.reset()
    assert (session.exchanges, session.waiting) == (0, [])


def test_a_stopped_answer_is_kept_as_far_as_it_went(endless):
    seen: list[str] = []
    session = Session(endless, decoding=Decoding(100))
    got = session.ask("What is it?", seen.append, lambda: len(seen) > 2)
    assert got.finish == "cancelled"
    assert session.record("x")["conversations"][-1] == {"from": "gpt", "value": "".join(seen)}
    assert session.ask("And?", cancelled=lambda: True).text == "one"


def test_without_an_answer_nothing_is_kept(parrot, picture, monkeypatch):
    session = Session(parrot)
    session.add_image(picture)
    monkeypatch.setattr(parrot.engine, "generate", lambda *a, **k: [Answer("", (2,), "stop", 9)])
    assert session.ask("What is it?").text == ""
    assert (session.exchanges, session.waiting) == (0, [picture.name])


def test_a_question_is_taken_back_with_its_pictures(parrot, picture):
    session = Session(parrot)
    with pytest.raises(DataError, match="no question was answered"):
        session.undo()
    session.add_image(picture)
    session.ask("What is it?")
    session.ask("And why?")
    assert session.undo() == "And why?"
    assert session.undo() == "<image>\nWhat is it?"
    assert (session.exchanges, session.waiting) == (0, [picture.name])


def test_asking_again_draws_anew_and_keeps_the_rest(tiny, picture, monkeypatch):
    session = Session(tiny, decoding=Decoding(8, temperature=5.0, seed=3))
    session.add_image(picture)
    first = session.ask("What is it?").text
    session.add_image(picture)  # of the next question
    drawn = {session.again().text for _ in range(4)}
    assert len(drawn | {first}) > 2
    assert (session.exchanges, session.waiting) == (1, [picture.name])
    kept = session.history()
    monkeypatch.setattr(tiny.engine, "generate", lambda *a, **k: [Answer("", (2,), "stop", 9)])
    assert session.again().text == ""
    assert (session.history(), session.waiting) == (kept, [picture.name])


def test_a_saved_conversation_is_gone_on_with_its_pictures_too(parrot, prompts, picture, tmp_path):
    session = Session(parrot, system="Be brief.")
    session.add_image("https://example.org/a.jpg", picture.read_bytes())
    session.add_image(picture)
    assert session.waiting == ["https://example.org/a.jpg", picture.name]
    session.ask("Are they alike?")
    session.save(tmp_path / "chat.json")
    assert (tmp_path / "chat-1.png").is_file()
    session.ask("Why?")
    other = Session(parrot)
    other.open(tmp_path / "chat.json")
    assert (other.system, other.exchanges) == ("Be brief.", 1)
    other.ask("Why?")
    assert prompts[-1].input_ids.tolist() == prompts[-2].input_ids.tolist()
    assert prompts[-1].keys == prompts[-2].keys
    (tmp_path / "chat-1.png").unlink()
    with pytest.raises(DataError, match="no such file"):
        other.open(tmp_path / "chat.json")
    assert other.exchanges == 2


def test_pictures_inside_a_saved_conversation_are_opened(parrot, picture, tmp_path):
    """As the web page exports them: data addresses, which `save` writes as files."""
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    turns = [{"from": "human", "value": "<image>\n<image>\nAlike?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "page.json").write_text(json.dumps([{"id": "a", "image": [url, url], "conversations": turns}]))
    session = Session(parrot)
    session.open(tmp_path / "page.json")
    assert session.history() == [("<image>\n<image>\nAlike?", "yes", ["picture in page.json"] * 2)]
    session.save(tmp_path / "again.json")
    other = Session(parrot)
    other.open(tmp_path / "again.json")
    assert [Path(name).name for name in other.history()[0][2]] == ["again-1.png", "again-2.png"]


def test_a_conversation_is_exported_for_people(parrot, picture, tmp_path):
    session = Session(parrot, system="Be <brief>.")
    session.add_image("https://example.org/a.jpg", picture.read_bytes())
    session.add_image(picture)
    session.ask("Is <image> like <image>? <script>alert(1)</script>")
    session.ask("Why?")
    session.save(tmp_path / "talk.html")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("talk")] == ["talk.html"]  # it needs nothing else
    page = (tmp_path / "talk.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2
    assert page.index("Be &lt;brief&gt;") < page.index("&lt;script&gt;alert(1)") < page.index("Why?")
    assert page.count("a red dog 음식") == 2
    assert "<script>alert" not in page
    assert "http" not in page.replace("http-equiv", "")
    session.save(tmp_path / "talk.md")
    kept = (tmp_path / "talk-1.png").resolve()
    assert kept.is_file()
    assert (tmp_path / "talk.md").read_text().splitlines()[2:] == [
        "System: Be <brief>.", "",
        f"> Is ![talk-1.png](<{kept}>) like ![{picture.name}](<{picture.resolve()}>)? <script>alert(1)</script>", "",
        "a red dog 음식", "", "> Why?", "", "a red dog 음식",
    ]  # fmt: skip
