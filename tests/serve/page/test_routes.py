"""The page's addresses: who gets them, with which headers, and what the operator's examples may be."""

import json

import pytest
from tests.support.page import ask, page_app
from tests.support.tiny import make_picture

from lapilli.base.errors import RunError
from lapilli.serve.page.examples import read_examples
from lapilli.serve.page.routes import Page
from lapilli.serve.page.shipped import read_shipped
from lapilli.serve.settings import Limits

KEY = "sk-page"
SHOWN = {"authorization": f"Bearer {KEY}"}


def test_files_need_no_key_and_everything_else_does():
    app = page_app(keys=[KEY])
    index = ask(app, "GET", "/")
    assert index.status_code == 200
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    shipped = read_shipped()
    for name, file in shipped.items():
        made = ask(app, "GET", f"/page/static/{name}")
        assert (made.status_code, made.content) == (200, file.data)
    for path in (
        "/page/settings",
        "/page/examples/0",
        "/page/static/none.js",
        "/v1/models",
        "/index.html",
        "/page/static/",
    ):
        assert ask(app, "GET", path).status_code == 401
    assert ask(app, "POST", "/", json={}).status_code == 401
    assert ask(app, "GET", "/page/settings", headers=SHOWN).status_code == 200


def test_headers():
    for path in ("/", "/page/static/index.html"):
        headers = ask(page_app(), "GET", path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == policy["font-src"] == "'self'"
        assert policy["img-src"] == "'self' data: blob:"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        tag = headers["etag"]
        again = ask(page_app(), "GET", path, headers={"if-none-match": tag})
        assert (again.status_code, again.content) == (304, b"")


def test_the_index_holds_nothing_inline_and_nothing_from_elsewhere():
    for name, file in read_shipped().items():
        if name.endswith((".html", ".css", ".js")):
            text = file.data.decode().lower().replace("http://www.w3.org/2000/svg", "")
            assert "http://" not in text, name
            assert "https://" not in text, name


@pytest.mark.parametrize(
    "path",
    ["/page/static/../routes.py", "/page/static/..%2froutes.py", "/page/static/%2e%2e/%2e%2e/app.py",
     "/page/static//etc/passwd", "/page/static/%2fetc%2fpasswd", "/page/static/index.html%00",
     "/page/static/..\\routes.py"],
)  # fmt: skip
def test_no_path_reaches_the_file_system(path):
    made = ask(page_app(), "GET", path)
    assert made.status_code == 404
    assert b"import" not in made.content


def test_settings():
    told = ask(page_app(limits=Limits(new_tokens=100, images=3, body_bytes=9999)), "GET", "/page/settings").json()
    assert told["models"] == [{"name": "parrot"}]
    assert (told["new_tokens"], told["images"], told["body_bytes"]) == (100, 3, 9999)
    assert told["defaults"] == {"temperature": 0.2, "top_p": 0.7, "max_tokens": 100}
    assert (told["votes"], told["examples"]) == (False, [])


def test_without_a_log_nothing_is_taken_to_be_kept():
    said = {"type": "upvote", "id": "1", "model": "parrot", "messages": [{"role": "assistant", "content": "Hi"}]}
    for path in ("/page/votes", "/page/turns"):
        assert ask(page_app(), "POST", path, json=said).status_code == 404


def test_examples(tmp_path):
    make_picture(tmp_path / "a.jpg")
    make_picture(tmp_path / "b.png", 9, 9)
    records = [{"text": "What?", "images": ["a.jpg"]}, {"text": "Hi"}, {"images": ["b.png", "a.jpg"]}]
    (tmp_path / "e.json").write_text(json.dumps(records))
    examples = read_examples(tmp_path / "e.json")
    (tmp_path / "e.yaml").write_text("- text: What?\n  images: [a.jpg]\n- text: Hi\n- images: [b.png, a.jpg]\n")
    assert read_examples(tmp_path / "e.yaml") == examples
    app = page_app(page=Page(examples), keys=[KEY])
    told = ask(app, "GET", "/page/settings", headers=SHOWN).json()["examples"]
    assert told == [
        {"text": "What?", "images": ["/page/examples/0"]},
        {"text": "Hi", "images": []},
        {"text": "", "images": ["/page/examples/1", "/page/examples/2"]},
    ]
    for number, (name, media) in enumerate([("a.jpg", "image/jpeg"), ("b.png", "image/png"), ("a.jpg", "image/jpeg")]):
        made = ask(app, "GET", f"/page/examples/{number}", headers=SHOWN)
        assert (made.content, made.headers["content-type"]) == ((tmp_path / name).read_bytes(), media)
    for number in ("3", "-1", "x", "99999999999999999999"):
        assert ask(app, "GET", f"/page/examples/{number}", headers=SHOWN).status_code in (400, 404)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ({"text": "x"}, "must be a list of examples"),
        ([], "must be a list of examples"),
        (["x"], "example 1: must have the fields"),
        ([{"text": "x"}, {"txt": "x"}], r'example 2: txt: unknown field \(did you mean "text"\?\)'),
        ([{"text": 3}], "example 1: text: must be a text"),
        ([{"text": "x", "images": "a.jpg"}], "example 1: images: must be a list"),
        ([{"images": ["none.jpg"]}], r"example 1: images: .*none.jpg: can't read it \(No such file"),
        ([{"images": ["broken.jpg"]}], "example 1: images: .*broken.jpg"),
        ([{"images": ["a.tiff"]}], "browsers don't show TIFF; save it as JPEG or PNG"),
        ([{"text": " "}], "has neither text nor images"),
        ([{"text": "x"}] * 51, "51 examples; the page shows 50 at most"),
    ],
)
def test_examples_that_are_wrong_are_told_at_the_start(tmp_path, records, said):
    make_picture(tmp_path / "a.tiff")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    file = tmp_path / "examples.json"
    file.write_text(json.dumps(records))
    with pytest.raises(RunError, match=said) as caught:
        read_examples(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_no_yaml_is_told(tmp_path):
    (tmp_path / "e.yaml").write_text("- text: [")
    with pytest.raises(RunError, match=r"e\.yaml: not YAML"):
        read_examples(tmp_path / "e.yaml")
    with pytest.raises(RunError, match=r"none\.json: can't read the examples"):
        read_examples(tmp_path / "none.json")
