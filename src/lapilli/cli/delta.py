"""`lapilli delta`: what a model adds to its base, and the model from both. The original's flags are taken too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lapilli.checkpoint.delta import DeltaReport

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="Delta weights: make and apply them."
)

_Argument = Annotated[str | None, typer.Argument(show_default=False)]
_Base = Annotated[str | None, typer.Option("--base-model-path", "--base", help="Same as BASE.")]
_Target = Annotated[str | None, typer.Option("--target-model-path", "--target", help="The target's folder.")]
_Delta = Annotated[str | None, typer.Option("--delta-path", "--delta", help="The delta's folder.")]
_ShardSize = Annotated[str, typer.Option(help="Largest weight file, such as 5GB or 500MB.")]


@app.command()
def make(
    base: _Argument = None,
    target: _Argument = None,
    out: _Argument = None,
    base_flag: _Base = None,
    target_flag: _Target = None,
    delta_flag: _Delta = None,
    shard_size: _ShardSize = "5GB",
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            "--hub-repo-id",
            metavar="REPO",
            help="Upload the folder to this Hugging Face Hub repository, private.",
        ),
    ] = None,
) -> None:
    """Write TARGET minus BASE, in float16, to the new folder OUT."""
    chosen = _chosen({"BASE": (base, base_flag), "TARGET": (target, target_flag), "OUT": (out, delta_flag)})
    if push_to_hub is not None:
        from lapilli.assemble.hub import check_hub, push

        check_hub(push_to_hub)

    from lapilli.checkpoint.delta import make_delta
    from lapilli.checkpoint.stream import size_of

    made = make_delta(*chosen, shard_bytes=size_of(shard_size))
    _print(made)
    if push_to_hub is not None:
        typer.echo(f"uploaded to {push(made.out, push_to_hub)}")


@app.command()
def apply(
    base: _Argument = None,
    delta: _Argument = None,
    out: _Argument = None,
    base_flag: _Base = None,
    delta_flag: _Delta = None,
    target_flag: _Target = None,
    shard_size: _ShardSize = "5GB",
) -> None:
    """Write BASE plus DELTA, in float16, to the new folder OUT."""
    chosen = _chosen({"BASE": (base, base_flag), "DELTA": (delta, delta_flag), "OUT": (out, target_flag)})

    from lapilli.checkpoint.delta import apply_delta
    from lapilli.checkpoint.stream import size_of

    def warn(line: str) -> None:
        typer.echo(f"warning: {line}", err=True)

    _print(apply_delta(*chosen, shard_bytes=size_of(shard_size), warn=warn))


def _chosen(given: dict[str, tuple[str | None, str | None]]) -> list:
    """A folder for each name, from its place on the command line or from its flag."""
    from pathlib import Path

    from lapilli.base.errors import RecipeError

    made = []
    for name, (argument, flag) in given.items():
        if (argument is None) == (flag is None):
            what = "is missing" if flag is None else "is given twice, by its place and by its flag"
            raise RecipeError(f"{name} {what}; write {' '.join(given)}, or all of them by flags")
        made.append(Path(argument or flag or ""))
    return made


def _print(report: DeltaReport) -> None:
    typer.echo(f"wrote {report.out}: {report.tensors:,} tensors in float16")
    typer.echo(f"base: {report.base_checked}")
    for table, rows in report.grown.items():
        typer.echo(f"{table}: {rows} rows that the base lacks stand as they are")
    if report.whole:
        typer.echo(f"{len(report.whole)} tensors that the base lacks stand as they are: {_some(report.whole)}")
    typer.echo(f"copied beside them: {', '.join(report.copied) or 'nothing'}")
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)


def _some(names: list[str]) -> str:
    from lapilli.checkpoint.tensors import some

    return some(names)
