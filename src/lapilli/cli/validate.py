"""`lapilli validate`: the validation loss of a model or checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def validate(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped recipe.")],
    model: Annotated[
        str, typer.Option(help="Model folder, run folder, or checkpoint (checkpoints/step-...) of a run.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values to set, as in data.validation=held.json.", metavar="A.B=VALUE")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Stage whose data are read. Default: the last one.")] = None,
    out: Annotated[str | None, typer.Option(help="Write the numbers to this JSON file.")] = None,
) -> None:
    """Print loss and perplexity of a model over a recipe's held-out data, on one device or, by torchrun, on several."""
    from lapilli.recipe.load import load_recipe
    from lapilli.train.device.hpu_mode import settle_mode

    loaded = load_recipe(recipe, overrides or [])
    for one in loaded.recipe.stages:
        settle_mode(one.run.device, one.run.hpu_mode)  # before PyTorch is imported

    from lapilli.base import atomic
    from lapilli.run.validate import validate_recipe

    found = validate_recipe(loaded, model, stage=stage, say=typer.echo)
    if found is None:
        return
    step = "" if found.step is None else f" after step {found.step:,}"
    typer.echo(
        f"{found.model}{step}: loss {found.loss:.6f}, perplexity {found.perplexity:.4f}, "
        f"{found.supervised_tokens:,} supervised tokens of {found.samples:,} conversations"
    )
    if out is not None:
        atomic.write_json(out, asdict(found))
        typer.echo(f"wrote {out}")
