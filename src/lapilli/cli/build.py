"""`lapilli build`: join two parts."""

from typing import Any

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def build(
    vision_encoder: str = typer.Option(
        ..., help="Folder or hub name of the vision encoder (CLIP, SigLIP, DINOv2 ...)."
    ),
    language_model: str = typer.Option(..., help="Folder or hub name of the causal language model."),
    out: str = typer.Option(..., help="Model folder to write; must not exist."),
    projector: str = typer.Option("mlp2x_gelu", help="linear, mlpNx_gelu or identity."),
    template: str = typer.Option("vicuna_v1", help="Conversation template: a name, a YAML file, or `tokenizer`."),
    image_mode: str = typer.Option("pad", help="square (crop), pad (to a square) or anyres (tiles, as LLaVA-1.6)."),
    image_backend: str = typer.Option("exact", help="exact (Pillow's numbers) or fast (within 2/255)."),
    feature_layer: list[int] = typer.Option([-2], help="Encoder layer to read; several are concatenated."),  # noqa: B008
    feature_select: str = typer.Option("patch", help="patch (drop the class token) or cls_patch (keep it)."),
    im_start_end: bool = typer.Option(False, "--im-start-end", help="Wrap pictures in <im_start> and <im_end>."),
    image_token: str = typer.Option("<image>", help="Text of the image token."),
    projector_weights: str | None = typer.Option(None, help="mm_projector.bin or .safetensors to start from."),
    keep_vocabulary: bool = typer.Option(False, help="Add no embedding rows; the image token has none."),
    dtype: str = typer.Option("auto", help="auto (each part's own), float32, bfloat16 or float16."),
    seed: int = typer.Option(0, help="Seed of the random projector."),
    dry_run: bool = typer.Option(False, help="Say what would be built, and read no weights."),
) -> None:
    """Join a vision encoder and a language model into a model folder."""
    from lapilli.base.errors import RecipeError, unknown

    for flag, value, valid in (
        ("--image-mode", image_mode, ("square", "pad", "anyres")),
        ("--image-backend", image_backend, ("exact", "fast")),
        ("--feature-select", feature_select, ("patch", "cls_patch")),
        ("--dtype", dtype, ("auto", "float32", "bfloat16", "float16")),
    ):
        if value not in valid:
            raise RecipeError(unknown(flag, value, valid))

    from lapilli.assemble import build as room

    chosen: dict[str, Any] = {
        "vision_encoder": vision_encoder,
        "language_model": language_model,
        "projector": projector,
        "template": template,
        "image_mode": image_mode,
        "image_backend": image_backend,
        "feature_layers": tuple(feature_layer),
        "feature_select": feature_select,
        "im_start_end": im_start_end,
        "image_token": image_token,
        "projector_weights": projector_weights,
        "keep_vocabulary": keep_vocabulary,
        "dtype": dtype,
        "seed": seed,
    }
    options = room.BuildOptions(**chosen)
    report = room.dry_run(options) if dry_run else room.build(options, out, lambda line: typer.echo(f"  {line} ..."))
    print_report(report, template)
    typer.echo("nothing was written (dry run)" if dry_run else f"wrote {out}")


def print_report(report: Any, template: str) -> None:
    """Print what was built, or would be."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="parameters", title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    for part, count in report.parameters.items():
        table.add_row(part, f"{count:,}")
    table.add_row("total", f"{sum(report.parameters.values()):,}")
    console = Console(highlight=False)
    console.print(table)
    loads = f"lapilli only: {report.stored_because}" if report.stored_because else "transformers, vLLM, SGLang, lapilli"
    packing = report.packing.packing + (f" ({report.packing.reason})" if report.packing.reason else "")
    lines = {
        "tokens per image": report.tokens_per_image,
        "image token id": report.image_token_id,
        "template": template,
        "packing": packing,
        "loads in": loads,
    }
    if report.proof:
        lines["proof"] = report.proof
    for name, value in lines.items():
        console.print(f"{name:<17} {value}", soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
