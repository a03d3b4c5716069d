"""`lapilli train`: run a recipe."""

from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="Recipe file, or the name of a shipped recipe such as llava-1.5/pretrain.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Values to set, as in train.learning_rate=1e-4.", metavar="A.B=VALUE"),
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on with an interrupted run; never: only a new folder; or a checkpoint folder.")
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan and what trains, and stop.")
    ] = False,
) -> None:
    """Train a model as a recipe says, one stage or several."""
    from lapilli.recipe.load import load_recipe
    from lapilli.train.device.hpu_mode import settle_mode

    loaded = load_recipe(recipe, overrides or [])
    for stage in loaded.recipe.stages:
        settle_mode(stage.run.device, stage.run.hpu_mode)  # before PyTorch is imported

    import signal

    from rich.console import Console

    from lapilli.run.stages import run_recipe

    console = Console(highlight=False, soft_wrap=True)
    outcome = run_recipe(loaded, resume=resume, dry_run=dry_run, say=lambda line: console.print(line, markup=False))
    if outcome.stopped_by:
        raise typer.Exit(128 + signal.Signals[outcome.stopped_by])
