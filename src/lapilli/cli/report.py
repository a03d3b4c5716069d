"""`lapilli report`: evaluations on one page, several models side by side."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def report(
    out: Annotated[
        list[str], typer.Argument(help="Output folders of `lapilli evaluate` or `lapilli score`, one per model.")
    ],
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a page; it needs no other file.")] = None,
    md: Annotated[str | None, typer.Option(metavar="FILE", help="Write Markdown.")] = None,
    as_json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Questions of each task that are shown with their answers.")] = 60,
    picture_mb: Annotated[float, typer.Option(min=0, help="Megabytes of small pictures that a page may hold.")] = 20,
) -> None:
    """Write tables of all tasks and models with intervals, and right and wrong answers with their pictures."""
    from lapilli.base.errors import RecipeError
    from lapilli.evaluate.report.write import write_report

    if html is None and md is None and as_json is None:
        raise RecipeError("name a file to write: --html, --md or --json, or several of them")
    made = write_report(out, html=html, markdown=md, json=as_json, shown=show, max_bytes=int(picture_mb * 1_000_000))
    for note in made.notes:
        typer.echo(note, err=True)
    for path in made.files:
        typer.echo(f"wrote {path}")
