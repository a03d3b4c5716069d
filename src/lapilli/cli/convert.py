"""`lapilli convert`: a model folder of one format into another, with the proof that it is the same model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lapilli.assemble.convert import ConversionReport

app = typer.Typer(add_completion=False, rich_markup_mode=None)

HOLDS = {
    "llava": (
        "LLaVA's own, v0 to v1.6. Read: whole models, LoRA and projector folders with their --base.",
        "One CLIP encoder, one of its layers, any projector, Llama, Mistral or MPT; square, pad, anyres; "
        "<im_start>, <im_end>, <im_patch>; a tuned encoder. Not the template (in lapilli.json beside).",
    ),
    "hf": (
        "transformers' `llava` and `llava_next`; loads there, in vLLM and SGLang.",
        "Any encoder with at most one token before its patches, several layers, any language model; the two-layer "
        "projector mlp2x_gelu only; the class token with square and pad only. Needs a vocabulary row for the image "
        "token: the mean of the others, dropped again on the way back.",
    ),
    "lapilli": (
        "Our own type, for what the others can't hold.",
        "Everything.",
    ),
    "cerebras": (
        "Cerebras' mm_simple and llava, cs-2.3 and cs-2.4 onwards (--to cerebras-2.3; cerebras: the newest).",
        "One CLIP encoder, mlpNx_gelu projectors, Llama without biases, pictures padded to a square.",
    ),
}
"""Format: what it is, and what it can hold."""


@app.command()
def convert(
    src: Annotated[str | None, typer.Argument(metavar="SRC", help="Model folder of any format.")] = None,
    dst: Annotated[str | None, typer.Argument(metavar="DST", help="Folder to write; must not exist.")] = None,
    to: Annotated[str | None, typer.Option(help="llava, hf, lapilli or cerebras[-2.3|-2.4|...].")] = None,
    base: Annotated[
        str | None, typer.Option(help="The model that a LoRA or projector folder belongs to.", metavar="DIR")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as stored.")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    verify: Annotated[
        str, typer.Option(help="sample (every tensor, logits through the outer blocks), full (whole logits) or none.")
    ] = "sample",
    template: Annotated[
        str | None, typer.Option(help="Conversation template, where the source does not say its own.")
    ] = None,
    cerebras_model: Annotated[str, typer.Option(help="mmsimple-llava, or the older llava.")] = "mmsimple-llava",
    cerebras_form: Annotated[
        str, typer.Option(help="mdl (their state file), tensors, or tree (image_model/ and text_model/).")
    ] = "mdl",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the folder to this Hugging Face Hub repository, private.")
    ] = None,
    list_formats: Annotated[
        bool, typer.Option("--list", help="Show the formats and what each can hold, and do nothing else.")
    ] = False,
) -> None:
    """Convert a model folder to another format, a tensor at a time, and prove that it is the same model."""
    from lapilli.base.errors import RecipeError

    if list_formats:
        _list()
        return
    if src is None or dst is None or to is None:
        raise RecipeError("name a source, a destination and a format: lapilli convert SRC DST --to FORMAT (see --list)")

    from lapilli.assemble.convert import convert as room
    from lapilli.assemble.hub import check_hub, push

    if push_to_hub is not None:
        check_hub(push_to_hub)
    made = room(
        src,
        dst,
        to,
        base=base,
        dtype=dtype,
        shard_size=shard_size,
        verify=verify,
        template=template,
        cerebras_model=cerebras_model,
        cerebras_form=cerebras_form,
        say=lambda line: typer.echo(f"  {line} ..."),
    )
    print_report(made)
    if push_to_hub is not None:
        typer.echo(f"uploaded to {push(made.folder, push_to_hub)}")


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=True)
    for column in ("--to", "what it is", "what it can hold"):
        table.add_column(column)
    for name, (what, holds) in HOLDS.items():
        table.add_row(name, what, holds)
    Console(highlight=False).print(table)


def print_report(made: ConversionReport) -> None:
    """Print what was converted, and the proof."""
    from rich.console import Console

    console = Console(highlight=False)
    conversion = made.conversion
    lines = [("converted", f"{conversion.source} to {conversion.target}: {made.size_bytes / 1e9:.2f} GB")]
    for name, value in [*lines, *made.verification.rows()]:
        console.print(f"{name:<13} {value}", soft_wrap=True, markup=False)
    for note in conversion.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    typer.echo(f"wrote {made.folder} (the proof: conversion.json)")
