"""`lapilli compare`: whether two evaluated models differ by more than chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lapilli.evaluate.compare import Comparison
    from lapilli.evaluate.statistics import Difference

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="Output folder of `lapilli evaluate` or `score`, or one task's folder.")],
    b: Annotated[str, typer.Argument(help="The one to compare with it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Print B less A for every task and protocol that both have, with its 95 % interval, and how often chance alone
    would show as much."""
    import json
    from dataclasses import asdict, replace

    from rich.console import Console
    from rich.table import Table

    from lapilli.cli.evaluate_table import protocol_text, value_text
    from lapilli.evaluate.compare import compare as run
    from lapilli.evaluate.compare import only_in

    made = run(a, b)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in made], indent=2))
        return
    shared: list[tuple[list[str], Comparison]] = []
    for one in made:  # protocols that agree share a row
        same = next((names for names, other in shared if replace(one, protocol=other.protocol) == other), None)
        if same is None:
            shared.append(([one.protocol], one))
        else:
            same.append(one.protocol)
    table = Table(caption=f"A {a}\nB {b}", caption_justify="left")
    for column in ("task", "protocol", "metric", "A", "B", "B - A", "95 % interval", "p"):
        table.add_column(column, justify="left" if column in ("task", "protocol", "metric") else "right")
    for names, one in shared:
        row = (one.task, protocol_text(names), one.headline, value_text(one.a), value_text(one.b))
        table.add_row(*row, *_difference(one.difference))
    console = Console(highlight=False)
    console.print(table)
    for names, one in shared:
        about = f"{one.task}, {protocol_text(names)}"
        if one.difference is not None:
            console.print(f"{about}: {_test(one.difference)}", soft_wrap=True, markup=False)
        if one.note:
            console.print(f"note: {about}: {one.note}", soft_wrap=True, markup=False)
    for folder, alone in zip((a, b), only_in(a, b), strict=True):
        if alone:
            console.print(f"note: only in {folder}: {', '.join(alone)}", soft_wrap=True, markup=False)


def _difference(found: Difference | None) -> tuple[str, ...]:
    if found is None:
        return "-", "-", "-"
    p = "<0.001" if found.p < 0.001 else f"{found.p:.3f}"
    return f"{found.value:+.2f}", f"{found.low:+.2f} to {found.high:+.2f}", p


def _test(found: Difference) -> str:
    if found.test == "bootstrap":
        return f"p by bootstrap of {found.questions:,} questions"
    better = f"A is better on {found.a_better:,}, B on {found.b_better:,}"
    return f"p by {found.test}: of {found.questions:,} questions {better}"
