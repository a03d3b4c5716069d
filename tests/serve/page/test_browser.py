"""The page as a user has it: asking, streaming, stopping, asking again, the keyboard, narrow and dark screens."""

import pytest
from tests.serve.page.conftest import KEY, QUEUE, SLOTS
from tests.support.waiting import until


def test_ask_and_go_on(visit, site):
    """Answers come as they are written, with what was said before, and are counted."""
    visit.ask("Who is there?")
    visit.ask("And\nnow?")
    assert visit.answers() == ["a red dog 음식"] * 2
    assert visit.questions() == ["Who is there?", "And\nnow?"]
    assert "9 tokens" in visit.page.locator(".figures").first.inner_text()
    last = site.kept()[-1]
    assert (last["type"], last["model"]) == ("chat", "parrot")
    assert [text for _, text in last["state"]["messages"]] == [
        "Who is there?",
        "a red dog 음식",
        "And\nnow?",
        "a red dog 음식",
    ]


def test_stop_frees_the_slot_and_keeps_the_words(visit, site):
    visit.page.locator("#model-0").select_option("forever")
    visit.longest()
    visit.ask("Tell me", wait=False)
    until(lambda: "bird one blue" in "".join(visit.answers()), 5)
    assert visit.page.locator(".answer.running").count() == 1
    visit.page.keyboard.press("Escape")
    visit.idle()
    until(lambda: site.metric('lapilli_active{model="forever"}') == 0, 1)
    assert visit.answers()[0].startswith("one blue bird one blue")
    assert visit.page.locator(".remark").inner_text() == "Stopped."
    visit.box.fill("More")  # Enter does nothing while an answer grows, and what was typed stays
    visit.page.locator("#send").click()
    visit.box.fill("not yet")
    visit.box.press("Enter")
    assert visit.box.input_value() == "not yet"
    assert "under way" in visit.page.locator("#composer-note").inner_text()
    visit.page.locator("#stop").click()
    visit.idle()


def test_length_is_said(visit):
    visit.page.locator("#model-0").select_option("forever")
    visit.longest(5)
    visit.ask("Tell me")
    assert "Cut off" in visit.page.locator(".remark").inner_text()
    assert "5 tokens" in visit.page.locator(".figures").inner_text()


def test_ask_again_and_edit(visit):
    """Another answer stands beside the first; an edited question drops what came later, and that can be undone."""
    page = visit.page
    visit.ask("One?")
    visit.ask("Two?")
    page.locator("#model-0").select_option("tag")
    page.get_by_role("button", name="Answer again").last.click()
    visit.idle()
    assert visit.answers() == ["a red dog 음식", "<img src=q onload>"]
    assert page.locator(".count").inner_text() == "2/2"
    page.get_by_role("button", name="Earlier answer").click()
    assert visit.answers() == ["a red dog 음식"] * 2

    page.locator(".exchange").first.hover()
    page.get_by_role("button", name="Edit the question").first.click()
    assert "1 later question goes" in page.locator(".editing small").inner_text()
    page.get_by_label("Edited question").fill("Another?")
    page.get_by_role("button", name="Ask", exact=True).click()
    visit.idle()
    assert visit.questions() == ["Another?"]
    page.get_by_role("button", name="Undo").click()
    assert visit.questions() == ["One?", "Two?"]

    page.get_by_role("button", name="Edit the answer").first.click()
    page.get_by_label("Edited answer").fill("a *green* cat")
    page.get_by_label("Edited answer").press("Control+Enter")
    assert visit.answers()[0] == "a green cat"
    assert "edited" in page.locator(".figures").first.inner_text()

    page.get_by_role("button", name="Delete this question").last.focus()
    page.keyboard.press("Enter")
    assert visit.questions() == ["One?"]
    page.get_by_role("button", name="New conversation").click()
    assert visit.questions() == []
    page.get_by_role("button", name="Undo").last.click()
    assert visit.questions() == ["One?"]


def test_what_is_typed_into_an_edit_is_not_lost(visit):
    """Drawing the conversation anew (here: for another question) keeps the words, and the focus stays where it was."""
    page = visit.page
    visit.ask("One?")
    page.get_by_role("button", name="Edit the answer").click()
    page.get_by_label("Edited answer").fill("half of")
    visit.ask("Two?")
    assert page.get_by_label("Edited answer").input_value() == "half of"
    page.get_by_role("button", name="Cancel").click()
    assert visit.answers() == ["a red dog 음식"] * 2
    page.get_by_role("button", name="Answer again").last.focus()
    page.keyboard.press("Enter")
    page.get_by_text("2/2").wait_for()
    page.get_by_role("button", name="Earlier answer").focus()
    page.keyboard.press("Enter")
    page.get_by_text("1/2").wait_for()
    assert page.evaluate("document.activeElement.id") == "question"  # for that button can't be pressed any more
    page.get_by_role("button", name="Later answer").focus()
    page.keyboard.press("Enter")
    page.get_by_text("2/2").wait_for()
    page.get_by_role("button", name="Good answer").last.focus()
    page.get_by_role("button", name="Edit the answer").first.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.ariaLabel") == "Good answer"


def test_a_model_that_is_not_served_is_said(visitor):
    visit = visitor()
    visit.page.goto(f"{visit.root}/?model=another")
    visit.page.get_by_text("No model is called “another” here.").wait_for()
    assert visit.page.locator("#model-0").input_value() == "parrot"


def test_thoughts_are_folded(visitor):
    visit = visitor().open("thinker")
    visit.ask("Well?")
    assert visit.answers() == ["blu"]
    thought = visit.page.locator("details.thought")
    assert thought.get_attribute("open") is None
    thought.locator("summary").click()
    assert thought.locator(".prose").inner_text() == "one"


def test_what_a_model_writes_is_no_part_of_the_page(visitor):
    visit = visitor().open("tag")
    visit.ask("Well?")
    assert visit.answers() == ["<img src=q onload>"]
    assert visit.page.locator(".answer img").count() == 0


def test_key(visitor):
    """Without a key the page asks for it, says when it is wrong, and goes on with what was meant."""
    visit = visitor(key=None)
    visit.expected.append("401")
    visit.page.goto(f"{visit.root}/?model=parrot")
    visit.page.get_by_label("Key", exact=True).fill("wrong")
    visit.page.keyboard.press("Enter")
    visit.page.get_by_text("does not take this key").wait_for()
    visit.page.get_by_label("Key", exact=True).fill(KEY)
    visit.page.keyboard.press("Enter")
    visit.page.locator("html[data-ready]").wait_for()
    visit.ask("Who?")
    assert visit.answers() == ["a red dog 음식"]
    assert visit.page.evaluate("JSON.stringify(localStorage)") == "{}"
    visit.page.evaluate("sessionStorage.setItem('lapilli.key', 'old')")  # while the page is open
    visit.ask("And now?", wait=False)
    visit.page.get_by_label("Key", exact=True).fill(KEY)
    visit.page.keyboard.press("Enter")
    visit.idle()
    assert visit.answers() == ["a red dog 음식"] * 2


def test_a_full_queue_is_said_and_tried_again(visitor, site):
    ask = {"model": "forever", "messages": [{"role": "user", "content": "?"}], "stream": True}
    visit = visitor().open("forever")
    visit.longest()
    visit.expected.append("429")
    streams = [site.http.stream("POST", "/v1/chat/completions", json=ask) for _ in range(SLOTS + QUEUE)]
    try:
        for stream in streams:
            stream.__enter__()
        until(lambda: site.metric('lapilli_waiting{model="forever"}') == QUEUE, 5)
        visit.ask("Room for me?")
        assert "The server is busy." in visit.page.locator(".problem").inner_text()
        again = visit.page.locator(".problem button")
        assert "in " in again.inner_text()
        assert again.is_disabled()
        assert visit.questions() == ["Room for me?"]
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)
    visit.page.locator(".problem button:enabled").click(timeout=65_000)
    until(lambda: "".join(visit.answers()).startswith("one blue"), 5)
    visit.page.keyboard.press("Escape")
    visit.idle()


def test_keyboard(visit):
    page = visit.page
    visit.box.press_sequentially("one")
    visit.box.press("Shift+Enter")
    visit.box.press_sequentially("two")
    assert visit.box.input_value() == "one\ntwo"
    visit.box.press("Enter")
    visit.idle()
    visit.box.press("ArrowUp")
    assert page.get_by_label("Edited question").input_value() == "one\ntwo"
    page.keyboard.press("Escape")
    assert page.locator(".editing").count() == 0
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.press("Control+/")
    listed = page.get_by_role("dialog", name="Keyboard").inner_text()
    assert "Enter" in listed
    assert "object" not in listed
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog", name="Keyboard").count() == 0
    page.keyboard.press("Shift+Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    unlabelled = page.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea')]
           .filter((one) => !(one.textContent.trim() || one.ariaLabel || one.labels?.length))
           .map((one) => one.outerHTML)"""
    )
    assert unlabelled == []


def test_enter_while_composing_chooses_a_syllable(visit):
    """The browser's own composition, as an input method for Korean drives it."""
    page = visit.page
    visit.box.focus()
    devtools = page.context.new_cdp_session(page)
    devtools.send("Input.imeSetComposition", {"text": "음시", "selectionStart": 2, "selectionEnd": 2})
    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
    devtools.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **key})
    assert page.locator(".exchange").count() == 0
    devtools.send("Input.insertText", {"text": "음식"})
    assert visit.box.input_value() == "음식"
    visit.box.press("Enter")
    visit.idle()
    assert visit.questions() == ["음식"]


def test_screen_readers_hear_the_answer_once(visit):
    visit.ask("Who?")
    said = visit.page.locator("[aria-live=polite]")
    until(lambda: said.inner_text() == "a red dog 음식", 5)
    assert visit.page.locator(".answer").get_attribute("aria-busy") == "false"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_switch(visitor, scheme):
    visit = visitor(color_scheme=scheme).open()

    def ground():
        return sum(
            map(int, visit.page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(","))
        )

    assert (ground() > 384) == (scheme == "light")
    other = {"light": "dark", "dark": "light"}[scheme]
    visit.page.get_by_role("button", name="More").click()
    visit.page.get_by_label(other.title()).check()
    assert (ground() > 384) == (other == "light")
    visit.page.reload()
    visit.page.locator("html[data-ready]").wait_for()
    assert (ground() > 384) == (other == "light")


def test_phone(visitor, page_models):
    """360 pixels: nothing is cut off, the settings are a drawer, and Enter is a new line."""
    visit = visitor(viewport={"width": 360, "height": 420}, has_touch=True, is_mobile=True).open()
    page = visit.page
    page.get_by_role("button", name="What is on these?").wait_for()
    assert page.locator("#thread").evaluate("(one) => [one.scrollTop, one.scrollHeight > one.clientHeight]") == [
        0,
        True,
    ]
    page.set_viewport_size({"width": 360, "height": 640})
    visit.choose(page_models / "wide.jpg", page_models / "tall.png", page_models / "huge.png")
    assert visit.wide() == 0
    page.get_by_role("button", name="Take out huge.png").tap()
    visit.box.fill("What is here? " + "W" * 120)
    visit.box.press("Enter")
    assert page.locator(".exchange").count() == 0
    page.locator("#send").tap()
    visit.idle()
    assert visit.wide() == 0
    page.get_by_role("button", name="Side by side").tap()
    page.locator("#model-1").select_option("tag")
    visit.box.fill("Both?")
    page.locator("#send").tap()
    visit.idle()
    assert visit.wide() == 0
    page.get_by_role("button", name="Settings", exact=True).tap()
    page.locator("#panel:modal").wait_for()
    assert visit.wide() == 0
    outside = page.evaluate(
        """[...document.querySelectorAll('button, select, input, textarea')].filter((one) => {
           const { left, right, width } = one.getBoundingClientRect();
           return one.checkVisibility() && width > 1 && (left < 0 || right > innerWidth);
        }).map((one) => one.outerHTML)"""
    )
    assert outside == []


def test_copy(visit):
    visit.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.ask("Who?")
    visit.page.get_by_role("button", name="Copy the answer").click()
    until(lambda: visit.page.evaluate("navigator.clipboard.readText()") == "a red dog 음식", 5)


@pytest.mark.parametrize(("wish", "moves"), [("reduce", False), ("no-preference", True)])
def test_nothing_moves_where_that_is_not_wanted(visitor, wish, moves):
    visit = visitor(reduced_motion=wish).open("forever")
    visit.longest()
    visit.ask("Tell me", wait=False)
    visit.page.locator(".dots").wait_for()
    running = "document.getAnimations().some((one) => one.animationName === 'breathe')"
    assert visit.page.evaluate(running) == moves
    visit.page.keyboard.press("Escape")
    visit.idle()


def test_a_seed_moves_on_when_asked_again(visit):
    """Asked for other draws, with everything else as it was set."""
    visit.page.locator("#settings").click()
    visit.page.get_by_label("Seed").fill("7")
    visit.page.get_by_label("Temperature").fill("1.5")
    bodies = []
    visit.page.on("request", lambda made: made.url.endswith("completions") and bodies.append(made.post_data_json))
    visit.ask("Who?")
    visit.page.get_by_role("button", name="Answer again").click()
    visit.idle()
    visit.ask("And now?")
    assert [body["seed"] for body in bodies] == [7, 8, 7]
    assert {(body["temperature"], body["top_p"], body["max_tokens"], body["stream"]) for body in bodies} == {
        (1.5, 0.7, 512, True)
    }
    assert [message["content"] for message in bodies[1]["messages"]] == ["Who?"]


def test_draft_and_settings_survive_a_reload(visit):
    visit.box.fill("half a question")
    visit.page.locator("#settings").click()
    visit.page.get_by_label("System prompt").fill("Be brief.")
    visit.page.get_by_label("Seed").fill("7")
    visit.page.reload()
    visit.page.locator("html[data-ready]").wait_for()
    assert visit.box.input_value() == "half a question"
    visit.page.locator("#settings").click()
    assert visit.page.get_by_label("System prompt").input_value() == "Be brief."
    assert visit.page.get_by_label("Seed").input_value() == "7"


def test_votes(visit, site):
    visit.ask("Who?")
    visit.page.get_by_role("button", name="Good answer").click()
    until(lambda: site.kept()[-1]["type"] == "upvote", 5)
    assert site.kept()[-1]["model"] == "parrot"
    assert visit.page.get_by_role("button", name="Good answer").get_attribute("aria-pressed") == "true"
    assert visit.page.get_by_role("button", name="Flag this answer").is_disabled()
