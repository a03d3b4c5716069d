"""The `lapilli` command: one verb per file, each imported when it is asked for.

Nothing here imports torch, so that help and mistakes in a recipe are answered at once. An error the user can mend is
printed as one message; anything else is a defect and keeps its traceback.
"""

import sys
from importlib import import_module
from typing import Any

import click
import typer
from typer.core import TyperGroup

from lapilli import __version__
from lapilli.base.errors import LapilliError, nearest

VERBS = {
    "build": ("lapilli.cli.build", "Join a vision encoder and a language model into a model folder."),
    "recipe": ("lapilli.cli.recipe", "Write a recipe from a training command of LLaVA's kind."),
    "train": ("lapilli.cli.train", "Train a model as a recipe says."),
    "launch": ("lapilli.cli.launch", "Start a run in several processes: here, by SLURM, or in a cloud."),
    "plan": ("lapilli.cli.plan", "Say what a recipe needs, memory and time, before anything is loaded."),
    "validate": ("lapilli.cli.validate", "Say the validation loss of a model or checkpoint."),
    "doctor": ("lapilli.cli.doctor", "Say what this machine has for training and serving, and what is missing."),
    "chat": ("lapilli.cli.chat", "Talk with a model about pictures, in the terminal."),
    "serve": ("lapilli.cli.serve", "Serve models over HTTP, as OpenAI's API."),
    "data": ("lapilli.cli.data", "Look at data as it will be trained."),
    "delta": ("lapilli.cli.delta", "Delta weights: make them from two models, or apply them to their base."),
    "projector": ("lapilli.cli.projector", "Take a projector out of a model, or put one in."),
    "convert": ("lapilli.cli.convert", "Turn a model folder into another format, and prove that it is the same model."),
    "inspect": ("lapilli.cli.inspect", "Say what a folder or file is: format, parts, what is missing."),
    "merge": ("lapilli.cli.merge", "Merge an adapter into the model it was trained on."),
    "quantise": ("lapilli.cli.quantise", "Store a language model in 8 or 4 bits, for bitsandbytes."),
    "evaluate": ("lapilli.cli.evaluate", "Ask a model the field's benchmarks, and score its answers."),
    "score": ("lapilli.cli.score", "Score answers files of any system."),
    "compare": ("lapilli.cli.compare", "Say whether two evaluated models differ, question by question."),
    "report": ("lapilli.cli.report", "Write evaluations on one page, models side by side."),
    "judge": ("lapilli.cli.judge", "Have a judge model score answers, and print the table of its reviews."),
    "tasks": ("lapilli.cli.tasks", "List the benchmarks, or show all about one."),
    "quickstart": ("lapilli.cli.quickstart", "Make, train and test a small assistant on real pictures, offline."),
}
"""Verb: its module, which defines `app`, and its line in the help."""


class _Verbs(TyperGroup):
    """Verbs whose modules are imported when they are called, not when help lists them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            ctx.fail(f'no such command "{cmd_name}"{nearest(cmd_name, VERBS)}')
        command: Any = typer.main.get_command(import_module(VERBS[cmd_name][0]).app)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Build, train and talk with LLaVA-style vision-language models.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lapilli {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Entry point. Exit status 0, 1 for an error the user can mend, 2 for a wrong command line, 130 interrupted."""
    try:
        app()
    except LapilliError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
