"""A server with a page, a browser in front of it, and what one does there."""

import json
import re
from dataclasses import dataclass, field

import httpx
import pytest
from tests.support.browser import browser
from tests.support.server_process import ServerProcess, serving
from tests.support.tiny import build_parrot, make_picture

KEY = "sk-a-key-for-the-page"
SLOTS, QUEUE = 2, 1
LIMITS = {"images": 3, "image-pixels": 250_000, "image-bytes": 300_000, "body-bytes": 1_000_000, "new-tokens": 20_000}


@pytest.fixture(scope="session")
def page_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    build_parrot(folder / "tag", " <img src=q onload>")
    build_parrot(folder / "thinker", "<think> one</think> blu", marks=["<think>", "</think>"])
    make_picture(folder / "wide.jpg")
    make_picture(folder / "tall.png", 40, 71, seed=3)
    make_picture(folder / "huge.png", 900, 700, seed=4)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    examples = [
        {"text": "What is on these?", "images": ["wide.jpg", "tall.png"]},
        {"text": "And without a picture?"},
    ]
    (folder / "examples.json").write_text(json.dumps(examples))
    return folder


@dataclass
class Site:
    server: ServerProcess
    http: httpx.Client
    log: object

    def metric(self, name):
        lines = [line for line in self.http.get("/metrics").text.splitlines() if line.startswith(name + " ")]
        return float(lines[0].split()[-1]) if lines else 0.0

    def kept(self):
        """The entries of the server's log."""
        return [json.loads(line) for file in sorted(self.log.glob("*.json")) for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")
def site(models, page_models, tmp_path_factory):
    log = tmp_path_factory.mktemp("page-log")
    log.chmod(0o700)
    names = [str(models / "parrot"), str(page_models / "tag"), str(page_models / "thinker")]
    names += [f"forever={models / 'endless'}"]
    bounds = [word for name, value in LIMITS.items() for word in (f"--{name}", str(value))]
    slots = ["--slots", str(SLOTS), "--queue", str(QUEUE)]
    more = ["--examples", str(page_models / "examples.json"), "--log-dir", str(log)]
    with (
        serving(*names, *slots, *bounds, *more, environment={"LAPILLI_API_KEY": KEY}) as server,
        httpx.Client(base_url=server.root, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as http,
    ):
        yield Site(server, http, log)


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        yield opened


@dataclass
class Visit:
    """One user's tab. What goes wrong in it without being expected fails the test."""

    page: object
    root: str
    trouble: list = field(default_factory=list)
    expected: list = field(default_factory=list)
    """Patterns of complaints on the console that a test provokes."""

    def open(self, model="parrot"):
        self.page.goto(f"{self.root}/?model={model}")
        self.page.locator("html[data-ready]").wait_for()
        return self

    @property
    def box(self):
        return self.page.locator("#question")

    def choose(self, *files):
        before = self.page.locator("#tray li").count()
        self.page.locator("#files").set_input_files([str(file) for file in files])
        self.page.locator("#tray li").nth(before + len(files) - 1).wait_for()

    def ask(self, text, wait=True):
        before = self.page.locator(".exchange").count()
        self.box.fill(text)
        self.box.press("Enter")
        self.page.locator(".exchange").nth(before).wait_for()
        if wait:
            self.idle()

    def idle(self):
        self.page.locator("#send").wait_for()

    def answers(self):
        return [one.inner_text() for one in self.page.locator(".answer > .prose").all()]

    def questions(self):
        return [one.inner_text() for one in self.page.locator(".asked").all()]

    def longest(self, tokens=20_000):
        """Set the longest answer; by default so long that one of `forever` surely goes on when it is stopped."""
        self.page.locator("#settings").click()
        self.page.locator("#max_tokens-0").fill(str(tokens))
        self.page.locator("#settings").click()

    def menu(self, entry):
        self.page.get_by_role("button", name="More").click()
        self.page.locator("#menu").get_by_role("button", name=entry).click()

    def wide(self):
        """Pixels that the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.fixture
def visitor(chromium, site):
    """Makes tabs; each in a profile of its own, with the key unless told otherwise."""
    visits, contexts = [], []

    def make(key=KEY, root=site.server.root, **options):
        context = chromium.new_context(**options)
        contexts.append(context)
        if key is not None:
            context.add_init_script(
                f"sessionStorage.getItem('lapilli.key') ?? sessionStorage.setItem('lapilli.key', '{key}')"
            )
        page = context.new_page()
        page.set_default_timeout(15_000)
        visit = Visit(page, root)
        page.on("pageerror", lambda error: visit.trouble.append(str(error)))
        page.on("console", lambda said: said.type in ("error", "warning") and visit.trouble.append(said.text))
        page.on(
            "request",
            lambda made: made.url.startswith((root, "data:", "blob:")) or visit.trouble.append(f"asked {made.url}"),
        )
        visits.append(visit)
        return visit

    yield make
    for context in contexts:
        context.close()
    for visit in visits:
        unexpected = [said for said in visit.trouble if not any(re.search(one, said) for one in visit.expected)]
        assert not unexpected


@pytest.fixture
def visit(visitor):
    return visitor().open()
