"""`lapilli inspect`: what a folder or file is."""

import json
from typing import Any

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def inspect(
    path: str = typer.Argument(..., help="Any folder or weight file."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Say what a folder or file is, from its headers: format, parts, template, image settings, what is missing."""
    from lapilli.assemble.inspection.door import inspect as look

    found = look(path)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        _print(found)


def _print(found: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from lapilli.assemble.inspection.parts import dtypes_in_words

    console = Console(highlight=False)
    console.print(f"{found.path}: {found.what}", soft_wrap=True, markup=False)
    if found.parts:
        table = Table(title_justify="left")
        for column in ("part", "parameters", "stored as", "what"):
            table.add_column(column, justify="right" if column == "parameters" else "left", overflow="fold")
        for part in found.parts:
            what = part.what + (f" (in {part.place})" if part.place and part.place != found.path else "")
            number = f"{part.parameters:,}" if part.tensors else "-"
            table.add_row(part.name, number, dtypes_in_words(part), what)
        if len(found.parts) > 1:
            table.add_row("total", f"{found.parameters:,}", "", "")
        console.print(table)
    lines = {
        "template": found.template,
        "pictures": found.image,
        "tokens per image": found.tokens_per_image,
        **found.details,
    }
    for name, value in lines.items():
        if value:
            console.print(f"{name:<20} {value}", soft_wrap=True, markup=False)
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    for missing in found.missing:
        console.print(f"missing: {missing.what}: {missing.remedy}", soft_wrap=True, markup=False)
    if found.inner is not None:
        _print(found.inner)
