"""The tables of a report, for HTML and Markdown alike: models beside each other, intervals, groups, differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lapilli.base.errors import DataError
from lapilli.evaluate.compare import compare
from lapilli.evaluate.report.gather import Entry, Gathered, models_of
from lapilli.evaluate.results import Outcome


@dataclass(frozen=True)
class Grid:
    """A table as text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def summary(tasks: Sequence[Gathered]) -> Grid:
    """Every task's headline by model, with its interval; protocols apart where any model's numbers differ."""
    models = models_of(tasks)
    rows: list[tuple[str, ...]] = []
    for task in tasks:
        by_model = {entry.model: entry for entry in task.entries}
        for name, of in protocols(task):
            cells = [_headline(by_model.get(model), of) for model in models]
            rows.append((task.name, name, _metric(task), *cells))
        if not any(entry.results.protocols for entry in task.entries):
            cells = ["not scored" if model in by_model else "-" for model in models]
            rows.append((task.name, "-", "-", *cells))
    return Grid("Scores", ("task", "protocol", "metric", *models), tuple(rows))


def counts(tasks: Sequence[Gathered]) -> Grid:
    """How many questions there were, and what became of them."""
    rows: list[tuple[str, ...]] = []
    for task in tasks:
        for entry in task.entries:
            found = entry.results.counts
            asked = f"{found.asked:,}" if found.limit is None else f"{found.asked:,} of {found.in_files:,}"
            seconds = "-" if entry.results.seconds is None else f"{entry.results.seconds:,.0f}"
            row = (task.name, entry.model, asked, f"{found.answered:,}", f"{found.missing:,}", f"{found.cut:,}")
            rows.append((*row, seconds))
    header = ("task", "model", "asked", "answered", "missing", "cut short", "seconds")
    return Grid("Questions", header, tuple(rows))


def values(task: Gathered) -> list[Grid]:
    """Every value of a task by model, a table per protocol that differs."""
    made: list[Grid] = []
    for name, of in protocols(task):
        found = {entry.model: entry.results.protocols[of] for entry in task.entries if of in entry.results.protocols}
        names = list(dict.fromkeys(value for one in found.values() for value in one.values))
        rows = [(value, *(_cell(one, value) for one in found.values())) for value in names]
        made.append(Grid(f"All values, {name}", ("metric", *found), tuple(rows)))
    return made


def groups(task: Gathered) -> list[Grid]:
    """A table per protocol and kind of group; a column per model, and per metric where a kind has several."""
    made: list[Grid] = []
    for name, of in protocols(task):
        found = {entry.model: entry.results.protocols[of] for entry in task.entries if of in entry.results.protocols}
        for kind in dict.fromkeys(kind for one in found.values() for kind in one.groups):
            made.append(_groups(f"By {kind}, {name}", kind, found))
    return made


def differences(task: Gathered) -> Grid | None:
    """Every further model less the first one, with interval and probability; None for one model."""
    first, *others = task.entries
    rows: list[tuple[str, ...]] = []
    for other in others:
        try:
            found = compare(first.folder, other.folder)
        except DataError:  # no protocol that both have: the summary shows that
            continue
        for one in found:
            d = one.difference
            if d is None:
                rows.append((other.model, one.protocol, "-", "-", "-", one.note))
                continue
            p = "<0.001" if d.p < 0.001 else f"{d.p:.3f}"
            between = f"{d.low:+.2f} to {d.high:+.2f}"
            rows.append((other.model, one.protocol, f"{d.value:+.2f}", between, f"{p} ({d.test})", one.note))
    header = ("model", "protocol", f"less {first.model}", "95 % interval", "p", "note")
    return Grid("Differences, question by question", header, tuple(rows)) if rows else None


def protocols(task: Gathered) -> list[tuple[str, str]]:
    """What to call each set of numbers, and the protocol it is of; protocols that agree for every model share one."""
    names = list(dict.fromkeys(protocol for entry in task.entries for protocol in entry.results.protocols))
    made: list[tuple[list[str], str]] = []
    for name in names:
        same = next((one for one in made if all(_same(entry, one[1], name) for entry in task.entries)), None)
        if same is None:
            made.append(([name], name))
        else:
            same[0].append(name)
    return [(", ".join(shared), of) for shared, of in made]


def _same(entry: Entry, one: str, other: str) -> bool:
    return entry.results.protocols.get(one) == entry.results.protocols.get(other)


def _metric(task: Gathered) -> str:
    first = task.entries[0].results
    return first.headline if first.higher_is_better else f"{first.headline} (lower is better)"


def _headline(entry: Entry | None, protocol: str) -> str:
    found = None if entry is None else entry.results.protocols.get(protocol)
    if entry is None or found is None:
        return "-"
    limited = " (limited)" if entry.results.counts.limit is not None else ""
    return _cell(found, entry.results.headline) + _between(found) + limited


def _between(found: Outcome) -> str:
    return "" if found.interval is None else f" [{found.interval[0]:.2f}, {found.interval[1]:.2f}]"


def _cell(found: Outcome, name: str) -> str:
    if name not in found.values:
        return "-"
    value = found.values[name]
    return "undefined" if value is None else f"{value:.2f}"


def _groups(title: str, kind: str, found: dict[str, Outcome]) -> Grid:
    columns = [
        (model, metric)
        for model, one in found.items()
        for metric in dict.fromkeys(metric for own in one.groups.get(kind, {}).values() for metric in own)
    ]
    single = len({metric for _, metric in columns}) <= 1
    rows: list[tuple[str, ...]] = []
    for group in dict.fromkeys(group for one in found.values() for group in one.groups.get(kind, {})):
        cells: list[str] = []
        for model, metric in columns:
            own = found[model].groups.get(kind, {}).get(group, {})
            value = own.get(metric)
            cells.append("-" if metric not in own else "undefined" if value is None else f"{value:.2f}")
        sizes = [one.counts.get(kind, {}).get(group) for one in found.values()]
        rows.append((group, *cells, str(next((size for size in sizes if size is not None), "-"))))
    header = tuple(model if single else f"{model}: {metric}" for model, metric in columns)
    return Grid(title, (kind, *header, "questions"), tuple(rows))
