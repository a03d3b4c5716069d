"""`lapilli quantise`: a language model in 8 or 4 bits, for bitsandbytes."""

from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def quantise(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Model folder of any format, or an adapter with --base.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    bits: Annotated[int, typer.Option(help="8 (int8, a scale per row) or 4 (NF4, with quantised scales).")],
    base: Annotated[str | None, typer.Option(metavar="DIR", help="The model that an adapter belongs to.")] = None,
    template: Annotated[
        str | None, typer.Option(help="Conversation template, where the source does not say its own.")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the folder to this Hugging Face Hub repository, private.")
    ] = None,
) -> None:
    """Store the language model's layers in 8 or 4 bits; everything else stays as it is.

    Needs bitsandbytes (pip install 'lapilli[quantise]') and no GPU.
    """
    from lapilli.base.errors import RecipeError

    if bits not in (8, 4):
        raise RecipeError(f"--bits {bits}: 8 or 4")

    from lapilli.assemble.hub import check_hub, push
    from lapilli.assemble.quantise import quantise as run
    from lapilli.checkpoint.stream import size_of

    if push_to_hub is not None:
        check_hub(push_to_hub)
    chosen: Any = bits
    made = run(
        src,
        out,
        chosen,
        base=base,
        template=template,
        shard_bytes=size_of(shard_size),
        say=lambda line: typer.echo(f"  {line} ..."),
    )
    share = made.size_bytes / made.size_before_bytes
    typer.echo(f"{made.quantised} tensors in {bits} bits, {made.kept} as they were")
    typer.echo(f"{made.size_before_bytes / 1e9:.2f} GB became {made.size_bytes / 1e9:.2f} GB ({share:.0%})")
    for note in made.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"wrote {made.folder}")
    if push_to_hub is not None:
        typer.echo(f"uploaded to {push(made.folder, push_to_hub)}")
