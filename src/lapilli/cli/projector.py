"""`lapilli projector`: a projector out of a model, and into one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lapilli.assemble.projector import Found

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Take a projector out of a model, or put one in.",
)


@app.command()
def extract(
    src: Annotated[Path, typer.Argument(help="Model or adapter folder, or weight file, of any layout.")],
    out: Annotated[Path, typer.Argument(help="New file: .safetensors, or .bin for LLaVA's own code.")],
    base: Annotated[
        Path | None, typer.Option(help="Model that an adapter was trained on; default: the one it names.")
    ] = None,
) -> None:
    """Write the projector of SRC, with the rows of <im_start> and <im_end> if it has them, to the file OUT."""
    from lapilli.assemble.projector import extract as run

    found = run(src, out, base)
    _print(found)
    typer.echo(f"wrote {out}")


@app.command()
def attach(
    base_llm: Annotated[str, typer.Argument(help="Folder or hub name of the causal language model.")],
    projector: Annotated[Path, typer.Argument(help="mm_projector.bin, .safetensors, or a folder that holds one.")],
    out: Annotated[Path, typer.Argument(help="Model folder to write; must not exist.")],
    vision_encoder: Annotated[
        str | None, typer.Option(help="Folder or hub name. Default: the one that PROJECTOR's folder names.")
    ] = None,
    template: Annotated[str, typer.Option(help="A name, a YAML file, or `tokenizer`.")] = "vicuna_v1",
    image_mode: Annotated[
        str | None, typer.Option(help="square, pad or anyres. Default: PROJECTOR's, else pad.")
    ] = None,
    feature_layer: Annotated[list[int] | None, typer.Option(help="Default: PROJECTOR's, else -2.")] = None,
    feature_select: Annotated[
        str | None, typer.Option(help="patch or cls_patch. Default: PROJECTOR's, else patch.")
    ] = None,
    keep_vocabulary: Annotated[bool, typer.Option(help="Add no embedding rows; the image token has none.")] = False,
    dtype: Annotated[str, typer.Option(help="auto (each part's own), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Join BASE_LLM, a vision encoder and a trained projector into the model folder OUT."""
    from lapilli.base.errors import RecipeError, unknown

    for flag, value, valid in (
        ("--image-mode", image_mode, ("square", "pad", "anyres")),
        ("--feature-select", feature_select, ("patch", "cls_patch")),
        ("--dtype", dtype, ("auto", "float32", "bfloat16", "float16")),
    ):
        if value is not None and value not in valid:
            raise RecipeError(unknown(flag, value, valid))

    from lapilli.assemble.attach import attach as run
    from lapilli.assemble.attach import options_for
    from lapilli.cli.build import print_report

    chosen: dict[str, Any] = {
        "vision_encoder": vision_encoder,
        "template": template,
        "image_mode": image_mode,
        "feature_layers": tuple(feature_layer) if feature_layer else None,
        "feature_select": feature_select,
        "keep_vocabulary": keep_vocabulary,
        "dtype": dtype,
    }
    options = options_for(base_llm, projector, chosen)
    typer.echo(
        f"{options.projector} on layers {', '.join(map(str, options.feature_layers))} ({options.feature_select}) of "
        f"{options.vision_encoder}, pictures {options.image_mode}"
    )
    print_report(run(options, out, lambda line: typer.echo(f"  {line} ...")), template)
    typer.echo(f"wrote {out}")


def _print(found: Found) -> None:
    weights, origin = found.weights, found.origin
    typer.echo(f"{weights.file}: {weights.kind}")
    for name, tensor in weights.tensors.items():
        typer.echo(f"  {name:<10} {tensor.shape} {str(tensor.dtype).removeprefix('torch.')}")
    if weights.newline is not None:
        typer.echo(f"  image_newline {weights.newline.shape}")
    if found.marks is not None:
        typer.echo(f"  rows of <im_start> and <im_end> {found.marks.shape}")
    said = {
        "--vision-encoder": origin.vision_encoder,
        "--image-mode": origin.image_mode,
        "--feature-layer": " ".join(map(str, origin.feature_layers or ())),
        "--feature-select": origin.feature_select,
    }
    known = " ".join(f"{flag} {value}" for flag, value in said.items() if value)
    typer.echo(f"trained with: {known or 'not said; attaching it takes the settings that it was trained with'}")
