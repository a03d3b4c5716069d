"""Pieces of a report page that needs nothing but itself: no font, no file, no address and no script from outside.

Text is escaped unless it is an `Html` already, so a caption from a data file can never become markup.
"""

import base64
import hashlib
import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

WIDTH, HEIGHT = 720, 300
NARROW = 440
"""Width of a chart that stands beside another."""
LEFT, RIGHT, TOP, BOTTOM = 72, 12, 12, 40
MAX_POINTS = 600
"""Points that a curve keeps; a longer one is thinned to the mean of equal runs."""

_NUMBER = re.compile(r"-?[\d,]+(\.\d+)?( ?%)?")
_MIME = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}

_CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #62666d; --rule: #dcdfe4; --back: #ffffff; --panel: #f6f7f9;
  --c0: #2463eb; --c1: #d9480f; --c2: #12805c; --c3: #8b3fc7; --c4: #b7791f; --good: #12805c; --bad: #c92a2a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa0a8; --rule: #363a41; --back: #16181c;
  --panel: #1f2227; --c0: #7aa5ff; --c1: #ff9561; --c2: #4fd1a1; --c3: #c795ff; --c4: #e9b75c; --good: #4fd1a1;
  --bad: #ff8787; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.lead, figcaption, .soft { color: var(--soft); } p { margin: .4rem 0; }
code, pre { font: .88em/1.45 ui-monospace, monospace; } pre { background: var(--panel); padding: .8rem 1rem;
  border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; } td.n, th.n { text-align: right; }
figure { margin: 0 0 1rem; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } svg .grid { stroke: var(--rule); }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; } svg .legend { fill: var(--ink); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 1.2rem; }
.grid-of { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .9rem; }
.card { background: var(--panel); border-radius: 8px; padding: .7rem; font-size: .9rem; overflow-wrap: anywhere; }
.card .pictures { display: flex; gap: .4rem; } .card img { width: 100%; min-width: 0; border-radius: 4px;
  image-rendering: auto; background: #fff; }
.good { color: var(--good); } .bad { color: var(--bad); }
"""


class Html(str):
    """Text that is markup already and is not escaped again."""

    __slots__ = ()


def escape(value: object) -> Html:
    """Any value as safe markup; an `Html` stays as it is."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(*parts: object) -> Html:
    """Parts one after the other, each escaped unless it is Html."""
    return Html("\n".join(escape(part) for part in parts))


def tag(name: str, *content: object, **attributes: str) -> Html:
    """One element. `class_` stands for the attribute `class`, `text_anchor` for `text-anchor`."""
    written = "".join(f' {k.rstrip("_").replace("_", "-")}="{html.escape(v)}"' for k, v in attributes.items())
    return Html(f"<{name}{written}>{join(*content)}</{name}>")


def page(title: str, *sections: object, lead: object = "", style: str = "", script: str = "") -> str:
    """A whole HTML document, light or dark as the reader's system is.

    `style` and `script` are the caller's own constants, never data; the browser runs no script but this one.
    """
    runs = f"; script-src 'sha256-{_sha256(script)}'" if script else ""
    head = join(
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        # The page may show text from data files; nothing in it may be fetched or run.
        Html(
            '<meta http-equiv="Content-Security-Policy" '
            f"content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:{runs}\">"
        ),
        tag("title", title),
        Html(f"<style>{_CSS}{style}</style>"),
    )
    intro = tag("p", lead, class_="lead") if lead else Html("")
    body = join(tag("h1", title), intro, *sections, Html(f"<script>{script}</script>" if script else ""))
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def section(heading: str, *parts: object) -> Html:
    """A heading and what stands under it."""
    return tag("section", tag("h2", heading), *parts)


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> Html:
    """A table; columns of numbers, percentages among them, stand to the right. Floats have four significant digits."""

    def cell(name: str, value: object, number: bool) -> Html:
        shown = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else value
        return tag(name, shown, class_="n") if number else tag(name, shown)

    def is_number(value: object) -> bool:
        if isinstance(value, str):
            return _NUMBER.fullmatch(value) is not None
        return isinstance(value, int | float) and not isinstance(value, bool)

    numeric = [bool(rows) and all(is_number(row[i]) for row in rows) for i in range(len(header))]
    head = tag("tr", *(cell("th", value, number) for value, number in zip(header, numeric, strict=True)))
    body = [tag("tr", *(cell("td", value, is_number(value)) for value in row)) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide")


def image_grid(cards: Sequence[tuple[Sequence[bytes] | bytes, object]]) -> Html:
    """Cards of one or more encoded pictures (PNG, JPEG, GIF, WebP) with a caption each."""
    out = []
    for pictures, caption in cards:
        files = [pictures] if isinstance(pictures, bytes) else pictures
        shown = [Html(f'<img alt="" src="{data_uri(file)}">') for file in files]
        out.append(tag("div", tag("div", *shown, class_="pictures"), tag("div", caption), class_="card"))
    return tag("div", *out, class_="grid-of")


def data_uri(file: bytes) -> str:
    """An encoded picture as an address that holds it. Raises ValueError for other formats."""
    for start, mime in _MIME.items():
        if file.startswith(start):
            return f"data:{mime};base64,{base64.b64encode(file).decode()}"
    raise ValueError("not a PNG, JPEG, GIF or WebP file")


def line_chart(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str = "step",
    y_label: str = "loss",
    *,
    marks: Mapping[str, Sequence[float]] | None = None,
    width: int = WIDTH,
) -> Html:
    """Curves of (x, y) points over common axes, as inline SVG; the y axis begins at 0 when values come near it.

    Points that are not finite are left out and break the curve. `marks` are places on the x axis, by name; `width` is
    that of the drawing in its own units, for charts that stand side by side.
    """
    finite = [(x, y) for points in curves.values() for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return tag("p", f"No {y_label} was recorded.", class_="soft")
    x_ticks = _ticks(min(x for x, _ in finite), max(x for x, _ in finite))
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    y_ticks = _ticks(0.0 if 0 < low < 0.4 * high else low, high)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (width - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(x_ticks, y_ticks, place(x_ticks[0], y_ticks[0]), place(x_ticks[-1], y_ticks[-1]), x_label, y_label)]
    for i, (name, points) in enumerate(curves.items()):
        colour = f"var(--c{i % 5})"
        for run in _runs(_thin(points)):
            dots = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in run)
            parts.append(Html(f'<polyline points="{dots}" style="stroke:{colour}"/>'))
            if len(run) == 1:
                x, y = place(*run[0])
                parts.append(Html(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" style="fill:{colour}"/>'))
        parts.append(_legend(name, i, colour, width))
    for i, (name, places) in enumerate((marks or {}).items(), len(curves)):
        colour = f"var(--c{i % 5})"
        inside = [x for x in places if x_ticks[0] <= x <= x_ticks[-1]]
        parts += [_mark(place(x, y_ticks[0])[0], colour) for x in inside]
        if inside:
            parts.append(_legend(name, i, colour, width))
    label = f"{y_label} by {x_label}: {', '.join(curves)}"
    return tag("figure", tag("svg", *parts, viewBox=f"0 0 {width} {HEIGHT}", role="img", aria_label=label))


def side_by_side(*charts: object) -> Html:
    """Charts in rows of two where the page is wide enough; draw them `NARROW` wide."""
    return tag("div", *charts, class_="charts")


def write_page(path: str | Path, content: str) -> None:
    """Write a page so that a reader never sees half of it."""
    from lapilli.base.atomic import atomic_write

    atomic_write(path, content)


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    origin: tuple[float, float],
    corner: tuple[float, float],
    x_label: str,
    y_label: str,
) -> Html:
    (x0, y0), (x1, y1) = origin, corner
    parts = []
    for i, value in enumerate(y_ticks):
        y = y0 + (y1 - y0) * i / (len(y_ticks) - 1)
        parts.append(Html(f'<line class="grid" x1="{x0:.1f}" x2="{x1:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'))
        parts.append(tag("text", _short(value), x=f"{x0 - 6:.1f}", y=f"{y + 4:.1f}", text_anchor="end"))
    for i, value in enumerate(x_ticks):
        x = x0 + (x1 - x0) * i / (len(x_ticks) - 1)
        anchor = "end" if i == len(x_ticks) - 1 else "middle"
        parts.append(tag("text", _short(value), x=f"{x:.1f}", y=f"{y0 + 16:.1f}", text_anchor=anchor))
    middle = (y0 + y1) / 2
    parts.append(tag("text", x_label, x=f"{(x0 + x1) / 2:.1f}", y=str(HEIGHT - 6), text_anchor="middle"))
    turned = f"rotate(-90 12 {middle:.1f})"
    parts.append(tag("text", y_label, x="12", y=f"{middle:.1f}", text_anchor="middle", transform=turned))
    return join(*parts)


def _mark(x: float, colour: str) -> Html:
    """A short stroke that stands on the x axis."""
    foot = HEIGHT - BOTTOM
    return Html(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{foot}" y2="{foot - 12}" style="stroke:{colour};stroke-width:2"/>'
    )


def _legend(name: str, place: int, colour: str, width: int) -> Html:
    y = TOP + 12 + 17 * place
    line = Html(f'<line x1="{width - 168}" x2="{width - 148}" y1="{y - 4}" y2="{y - 4}" '
                f'style="stroke:{colour};stroke-width:2.5"/>')  # fmt: skip
    return join(line, tag("text", name, x=str(width - 142), y=str(y), class_="legend"))


def _ticks(low: float, high: float) -> list[float]:
    """About five round values from just below `low` to just above `high`."""
    if high <= low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [i * unit for i in range(first, last + 1)]


def _short(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.1e}"
    return f"{value:,.6g}"


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // MAX_POINTS)
    if size <= 1:
        return list(points)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def _runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Stretches of finite points."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
