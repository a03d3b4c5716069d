"""The doctor's report for a terminal."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lapilli.base.progress import duration
from lapilli.data.doctor.diagnosis import Diagnosis
from lapilli.data.doctor.reasons import REASONS

BAR_WIDTH = 32


def report(diagnosis: Diagnosis, listed: int, batch_size: int) -> RenderableType:
    """What was read, what is wrong with up to `listed` records of each kind spelt out, and what the rest is like."""
    parts: list[RenderableType] = [_sources(diagnosis), Text("")]
    if len(diagnosis.findings):
        parts += [_reasons(diagnosis), *_lists(diagnosis, listed), Text("")]
    if len(diagnosis.lengths):
        parts += [_numbers(diagnosis, batch_size), Text(""), _histogram(diagnosis), Text("")]
    parts += [Text(f"not checked: {what}", style="dim") for what in diagnosis.not_checked]
    parts.append(verdict(diagnosis))
    return Group(*parts)


def print_report(diagnosis: Diagnosis, listed: int, batch_size: int) -> None:
    """Write the report to standard output, in colour on a terminal."""
    Console(highlight=False, soft_wrap=True).print(report(diagnosis, listed, batch_size))


def verdict(diagnosis: Diagnosis) -> Text:
    """One line: may training start?"""
    spent = f"checked in {duration(diagnosis.seconds)}"
    if diagnosis.ok:
        return Text(f"all {diagnosis.records:,} records can be used ({spent})", style="bold green")
    if not diagnosis.bad:
        return Text(f"there are no records ({spent})", style="bold red")
    return Text(
        f"{diagnosis.bad:,} of {diagnosis.records:,} records can't be used ({spent}); "
        "--fix FOLDER writes the others without them",
        style="bold red",
    )


def _sources(diagnosis: Diagnosis) -> Table:
    table = _table("source", "used for", "format", "records", "pictures from")
    for part in diagnosis.parts:
        table.add_row(part.path, part.split, part.format, f"{part.records:,}", part.images or "-")
    return table


def _reasons(diagnosis: Diagnosis) -> Table:
    table = _table("records", "what is wrong or worth knowing", "")
    for code in diagnosis.findings.codes:
        reason = REASONS[code]
        style = "red" if reason.level == "bad" else "yellow"
        table.add_row(f"{diagnosis.findings.records(code):,}", reason.title, Text(reason.level, style=style))
    return table


def _lists(diagnosis: Diagnosis, listed: int) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for code in diagnosis.findings.codes if listed else ():
        lines += [Text(""), Text(REASONS[code].title, style="bold")]
        lines += [Text(f"  {p.where}: {p.message}") for p in diagnosis.findings.first(code, listed)]
        rest = diagnosis.findings.problems(code) - listed
        if rest > 0:
            lines.append(Text(f"  ... and {rest:,} more (--list N, --json)", style="dim"))
    return lines


def _numbers(diagnosis: Diagnosis, batch_size: int) -> Table:
    table = _table("good training records", f"{len(diagnosis.lengths):,}")
    marks = "  ".join(f"{name} {value:,}" for name, value in diagnosis.percentiles().items())
    table.add_row(diagnosis.unit, f"{int(diagnosis.lengths.sum()):,}")
    table.add_row(f"{diagnosis.unit} per record", marks)
    table.add_row("modalities", "  ".join(f"{name} {count:,}" for name, count in diagnosis.modalities().items()))
    table.add_row("pictures per record", _pairs(diagnosis.pictures_per_sample()))
    for name, counts in diagnosis.picture_facts().items():
        if counts:
            table.add_row(f"picture {name}", _pairs(counts))
    for name, words in padding_lines(diagnosis, batch_size):
        table.add_row(name, words)
    return table


def padding_lines(diagnosis: Diagnosis, batch_size: int) -> list[tuple[str, str]]:
    """What batches of each kind compute, in words; nothing without token lengths."""
    padding = diagnosis.padding(batch_size)
    if padding is None:
        return []

    def line(positions: int, waste: float) -> str:
        return f"{positions:,} positions per epoch, {waste:.1%} of them padding"

    packed = f"{padding.tokens:,} positions per epoch, none of them padding: {padding.shuffled / padding.tokens:.2f} "
    return [
        (f"batches of {batch_size}, shuffled", line(padding.shuffled, padding.shuffled_waste)),
        (f"batches of {batch_size}, by length", line(padding.grouped, padding.grouped_waste)),
        ("packed", f"{packed}times fewer than shuffled"),
    ]


def _histogram(diagnosis: Diagnosis) -> Table:
    bars = diagnosis.histogram()
    most = max(count for _, _, count in bars)
    table = _table(diagnosis.unit, "records", "")
    for low, high, count in bars:
        eighths = round(8 * BAR_WIDTH * count / most) or (1 if count else 0)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        span = f"{low:,}" if high - low == 1 else f"{low:,}-{high - 1:,}"
        table.add_row(span, f"{count:,}", Text(bar, style="cyan"))
    return table


def _pairs(counts: dict[int, int] | dict[str, int]) -> str:
    return "  ".join(f"{name}: {count:,}" for name, count in counts.items())


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name == "records" else "left", overflow="fold")
    return table
