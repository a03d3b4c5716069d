"""`lapilli recipe`: recipes from training commands of other programs."""

from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="Recipes from training commands of LLaVA."
)


@app.callback()
def _recipes() -> None:
    pass


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(metavar="SCRIPT", help="A shell script, or a whole command line in quotes."),
    ],
    out: Annotated[str | None, typer.Option(help="Recipe file to write; without it the recipe is printed.")] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="How many devices the command runs on, where it does not say so.")
    ] = None,
    line: Annotated[
        int | None, typer.Option(help="Line on which the command begins, in a script with several of them.")
    ] = None,
) -> None:
    """Write the recipe of a training command of LLaVA, KoLLaVA, Quilt-LLaVA, or Intel's version for Gaudi."""
    from pathlib import Path

    from lapilli.base import atomic
    from lapilli.base.errors import RecipeError
    from lapilli.data.templates import TABLE
    from lapilli.recipe.imported import import_command
    from lapilli.recipe.shell import read_commands

    file = Path(source)
    is_file = len(source) < 4096 and file.is_file()
    if not is_file and not source.strip().count(" "):
        raise RecipeError(f"{source}: no such script")
    try:
        text = file.read_text(encoding="utf-8") if is_file else source
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{source}: can't be read: {error}") from error
    name = file.name if is_file else "command line"
    commands = read_commands(text, name)
    if line is not None:
        commands = [command for command in commands if command.where.endswith(f": line {line}")]
    if len(commands) != 1:
        places = ", ".join(command.where.rpartition(" ")[2] for command in commands)
        raise RecipeError(
            f"{name}: holds {len(commands)} training commands, on lines {places}; choose one with --line"
            if commands
            else f"{name}: holds no training command (a Python program with --model_name_or_path or --data_path)"
        )
    if out is not None and Path(out).exists():
        raise RecipeError(f"--out: {out} exists already")
    folder = Path.cwd() if out is None else Path(out).absolute().parent
    made = import_command(commands[0], devices, folder, TABLE)
    for note in made.notes:
        typer.echo(f"note: {note}", err=True)
    if out is None:
        typer.echo(made.text, nl=False)
        return
    atomic.atomic_write(Path(out), made.text)
    typer.echo(f"wrote {out}")
