"""`lapilli score`: what answers are worth, whichever system gave them."""

from __future__ import annotations

from typing import Annotated

import typer

from lapilli.cli.evaluate import open_named
from lapilli.cli.evaluate_table import choose_protocols, print_results

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def score(
    task: Annotated[str, typer.Argument(help="A task (see `lapilli tasks`), or a YAML file of your own.")],
    answers: Annotated[
        list[str], typer.Option(metavar="FILE", help="Answers file; repeat it for those of several processes.")
    ],
    data: Annotated[
        str | None, typer.Option(metavar="DIR", help="The task's data folder. Default: beside the YAML file.")
    ] = None,
    files: Annotated[
        list[str] | None, typer.Option(metavar="PART=PATH", help="Another place for one of the task's files.")
    ] = None,
    protocol: Annotated[str, typer.Option(help="llava (the original's numbers), official, or both.")] = "both",
    allow_missing: Annotated[
        int, typer.Option(min=0, help="Score although so many questions have no answer. Default: none may lack one.")
    ] = 0,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write results and submission files there, in a folder per task.")
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A judge model scores a task that has no scorer: model=..., url=... (see the docs).",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What tables call the model. Default: as its answers do.")] = None,
) -> None:
    """Score answers files: ours, the original's answers.jsonl, or any with an id and a text per line."""
    from pathlib import Path

    from lapilli.evaluate.run import score as run

    (job,) = open_named([task], data, files or [], choose_protocols(protocol), judged=judge or [], asking=False)
    made = run(job, [Path(file) for file in answers], out, allow_missing, name)
    print_results([made])
