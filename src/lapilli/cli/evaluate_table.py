"""What the evaluation verbs print alike: the choice of protocols, and results as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lapilli.base.errors import RecipeError, unknown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lapilli.evaluate.results import Outcome, Results
    from lapilli.evaluate.task import Protocol


def choose_protocols(name: str) -> tuple[Protocol, ...]:
    """The protocols that an option names. Raises RecipeError for another name."""
    from lapilli.evaluate.task import PROTOCOLS

    if name == "both":
        return PROTOCOLS
    if name not in PROTOCOLS:
        raise RecipeError(f"--protocol: {unknown('protocol', name, (*PROTOCOLS, 'both'))}")
    return tuple(protocol for protocol in PROTOCOLS if protocol == name)


def print_results(results: Sequence[Results], groups: bool = True) -> None:
    """Print a row per task and protocol, every value, and with `groups` the values of each group."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table()
    for column in ("task", "protocol", "metric", "value", "95 % interval", "questions"):
        left = column in ("task", "protocol", "metric")
        table.add_column(column, justify="left" if left else "right", overflow="fold", no_wrap=column == "task")
    for made in results:
        counts = f"{made.counts.answered:,}"
        if not made.protocols:
            table.add_row(made.task, "-", "not scored", "-", "-", counts)
        for names, found in _distinct(made):
            between = "-" if found.interval is None else f"{found.interval[0]:.2f} - {found.interval[1]:.2f}"
            table.add_row(made.task, names, made.headline, value_text(found.values[made.headline]), between, counts)
            for name, value in found.values.items():
                if groups and name != made.headline:
                    table.add_row("", "", name, value_text(value), "", "")
    console.print(table)
    for made in results:
        for names, found in _distinct(made) if groups else ():
            _print_groups(console, made, names, found)
        for note in dict.fromkeys((*made.notes, *(n for _, found in _distinct(made) for n in found.notes))):
            console.print(f"note: {made.task}: {note}", soft_wrap=True, markup=False)
        for path in made.submissions:
            console.print(f"wrote {path}", soft_wrap=True, markup=False)


def value_text(value: float | None) -> str:
    """A value as tables show it."""
    return "undefined" if value is None else f"{value:.2f}"


def protocol_text(names: Sequence[str]) -> str:
    """Protocols that agree, in a word."""
    return names[0] if len(names) == 1 else "both"


def _distinct(made: Results) -> list[tuple[str, Outcome]]:
    """Outcomes by protocol; protocols whose outcome is the same share a row."""
    found: list[tuple[list[str], Outcome]] = []
    for protocol, one in made.protocols.items():
        same = next((names for names, other in found if other == one), None)
        if same is None:
            found.append(([protocol], one))
        else:
            same.append(protocol)
    return [(protocol_text(names), one) for names, one in found]


def _print_groups(console: object, made: Results, names: str, found: Outcome) -> None:
    from rich.console import Console
    from rich.table import Table

    assert isinstance(console, Console)
    for kind, by_group in found.groups.items():
        metrics = list(dict.fromkeys(metric for values in by_group.values() for metric in values))
        table = Table(title=f"{made.task}, {names}, by {kind}", title_justify="left")
        table.add_column(kind)
        for column in (*metrics, "questions"):
            table.add_column(column, justify="right")
        for group, values in by_group.items():
            cells = [value_text(values[metric]) if metric in values else "-" for metric in metrics]
            table.add_row(group, *cells, str(found.counts.get(kind, {}).get(group, "-")))
        console.print(table)
