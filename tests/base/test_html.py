"""Reports are self-contained, escape what data files say, and draw every finite point."""

import io
import math
import re
from html.parser import HTMLParser

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.base.html import Html, data_uri, escape, image_grid, line_chart, page, section, table, tag, write_page

VOID = {"meta", "img", "line", "polyline", "circle", "br"}


class Balance(HTMLParser):
    """Fails on elements that are not closed in order, and collects text."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, name, attrs):
        self.tags.append(name)
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attrs):
        self.tags.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.text.append(data)


def parse(text):
    parser = Balance()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def png():
    stream = io.BytesIO()
    PIL.Image.new("RGB", (3, 3), "red").save(stream, "PNG")
    return stream.getvalue()


def test_a_page_holds_everything_itself(tmp_path):
    chart = line_chart({"train": [(i, 3 / (i + 1)) for i in range(50)], "validation": [(10, 1.0), (40, 0.5)]})
    text = page(
        "Report",
        section("Loss", chart),
        section("Answers", image_grid([(png(), "one"), ([png(), png()], Html("<b>two</b>"))])),
        section("Scores", table(["what", "value"], [["exact", 0.93121], ["n", 12345]])),
        lead="made just now",
    )
    parse(text)
    assert not re.search(r"""(?:src|href)=(?!"data:)|url\(|@import""", text)
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text
    assert text.count("data:image/png;base64,") == 3
    assert "0.9312" in text
    assert "12,345" in text
    write_page(tmp_path / "report.html", text)
    assert (tmp_path / "report.html").read_text() == text


@given(st.text())
def test_text_never_becomes_markup(text):
    content = page(
        text, section(text, tag("p", text, title=text), table([text], [[text]]), image_grid([(png(), text)]))
    )
    plain = page("x", section("x", tag("p", "x", title="x"), table(["x"], [["x"]]), image_grid([(png(), "x")])))
    assert parse(content).tags == parse(plain).tags


def test_html_is_not_escaped_twice():
    assert escape(escape("<b>")) == "&lt;b&gt;"
    assert tag("i", Html("<b>x</b>"), "<") == "<i><b>x</b>\n&lt;</i>"


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e6, 1e6) | st.just(math.nan)), max_size=40))
def test_every_finite_point_is_drawn_inside_the_axes(points):
    chart = line_chart({"a": points})
    parse(chart)
    drawn = [tuple(map(float, p.split(","))) for run in re.findall(r'points="([^"]*)"', chart) for p in run.split()]
    assert len(drawn) == sum(math.isfinite(y) for _, y in points)
    assert all(0 <= x <= 720 and 0 <= y <= 300 for x, y in drawn)
    assert "nan" not in chart


def test_long_curves_are_thinned_not_cut():
    chart = line_chart({"a": [(i, 1.0) for i in range(100_000)]})
    (run,) = re.findall(r'points="([^"]*)"', chart)
    xs = [float(p.split(",")[0]) for p in run.split()]
    assert len(xs) <= 600
    assert xs[0] < 76
    assert xs[-1] > 700


def test_only_pictures_become_data_addresses():
    with pytest.raises(ValueError, match="PNG"):
        data_uri(b"<svg onload=...>")
