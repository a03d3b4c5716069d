"""`lapilli compare`: whether two evaluated models differ by more than chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lapilli.evaluate.compare import Comparison

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="Output folder of `lapilli evaluate` or `score`, or one task's folder.")],
    b: Annotated[str, typer.Argument(help="The one to compare with it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Print B less A for every task and protocol that both have, with its 95 % interval and the chance of it."""
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from lapilli.cli.evaluate_table import value_text
    from lapilli.evaluate.compare import compare as run
    from lapilli.evaluate.compare import only_in

    made = run(a, b)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in made], indent=2))
        return
    table = Table(caption=f"A {a}\nB {b}", caption_justify="left")
    for column in ("task", "protocol", "metric", "A", "B", "B - A", "95 % interval", "p", "test", "questions"):
        table.add_column(column, justify="left" if column in ("task", "protocol", "metric", "test") else "right")
    for one in made:
        row = (one.task, one.protocol, one.headline, value_text(one.a), value_text(one.b))
        table.add_row(*row, *_difference(one))
    console = Console(highlight=False)
    console.print(table)
    for one in made:
        if one.note:
            console.print(f"note: {one.task}, {one.protocol}: {one.note}", soft_wrap=True, markup=False)
    for folder, alone in zip((a, b), only_in(a, b), strict=True):
        if alone:
            console.print(f"note: only in {folder}: {', '.join(alone)}", soft_wrap=True, markup=False)


def _difference(one: Comparison) -> tuple[str, ...]:
    found = one.difference
    if found is None:
        return ("-",) * 5
    test = found.test
    if found.a_better or found.b_better:
        test += f" (A better {found.a_better}, B better {found.b_better})"
    p = "<0.001" if found.p < 0.001 else f"{found.p:.3f}"
    return f"{found.value:+.2f}", f"{found.low:+.2f} - {found.high:+.2f}", p, test, f"{found.questions:,}"
