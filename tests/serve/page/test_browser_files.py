"""Pictures and files: chosen, pasted, dropped, too large; conversations out of the page and into it."""

import base64
import json

import PIL.Image
import pytest
from tests.serve.page.conftest import LIMITS

from lapilli.data.read.llava import read
from lapilli.generate.session import Session


def give(page, kind, *files, types=()):
    """Paste or drop files, as the browser itself hands them over. `types` are further (type, text) pairs."""
    given = [(file.name, base64.b64encode(file.read_bytes()).decode()) for file in files]
    page.evaluate(
        """([kind, files, types]) => {
            const transfer = new DataTransfer();
            for (const [name, data] of files) {
                const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
                const type = name.endsWith('.png') ? 'image/png' : name.endsWith('.jpg') ? 'image/jpeg' : '';
                transfer.items.add(new File([bytes], name, { type }));
            }
            for (const [type, text] of types) transfer.setData(type, text);
            const box = document.getElementById('question');
            const how = { bubbles: true, cancelable: true };
            if (kind === 'paste') {
                box.dispatchEvent(new ClipboardEvent('paste', { ...how, clipboardData: transfer }));
            } else {
                for (const name of ['dragenter', 'dragover', 'drop']) {
                    document.body.dispatchEvent(new DragEvent(name, { ...how, dataTransfer: transfer }));
                }
            }
        }""",
        [kind, given, list(types)],
    )


def names(page):
    return [one.get_attribute("aria-label") for one in page.locator("#tray li").all()]


def note(page):
    return page.locator(".toast").last.inner_text()


@pytest.fixture
def download(tmp_path):
    def exported(visit, side=None):
        with visit.page.expect_download() as caught:
            visit.menu("Export conversation")
            if side:
                visit.page.get_by_role("dialog").get_by_role("button", name=side).click()
        file = tmp_path / caught.value.suggested_filename
        caught.value.save_as(file)
        return file

    return exported


def write(folder, record, name="saved.json"):
    file = folder / name
    file.write_text(record if isinstance(record, str) else json.dumps(record))
    return file


def import_file(visit, file):
    with visit.page.expect_file_chooser() as chooser:
        visit.menu("Import conversation")
    chooser.value.set_files(str(file))


def test_pictures_by_choice_paste_and_drop(visit, page_models, site):
    """All three ways add up; pictures can be moved and taken out, and the model gets them as they are, in order."""
    page = visit.page
    wide, tall = page_models / "wide.jpg", page_models / "tall.png"
    visit.choose(wide)
    give(page, "paste", tall)
    page.locator("#tray li").nth(1).wait_for()
    give(page, "drop", wide, tall)
    page.locator("#tray li").nth(3).wait_for()
    assert names(page)[:2] == [
        f"Picture 1: wide.jpg, 93 × 57, {round(wide.stat().st_size / 1000)} kB",
        f"Picture 2: tall.png, 40 × 71, {round(tall.stat().st_size / 1000)} kB",
    ]
    assert page.locator("#drop").is_hidden()
    assert f"takes {LIMITS['images']} in a request" in page.locator("#composer-note").inner_text()
    visit.box.fill("What?")
    visit.box.press("Enter")  # is not sent
    assert page.locator(".exchange").count() == 0
    page.get_by_role("button", name="Take out wide.jpg").first.click()
    page.locator("#tray li").first.focus()
    page.keyboard.press("Delete")
    page.locator("#tray li").first.focus()
    page.keyboard.press("Alt+ArrowRight")
    assert [name.split(",")[0] for name in names(page)] == ["Picture 1: tall.png", "Picture 2: wide.jpg"]
    with page.expect_request("**/v1/chat/completions") as asked:
        visit.ask("What?")
    (message,) = asked.value.post_data_json["messages"]
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    assert [base64.b64decode(url.partition(",")[2]) for url in urls] == [tall.read_bytes(), wide.read_bytes()]
    assert "".join(part.get("text", "|") for part in message["content"]) == "|\n|\nWhat?"
    assert len(site.kept()[-1]["images"]) == 2


def test_a_pasted_table_stays_text_and_a_dropped_link_is_refused(visit, page_models):
    give(visit.page, "paste", page_models / "tall.png", types=[("text/plain", "a cell")])
    give(visit.page, "drop", types=[("text/uri-list", "https://example.org/a.jpg")])
    assert "loads nothing from elsewhere" in note(visit.page)
    assert names(visit.page) == []


def test_pictures_over_the_limits(visit, page_models, tmp_path):
    """What the server would refuse is said before it is sent, and scaled down only on request."""
    page = visit.page
    visit.choose(page_models / "huge.png")
    visit.choose(page_models / "broken.png")
    assert "900 × 700 are 0.63 megapixels; this server takes 0.25 megapixels" in names(page)[0]
    assert "not a picture that this browser can open" in names(page)[1]
    visit.box.fill("What?")
    visit.box.press("Enter")
    assert page.locator(".exchange").count() == 0
    page.get_by_role("button", name="Take out broken.png").click()
    page.get_by_role("button", name="Scale down").click()
    page.get_by_text("scaled to").wait_for()
    noise = tmp_path / "noise.png"  # few pixels, many bytes
    PIL.Image.effect_noise((480, 480), 90).convert("RGB").resize((490, 490)).save(noise)
    assert noise.stat().st_size > LIMITS["image-bytes"]
    visit.choose(noise)
    assert "this server takes 300 kB a picture" in names(page)[1]
    page.get_by_role("button", name="Scale down").click()
    page.get_by_text("scaled to").nth(1).wait_for()
    with page.expect_request("**/v1/chat/completions") as asked:
        visit.ask("What?")
    parts = [part for part in asked.value.post_data_json["messages"][0]["content"] if part["type"] == "image_url"]
    sizes = []
    for number, part in enumerate(parts):
        file = tmp_path / f"sent-{number}"
        file.write_bytes(base64.b64decode(part["image_url"]["url"].partition(",")[2]))
        assert file.stat().st_size <= LIMITS["image-bytes"]
        sizes.append(PIL.Image.open(file).size)
    assert all(width * height <= LIMITS["image-pixels"] for width, height in sizes)
    assert abs(sizes[0][0] / sizes[0][1] - 9 / 7) < 0.01
    assert visit.answers() == ["a red dog 음식"]


def test_pictures_stand_where_the_question_says(visit, page_models):
    visit.choose(page_models / "wide.jpg", page_models / "tall.png")
    visit.box.fill("Only <image> one")
    assert "has 1 <image>, but 2 pictures" in visit.page.locator("#composer-note").inner_text()
    with visit.page.expect_request("**/v1/chat/completions") as asked:
        visit.ask("First <image> and <image>?")
    (message,) = asked.value.post_data_json["messages"]
    assert [part.get("text", "") for part in message["content"]] == ["First ", "", " and ", "", "?"]
    assert visit.questions() == ["First picture 1 and picture 2?"]


def test_examples(visit):
    visit.page.get_by_role("button", name="What is on these?").click()
    assert visit.box.input_value() == "What is on these?"
    assert visit.page.locator("#tray li").count() == 2
    visit.box.press("Enter")
    visit.idle()
    assert visit.answers() == ["a red dog 음식"]


def test_export_and_import(visit, visitor, download, page_models, parrot):
    """What was said goes into a file and back, pictures byte for byte; `lapilli chat` opens it and reads the same."""
    visit.page.locator("#settings").click()
    visit.page.get_by_label("System prompt").fill("Be brief.")
    visit.choose(page_models / "wide.jpg", page_models / "tall.png")
    visit.ask("What <b>is</b> it?")
    visit.ask("Sure?")
    file = download(visit)
    (record,) = json.loads(file.read_text())
    said = [(turn["from"], turn["value"]) for turn in record["conversations"]]
    assert said == [
        ("system", "Be brief."),
        ("human", "<image>\n<image>\nWhat <b>is</b> it?"),
        ("gpt", "a red dog 음식"),
        ("human", "Sure?"),
        ("gpt", "a red dog 음식"),
    ]
    sample = next(iter(read(file)))
    assert [image.data for image in sample.images] == [
        (page_models / "wide.jpg").read_bytes(),
        (page_models / "tall.png").read_bytes(),
    ]
    session = Session(parrot)
    session.open(file)
    assert session.system == "Be brief."
    assert [(question, answer, len(shown)) for question, answer, shown in session.history()] == [
        ("<image>\n<image>\nWhat <b>is</b> it?", "a red dog 음식", 2),
        ("Sure?", "a red dog 음식", 0),
    ]
    other = visitor().open()
    import_file(other, file)
    other.page.locator(".exchange").nth(1).wait_for()
    assert other.questions() == visit.questions()
    assert other.answers() == visit.answers()
    other.ask("Go on")
    again = json.loads(download(other).read_text())[0]
    assert again["conversations"][:5] == record["conversations"]
    assert again["image"] == record["image"]


def test_a_conversation_of_the_terminal(visit, page_models, parrot, tmp_path):
    """`lapilli chat` names pictures by their path, which the page has the user choose."""
    session = Session(parrot)
    session.add_image(page_models / "wide.jpg")
    session.ask("What is it?")
    session.save(tmp_path / "saved.json")
    import_file(visit, tmp_path / "saved.json")
    dialog = visit.page.get_by_role("dialog")
    assert "wide.jpg" in dialog.inner_text()
    dialog.get_by_label("Picture files").set_input_files(str(page_models / "wide.jpg"))
    visit.page.locator(".exchange").wait_for()
    assert visit.questions() == ["What is it?"]
    assert visit.page.locator(".question img").count() == 1


TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


WRONG = [
    ("{no", "not JSON"),
    ([], "holds 0 conversations"),
    ([{"conversations": TURNS}] * 2, "holds 2 conversations"),
    ([7], "must be an object"),
    ([{"id": "x"}], "`conversations` must be a list of turns"),
    ([{"conversations": TURNS[:1]}], "an answer come last"),
    ([{"conversations": TURNS[::-1]}], "turn 1: is from the assistant"),
    ([{"conversations": [{"from": "robot", "value": ""}]}], 'unknown role "robot"'),
    ([{"conversations": [{"from": "constructor", "value": ""}]}], 'unknown role "constructor"'),
    ([{"conversations": [TURNS[0], {"from": "gpt", "value": 7}]}], "turn 2: `value` must be text"),
    ([{"conversations": TURNS, "image": "data:image/png;base64,AAAA"}], "have 0 <image>, but the record names 1"),
    (
        [{"conversations": [{"from": "human", "value": "<image>"}, TURNS[1]], "image": "http://example.org/a.png"}],
        "loads nothing from elsewhere",
    ),
    (
        [{"conversations": [{"from": "human", "value": "<image>"}, TURNS[1]], "image": "data:text/html,<b>"}],
        "picture 1: can't be opened",
    ),
]


def test_files_with_errors_are_refused(visit, tmp_path):
    """What is wrong and where is said, and the conversation stays as it was."""
    for number, (record, said) in enumerate(WRONG):
        give(visit.page, "drop", write(tmp_path, record, f"{number}.json"))
        told = visit.page.locator(".toast.bad").filter(has_text=f"{number}.json: ")
        told.last.wait_for()
        assert said in told.last.inner_text()
        assert visit.page.locator(".exchange").count() == 0


HOSTILE = """<script>document.title = 'got'</script><img src=x onerror="document.title='got'">

[click](javascript:document.title='got') [data](data:text/html,x) [good](https://example.org/a_b "t")

![picture](https://example.org/tracker.png) <https://example.org/<b>> https://example.org/x?a=1&b=<i>

| a | <svg onload=alert(1)> |
|:-:|--:|
| `<b>` | [x](vbscript:y) |

# <h1 onclick=alert(1)>

```html
<script>document.title = 'got'</script>
```
"""


def test_hostile_text_stays_text(visit, tmp_path):
    """Answers, questions and names of an imported file: no element but Markdown's own, no address but links."""
    turns = [{"from": "human", "value": HOSTILE}, {"from": "gpt", "value": HOSTILE}]
    give(visit.page, "drop", write(tmp_path, [{"conversations": turns}], "<img src=x onerror=alert(1)>.json"))
    visit.page.locator(".exchange").wait_for()
    made = visit.page.evaluate(
        """[...document.querySelectorAll('.prose *')].flatMap((one) =>
           [one.localName, ...one.getAttributeNames().map((name) => `${one.localName} ${name}`)])"""
    )
    assert not {"script", "img", "svg", "b", "i", "iframe"} & set(made) - {"svg"}
    assert not [name for name in made if " on" in name or " style" in name or " src" in name]
    links = visit.page.locator(".prose a")
    assert [link.get_attribute("href") for link in links.all()] == [
        "https://example.org/a_b",
        "https://example.org/tracker.png",
        "https://example.org/",
        "https://example.org/x?a=1&b=",
    ]
    assert {link.get_attribute("rel") for link in links.all()} == {"noopener noreferrer nofollow"}
    assert visit.page.title() == "lapilli"
    assert "<script>document.title = 'got'</script><img src=x" in visit.answers()[0]
