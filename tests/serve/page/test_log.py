"""What is kept of the page's conversations, where the operator asked for it, is what LLaVA's web server keeps."""

import datetime
import hashlib
import json
import os
import resource
import stat
import threading
from pathlib import Path

import PIL.Image
import pytest
from tests.support.page import ask, data_url, page_app

from lapilli.base.errors import RunError
from lapilli.data.picture import ImageLimits
from lapilli.data.template import get_template
from lapilli.serve.naming import guess_template
from lapilli.serve.page.log import ConversationLog
from lapilli.serve.page.routes import Page
from lapilli.serve.page.state import Said, as_sent, picture_hash, state_of
from lapilli.serve.refusal import ApiError
from lapilli.serve.request import ChatRequest

RECORDED = json.loads((Path(__file__).parents[2] / "reference/serve/llava-web-server.json").read_text())
SHOWN = [
    {"type": "image_url", "image_url": {"url": data_url()}},
    {"type": "text", "text": "What is it?"},
]
MESSAGES = [{"role": "user", "content": SHOWN}, {"role": "assistant", "content": "A red dog."}]
TURN = {
    "id": "c1", "model": "parrot", "start": 1_700_000_000.12345, "finish": 1_700_000_002.5, "messages": MESSAGES,
    "temperature": 0.2, "top_p": 0.7, "max_tokens": 512,
}  # fmt: skip
VOTE = {"type": "upvote", "id": "c1", "model": "parrot", "messages": MESSAGES}


def open_log(folder, most=1 << 30):
    return ConversationLog(folder, ImageLimits(), 4, most)


def said(messages=MESSAGES):
    return Said("c1", "parrot", ChatRequest(model="m", messages=messages).messages, "127.0.0.1")


def keep(log, messages=MESSAGES):
    log.turn(said(messages), get_template("llava_v1"), 1.0, 2.0, {})


def lines_of(folder):
    (file,) = folder.glob("*-conv.json")
    text = file.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", RECORDED["states"])
@pytest.mark.parametrize("kind", ["picture", "text"])
def test_states_are_those_of_the_original(name, kind):
    content = SHOWN if kind == "picture" else "What is it?"
    messages = [{"role": "user", "content": content}, MESSAGES[1]]
    messages += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    made = state_of(get_template(name), said(messages).messages, "c1", "parrot")
    assert (made.pop("conv_id"), made.pop("model_name")) == ("c1", "parrot")
    assert made == RECORDED["states"][name][kind]["state"]


def test_pictures_are_named_and_sized_as_by_the_original():
    picture = PIL.Image.new("RGB", (8, 6), (10, 200, 30))
    assert picture_hash(as_sent(picture)) == RECORDED["md5"]
    for given, kept in RECORDED["sizes"]:
        assert as_sent(PIL.Image.new("RGB", tuple(given))).size == tuple(kept)


def test_templates_are_guessed_as_by_the_original():
    ours = {"mpt_text": "mpt_text-2023-06", "mistral_orca": "chatml_direct"}  # it has no such ones and fails
    for model, name in RECORDED["guesses"].items():
        assert guess_template(model) == ours.get(name, name)
        assert get_template(guess_template(model))


def test_turns_and_votes_over_http(tmp_path):
    folder = tmp_path / "log"
    app = page_app(page=Page(log=open_log(folder)))
    assert ask(app, "GET", "/page/settings").json()["votes"] is True
    assert ask(app, "POST", "/page/turns", json=TURN).status_code == 204
    for vote in ("upvote", "downvote", "flag"):
        assert ask(app, "POST", "/page/votes", json=VOTE | {"type": vote}).status_code == 204
    chat, *votes = lines_of(folder)
    assert list(chat) == ["tstamp", "type", "model", "start", "finish", "state", "images", "ip", "gen_params"]
    assert (chat["type"], chat["model"], chat["ip"]) == ("chat", "parrot", "127.0.0.1")
    assert (chat["start"], chat["finish"], chat["tstamp"]) == (1_700_000_000.1235, 1_700_000_002.5, 1_700_000_002.5)
    assert chat["state"]["messages"] == [["USER", "What is it?\n<image>"], ["ASSISTANT", "A red dog."]]
    assert (chat["state"]["conv_id"], chat["state"]["model_name"]) == ("c1", "parrot")
    assert chat["images"] == [RECORDED["md5"]]
    assert [vote["type"] for vote in votes] == ["upvote", "downvote", "flag"]
    assert all(set(vote) == {"tstamp", "type", "model", "state", "ip"} for vote in votes)
    day = datetime.datetime.now().date().isoformat()
    with PIL.Image.open(folder / "serve_images" / day / f"{chat['images'][0]}.jpg") as kept:
        assert (kept.size, kept.format) == ((8, 6), "JPEG")
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.mark.parametrize(
    "change",
    [{"model": "none"}, {"messages": MESSAGES[:1]}, {"messages": []}, {"id": ""}, {"id": "x" * 101}, {"start": -1},
     {"more": 1}, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]},
                                MESSAGES[1]]},
     {"messages": [{"role": "user", "content": SHOWN[:1] * 5}, MESSAGES[1]]},
     {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url()[:60]}}]},
                   MESSAGES[1]]}],
)  # fmt: skip
def test_what_is_no_turn_is_refused_and_not_kept(tmp_path, change):
    app = page_app(page=Page(log=open_log(tmp_path / "log")))
    assert ask(app, "POST", "/page/turns", json=TURN | change).status_code in (400, 404)
    assert list((tmp_path / "log").rglob("*")) == []


def test_names_from_requests_are_no_paths(tmp_path):
    app = page_app(page=Page(log=open_log(tmp_path / "log")))
    assert ask(app, "POST", "/page/turns", json=TURN | {"id": "../../x"}).status_code == 204
    assert {path.parent for path in tmp_path.rglob("*.json")} == {tmp_path / "log"}


def test_lines_are_whole_whoever_writes(tmp_path):
    logs = [open_log(tmp_path / "log"), open_log(tmp_path / "log")]
    text = [{"role": "user", "content": "x" * 20_000}, MESSAGES[1]]
    threads = [threading.Thread(target=lambda log=log: [keep(log, text) for _ in range(40)]) for log in logs * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines_of(tmp_path / "log")) == 160


def test_after_half_a_line_the_next_one_is_whole(tmp_path):
    log = open_log(tmp_path / "log")
    keep(log)
    (file,) = (tmp_path / "log").glob("*-conv.json")
    with file.open("a") as stream:
        stream.write('{"tstamp": 1, "ty')
    keep(log)
    first, half, last = file.read_text().splitlines()
    assert json.loads(first)["type"] == json.loads(last)["type"] == "chat"
    assert half == '{"tstamp": 1, "ty'


def test_a_full_disk_is_told_and_leaves_no_half_line(tmp_path, caplog):
    """The limit on a file's size stands in for the disk: a write is cut short by it as by a full disk."""
    log = open_log(tmp_path / "log")
    text = [{"role": "user", "content": "x" * 5000}, MESSAGES[1]]
    keep(log, text)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    (file,) = (tmp_path / "log").glob("*-conv.json")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 3000, before[1]))
        for _ in range(3):
            with pytest.raises(ApiError) as caught:
                keep(log, text)
            assert (caught.value.status, caught.value.code) == (507, "log_full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(lines_of(tmp_path / "log")) == 1
    keep(log, text)
    assert len(lines_of(tmp_path / "log")) == 2
    assert [r.message for r in caplog.records if "not kept" in r.message] == [
        "conversations are not kept any more: No space left on device"
    ]


def test_bounds(tmp_path):
    log = open_log(tmp_path / "log", most=20_000)
    with pytest.raises(ApiError) as caught:
        keep(log, [{"role": "user", "content": "x" * (1 << 20)}, MESSAGES[1]])
    assert caught.value.status == 413
    text = [{"role": "user", "content": "x" * 6000}, MESSAGES[1]]
    for _ in range(3):
        keep(log, text)
    with pytest.raises(ApiError, match="log is full"):
        keep(log, text)
    with pytest.raises(ApiError, match="log is full"):  # what lies there counts at the next start, too
        keep(open_log(tmp_path / "log", most=20_000), text)


def test_chat_goes_on_where_the_log_does_not(tmp_path):
    app = page_app(page=Page(log=open_log(tmp_path / "log", most=1)))
    refused = ask(app, "POST", "/page/turns", json=TURN)
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "log_full")
    body = {"model": "parrot", "messages": [{"role": "user", "content": "?"}]}
    assert ask(app, "POST", "/v1/chat/completions", json=body).status_code == 200


def test_the_folder_is_private(tmp_path):
    old = os.umask(0)
    try:
        keep(open_log(tmp_path / "a/b"))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o700
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(RunError, match="others may look into it; chmod 700"):
        open_log(tmp_path / "open")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--log-dir"):
        open_log(tmp_path / "file")


def test_a_picture_is_kept_once(tmp_path):
    log = open_log(tmp_path / "log")
    keep(log)
    keep(log)
    (kept,) = (tmp_path / "log").rglob("*.jpg")
    assert hashlib.md5(PIL.Image.new("RGB", (8, 6), (10, 200, 30)).tobytes()).hexdigest() == kept.stem
    assert [line["images"] for line in lines_of(tmp_path / "log")] == [[kept.stem]] * 2
