"""Two columns, a server that breaks off or goes away, and text that was made to be slow."""

import time

import pytest
from tests.support.server_process import serving
from tests.support.waiting import until


def columns(visit):
    """Answers of the last question, left to right."""
    return [one.inner_text() for one in visit.page.locator(".exchange").last.locator(".answer > .prose").all()]


def side_by_side(visit, left="parrot", right="tag"):
    visit.page.get_by_role("button", name="Side by side").click()
    visit.page.locator("#model-0").select_option(left)
    visit.page.locator("#model-1").select_option(right)


def test_two_models_answer_the_same_questions(visit, site):
    """Each column goes on with its own answers, with its own settings; one of them can be kept."""
    page = visit.page
    visit.ask("First?")
    side_by_side(visit)
    visit.ask("Second?")
    assert columns(visit) == ["a red dog 음식", "<img src=q onload>"]
    page.locator("#settings").click()
    page.get_by_role("group", name="Right").get_by_label("System prompt").fill("Be brief.")
    page.get_by_role("group", name="Right").get_by_label("Seed").fill("5")
    bodies = []
    page.on("request", lambda made: made.url.endswith("completions") and bodies.append(made.post_data_json))
    visit.ask("Third?")
    left, right = sorted(bodies, key=lambda body: body["model"])
    assert [m["content"] for m in left["messages"]] == [
        "First?",
        "a red dog 음식",
        "Second?",
        "a red dog 음식",
        "Third?",
    ]
    assert [m["content"] for m in right["messages"]] == [
        "Be brief.", "First?", "a red dog 음식", "Second?", "<img src=q onload>", "Third?",
    ]  # fmt: skip
    assert ("seed" in left, right["seed"]) == (False, 5)
    page.get_by_role("button", name="Right is better").last.click()
    until(lambda: {one["type"] for one in site.kept()[-2:]} == {"upvote", "downvote"}, 5)
    assert {one["type"]: one["model"] for one in site.kept()[-2:]} == {"upvote": "tag", "downvote": "parrot"}
    page.get_by_role("button", name="Side by side").click()
    page.get_by_role("dialog").get_by_role("button", name="Right").click()
    assert visit.answers() == ["a red dog 음식", "<img src=q onload>", "<img src=q onload>"]
    assert page.locator("#models select").count() == 1
    page.get_by_role("button", name="Undo").click()
    assert columns(visit) == ["a red dog 음식", "<img src=q onload>"]
    assert page.locator("#models select").count() == 2


def test_one_column_fails_and_is_tried_again_alone(visitor, site):
    """Stop ends both; what got no answer in a column is left out of its conversation."""
    visit = visitor().open("forever")
    visit.longest()
    side_by_side(visit, "forever", "parrot")
    visit.ask("First?", wait=False)
    until(lambda: len(columns(visit)[0]) > 20 and columns(visit)[1] == "a red dog 음식", 5)
    visit.page.keyboard.press("Escape")
    visit.idle()
    until(lambda: site.metric('lapilli_active{model="forever"}') == 0, 1)
    visit.page.get_by_role("button", name="Answer again").last.click()
    visit.idle()
    assert visit.page.locator(".count").inner_text() == "2/2"


@pytest.mark.slow
def test_answers_that_break_off(visitor, page_models, models):
    """A time limit, a server that dies in the middle of an answer, one that is gone: words, a retry, nothing lost."""
    with serving(f"forever={models / 'endless'}", "--request-seconds", "4", "--new-tokens", "20000") as server:
        visit = visitor(key=None, root=server.root).open("forever")
        visit.expected.append("ERR_")
        visit.longest()
        problem = visit.page.locator(".problem")
        visit.ask("Tell me")
        assert "broke the answer off" in problem.inner_text()
        assert "4 s" in problem.inner_text()  # the server's own words
        assert visit.answers()[0].startswith("one blu")
        assert visit.page.get_by_role("button", name="Good answer").count() == 0  # nothing is kept here

        visit.choose(page_models / "wide.jpg")
        visit.ask("Go on", wait=False)
        until(lambda: "blu" in visit.answers()[-1], 5)
        server.process.kill()
        visit.idle()
        assert "connection was lost" in problem.last.inner_text()
        assert "What had come is kept." in problem.last.inner_text()

        problem.last.get_by_role("button", name="Try again").click()
        visit.idle()
        assert "can't be reached" in problem.last.inner_text()
        assert visit.questions() == ["Tell me", "Go on"]
        assert visit.page.locator(".question img").count() == 1


@pytest.mark.slow
def test_long_answers_stay_quick(visitor):
    """A long answer: the page keeps up, and follows only a reader who is at its end."""
    visit = visitor().open("forever")
    visit.longest(1500)
    visit.ask("Tell me", wait=False)
    until(lambda: len(visit.answers()[0]) > 2000, 60)
    visit.page.locator("#thread").evaluate("(one) => one.scrollTo(0, 0)")
    visit.page.locator("#latest").wait_for()
    visit.page.locator("#send").wait_for(timeout=60_000)
    assert visit.page.locator("#thread").evaluate("(one) => one.scrollTop") == 0
    visit.page.locator("#latest").click()
    assert visit.page.locator("#latest").is_hidden()
    assert "1,500 tokens" in visit.page.locator(".figures").inner_text()


MARKDOWN = [
    ("# A *b*", "<h3>A <em>b</em></h3>"),
    ("###### f", "<h6>f</h6>"),
    ("a\nb", "<p>a<br>b</p>"),
    ("**b** __c__ ~~d~~ `e*f*`", "<p><strong>b</strong> <strong>c</strong> <del>d</del> <code>e*f*</code></p>"),
    ("***x*** snake_case_name 2*3*4 * a", "<p><strong><em>x</em></strong> snake_case_name 2<em>3</em>4 * a</p>"),
    ("- a\n- b\n  - c\n\n1. d\n2. e", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol><li>d</li><li>e</li></ol>"),
    ("3) c\n\n   more\n4) d", "<ol><li>c<p>more</p></li><li>d</li></ol>"),
    ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    ("a\n\n---\nb", "<p>a</p><hr><p>b</p>"),
    (
        "|a|b|\n|-|:-:|\n|1\\|2|",
        "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1|2</td><td></td></tr></tbody></table>",
    ),
    ("```py\nif a < b:\n\n  c\n```\nd", "<pre><code>if a &lt; b:\n\n  c</code></pre><p>d</p>"),
    ("```\nnever closed", "<pre><code>never closed</code></pre>"),
    ("`not closed **nor this [x](y", "<p>`not closed **nor this [x](y</p>"),
    ("[a](https://e.org/b_(c)) https://e.org/d.", "<p><a>a</a> <a>https://e.org/d</a>.</p>"),
    ("\\*a\\* \\(x_1 + x_2\\)", "<p>*a* \\(x_1 + x_2\\)</p>"),
]  # fmt: skip


def test_markdown(visit):
    drawn = visit.page.evaluate(
        """async (texts) => {
            const { nodes } = await import('/page/static/markdown.js');
            return texts.map((text) => {
                const box = document.createElement('div');
                box.append(...nodes(text));
                for (const head of box.querySelectorAll('.code-head')) head.remove();
                for (const outer of box.querySelectorAll('.code, .wide, li > span')) {
                    outer.replaceWith(...outer.childNodes);
                }
                for (const one of box.querySelectorAll('*')) {
                    for (const name of one.getAttributeNames()) one.removeAttribute(name);
                }
                return box.innerHTML;
            });
        }""",
        [text for text, _ in MARKDOWN],
    )
    assert drawn == [wanted for _, wanted in MARKDOWN]


def test_text_that_was_made_to_be_slow(visit):
    """50,000 characters of every mark, and of marks in turn, are drawn within seconds."""
    texts = [mark * (50_000 // len(mark)) for mark in (
        "*", "**a ", "_a", "`", "``a`", "[", "![a](", "[a](http://", "> ", ">", "- ", "  - a\n", "|", "|a\n|-", "#",
        "~", "https://", "\\", "a\n\n", "```\n", "1. ", "*a_b~~c`", "<", "\n", " \t",
    )]  # fmt: skip
    for text in texts:
        begun = time.monotonic()
        visit.page.evaluate("async (text) => void (await import('/page/static/markdown.js')).nodes(text)", text)
        assert time.monotonic() - begun < 4, text[:12]
