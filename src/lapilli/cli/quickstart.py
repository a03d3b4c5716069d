"""`lapilli quickstart`: make, train and examine a small assistant on real pictures, offline."""

from pathlib import Path

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def quickstart(
    out: str = typer.Option("quickstart-run", help="Folder to write; must be new or empty."),
) -> None:
    """Make two small parts on scanned digits, join and train them with the public commands, and examine the result."""
    from lapilli.quickstart.run import quickstart as room

    room(Path(out), say=typer.echo)
