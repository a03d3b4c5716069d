"""`lapilli judge summary`: the original's table of reviews, as a table, as its own lines, or as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lapilli.evaluate.judge.summary import Interval, Table


def spread(args: list[str], names: frozenset[str]) -> list[str]:
    """`-f a b` as `-f a -f b`: the originals' options take several values."""
    made: list[str] = []
    open_name = None
    for arg in args:
        if arg.startswith("-") and arg != "-":
            open_name = arg if arg in names else None
            made.append(arg)
            continue
        if open_name is not None and made[-1] != open_name:
            made.append(open_name)
        made.append(arg)
    return made


class Summary(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = {"-f", "--files", "-s", "--select", "-i", "--ignore"}
        return super().parse_args(ctx, spread(args, frozenset(names)))


def summary(
    reviews: Annotated[list[str] | None, typer.Argument(help="Review files.")] = None,
    files: Annotated[
        list[str] | None, typer.Option("--files", "-f", help="The same, as the original names them.")
    ] = None,
    folder: Annotated[str | None, typer.Option("--dir", "-d", help="Folder of review files.")] = None,
    version: Annotated[str | None, typer.Option("--version", "-v", help="0613 or 0314, by the file's name.")] = None,
    select: Annotated[
        list[str] | None, typer.Option("--select", "-s", help="Only files with this in the name.")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option("--ignore", "-i", help="Leave out questions by id.")] = None,
    context: Annotated[
        str | None, typer.Option("--context", "-c", metavar="FILE", help="Quilt's contexts: adds means by organ.")
    ] = None,
    protocol: Annotated[str, typer.Option(help="llava (the original's arithmetic), official, or both.")] = "both",
    plain: Annotated[
        bool, typer.Option("--plain", help="Print the original's lines alone, by its arithmetic.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Write results too, a folder for each file, for lapilli compare and report."),
    ] = None,
) -> None:
    """Print the original's table of reviews: ratio, first and second score for each category, with intervals."""
    import json
    from dataclasses import asdict

    from lapilli.cli.evaluate_table import choose_protocols
    from lapilli.evaluate.judge.summary import choose_files, read_organs, summarise

    organs = read_organs(context) if context is not None else None
    chosen = choose_files([*(reviews or []), *(files or [])], folder, version, select or [])
    tables: list[Table] = []
    for path in chosen:
        for one in choose_protocols("llava" if plain and protocol == "both" else protocol):
            table = summarise(path, one, organs=organs, ignore=frozenset(ignore or []))
            if table is not None:
                tables.append(table)
        if out is not None:
            _write(path, out, organs, ignore or [])
    if as_json:
        typer.echo(json.dumps([asdict(table) for table in tables], indent=2))
    elif plain:
        typer.echo("".join(table.text() for table in tables), nl=False)
    else:
        _print_tables(tables)


def _write(path: Path, out: str, organs: Mapping[str, str] | None, ignore: list[str]) -> None:
    from pathlib import Path

    from lapilli.base.errors import RecipeError
    from lapilli.evaluate.judge.results import REVIEWED, write_judged
    from lapilli.evaluate.judge.summary import config_name

    if ignore:
        raise RecipeError("--out: results are of every question; leave out --ignore")
    folder = Path(out) / config_name(path)
    write_judged(path, folder / REVIEWED, task=REVIEWED, model={"name": config_name(path)}, organs=organs)
    typer.echo(f"wrote {folder}; `lapilli compare` and `lapilli report` take it", err=True)


def _print_tables(tables: list[Table]) -> None:
    from rich.console import Console
    from rich.table import Table as Grid

    from lapilli.evaluate.judge.summary import table_notes

    console = Console(highlight=False)
    for names, table in _distinct(tables):
        columns = ["grade"] if table.graded else ["ratio", "95 % interval", "first", "second"]
        grid = Grid(title=f"{table.name}, {names}", title_justify="left")
        grid.add_column("category")
        for column in (
            *columns,
            *(["95 % interval"] if table.graded else []),
            "reviews" if table.protocol == "llava" else "questions",
        ):
            grid.add_column(column, justify="right")
        for row in table.rows:
            numbers = (_number(row.second), _between(row.second_interval))
            if not table.graded:
                numbers = (_number(row.ratio), _between(row.ratio_interval), _number(row.first), _number(row.second))
            grid.add_row(row.name, *numbers, f"{row.questions:,}")
        console.print(grid)
        for note in table_notes(table):
            console.print(f"note: {note}", soft_wrap=True, markup=False)


def _distinct(tables: list[Table]) -> list[tuple[str, Table]]:
    """Tables with their protocols; a file's protocols that agree in everything share one."""
    from dataclasses import replace

    found: list[tuple[str, Table]] = []
    for table in tables:
        if found and replace(found[-1][1], protocol=table.protocol) == table:
            found[-1] = (f"{found[-1][0]}, {table.protocol}", table)
        else:
            found.append((table.protocol, table))
    return found


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.1f}"


def _between(found: Interval | None) -> str:
    return "-" if found is None else f"{found[0]:.2f} to {found[1]:.2f}"
