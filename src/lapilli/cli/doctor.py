"""`lapilli doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_SIGNS = {"ok": "  ", "note": "- ", "problem": "! "}


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a list of what was looked at.")] = False,
) -> None:
    """Look at versions, devices, kernels, network, memory and disk; exit status 1 if lapilli can't work with them."""
    from lapilli.run.doctor import examine

    findings = examine()
    problems = sum(one.level == "problem" for one in findings)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in findings], indent=2))
    else:
        group = ""
        for one in findings:
            if one.group != group:
                group = one.group
                typer.echo(group)
            typer.echo(f"  {_SIGNS[one.level]}{one.name:<18} {one.value}")
            if one.remedy:
                typer.echo(f"{'':25}{one.remedy}")
        notes = sum(one.level == "note" for one in findings)
        typer.echo(f"{problems} problems, {notes} notes" if problems else f"no problems, {notes} notes")
    if problems:
        raise typer.Exit(1)
