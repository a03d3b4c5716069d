"""The doctor's report as one page for the browser."""

from __future__ import annotations

from collections.abc import Sequence

from lapilli.base.html import Html, page, section, table, tag
from lapilli.base.progress import duration
from lapilli.data.doctor.diagnosis import Diagnosis
from lapilli.data.doctor.reasons import REASONS
from lapilli.data.doctor.text import padding_lines, verdict

LISTED = 200
"""Records that the page spells out per reason; all of them are in --json and in the quarantine of --fix."""

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 240, 58, 40, 12


def html_report(checked: Sequence[tuple[str, Diagnosis, Sequence[str]]], batch_size: int) -> str:
    """A whole HTML document about one or several examinations, each with its name and what is to be said of it."""
    parts: list[Html] = []
    for number, (name, diagnosis, said) in enumerate(checked):
        heading = [tag("h1", name)] if name else []
        lines = [tag("p", line, class_="soft") for line in said]
        parts += [*heading, *lines, *_of_one(diagnosis, batch_size, f"{number}-")]
    diagnoses = [diagnosis for _, diagnosis, _ in checked]
    records, seconds = sum(d.records for d in diagnoses), sum(d.seconds for d in diagnoses)
    how = ", ".join(dict.fromkeys(d.decode for d in diagnoses))
    return page("Data check", *parts, lead=f"{records:,} records, pictures checked by {how}, {duration(seconds)}")


def _of_one(diagnosis: Diagnosis, batch_size: int, prefix: str) -> list[Html]:
    colour = "good" if diagnosis.ok else "bad"
    parts = [tag("p", verdict(diagnosis).plain, class_=colour), _sources(diagnosis)]
    if len(diagnosis.findings):
        parts.append(_reasons(diagnosis, prefix))
    if len(diagnosis.lengths):
        parts += [_lengths(diagnosis), _pictures(diagnosis)]
        if lines := padding_lines(diagnosis, batch_size):
            parts.append(section("Padding", table(("batches", "what they compute"), lines)))
    if diagnosis.not_checked:
        parts.append(section("Not checked", *(tag("p", what, class_="soft") for what in diagnosis.not_checked)))
    return parts + [_list(diagnosis, code, prefix) for code in diagnosis.findings.codes]


def _sources(diagnosis: Diagnosis) -> Html:
    rows = [(p.path, p.split, p.format, p.records, p.images or "-") for p in diagnosis.parts]
    return section("Sources", table(("source", "used for", "format", "records", "pictures from"), rows))


def _reasons(diagnosis: Diagnosis, prefix: str) -> Html:
    rows = []
    for code in diagnosis.findings.codes:
        reason = REASONS[code]
        level = tag("span", reason.level, class_="bad" if reason.level == "bad" else "soft")
        link = Html(f'<a href="#{prefix}{code}">{reason.title}</a>')
        rows.append((link, level, diagnosis.findings.records(code)))
    return section("Findings", table(("what", "level", "records"), rows))


def _list(diagnosis: Diagnosis, code: str, prefix: str) -> Html:
    findings = diagnosis.findings
    rest = findings.problems(code) - LISTED
    more = tag("p", f"... and {rest:,} more", class_="soft") if rest > 0 else Html("")
    rows = [(p.where, p.message) for p in findings.first(code, LISTED)]
    return tag("div", section(REASONS[code].title, table(("record", "problem"), rows), more), id=f"{prefix}{code}")


def _lengths(diagnosis: Diagnosis) -> Html:
    marks = diagnosis.percentiles()
    total = int(diagnosis.lengths.sum())
    facts = table((diagnosis.unit, *marks), [(f"{total:,} in all", *marks.values())])
    return section("Lengths", bar_chart(diagnosis.histogram(), diagnosis.unit), facts)


def _pictures(diagnosis: Diagnosis) -> Html:
    mix = table(("modality", "records"), list(diagnosis.modalities().items()))
    each = table(("pictures per record", "records"), list(diagnosis.pictures_per_sample().items()))
    kinds = [
        table((f"picture {name}", "pictures"), list(counts.items()))
        for name, counts in diagnosis.picture_facts().items()
        if counts
    ]
    return section("Pictures", tag("div", mix, each, *kinds, class_="grid-of"))


def bar_chart(bars: Sequence[tuple[int, int, int]], unit: str) -> Html:
    """A histogram as inline SVG: (from, to, count) side by side; a bar's exact numbers appear under the mouse."""
    most = max(count for _, _, count in bars)
    across, up = (WIDTH - LEFT - 12) / len(bars), HEIGHT - TOP - BOTTOM
    every = -(-len(bars) // 8)
    parts = []
    for part in (0.0, 0.5, 1.0):
        y = TOP + up * (1 - part)
        parts.append(Html(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>'))
        label = f"{most * part:,.0f}"
        parts.append(tag("text", label, x=str(LEFT - 6), y=f"{y + 4:.1f}", text_anchor="end"))
    for i, (low, high, count) in enumerate(bars):
        x, height = LEFT + across * i, up * count / most
        title = tag("title", f"{low:,} to {high - 1:,} {unit}: {count:,} records")
        place = f'x="{x + 1:.1f}" y="{TOP + up - height:.1f}" width="{across - 2:.1f}" height="{height:.1f}"'
        parts.append(Html(f'<rect {place} style="fill:var(--c0)">{title}</rect>'))
        if i % every == 0:
            parts.append(tag("text", f"{low:,}", x=f"{x:.1f}", y=f"{HEIGHT - BOTTOM + 16}"))
    parts.append(tag("text", unit, x=f"{(LEFT + WIDTH) / 2:.1f}", y=str(HEIGHT - 6), text_anchor="middle"))
    label = f"records by {unit}"
    return tag("figure", tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label))
