"""`lapilli merge`: an adapter and its base become one model folder."""

from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder: ours, LLaVA's LoRA, or PEFT's.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Model it was trained on, in full precision. Default: the one it names."),
    ] = None,
    to: Annotated[str | None, typer.Option(help="Another format than the base's: llava, hf, lapilli.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the base's.")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    verify: Annotated[str, typer.Option(help="sample, full (whole logits) or none.")] = "sample",
    template: Annotated[
        str | None, typer.Option(help="Conversation template, where the adapter does not say its own.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the folder to this Hugging Face Hub repository, private.")
    ] = None,
) -> None:
    """Merge LoRA or QLoRA adapters into their base, a tensor at a time, and prove the result."""
    from lapilli.assemble.hub import check_hub, push
    from lapilli.assemble.merge import merge as run
    from lapilli.cli.convert import print_report

    if push_to_hub is not None:
        check_hub(push_to_hub)
    made = run(
        adapter,
        out,
        base,
        to=to,
        dtype=dtype,
        shard_size=shard_size,
        verify=verify,
        template=template,
        say=lambda line: typer.echo(f"  {line} ..."),
    )
    print_report(made)
    if push_to_hub is not None:
        typer.echo(f"uploaded to {push(made.folder, push_to_hub)}")
