"""`lapilli data prepare`: tokenise once, train often."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lapilli.data.encode import Encoder
    from lapilli.data.image import ImageSpec
    from lapilli.data.prepare.job import Outcome
    from lapilli.recipe.schema import Source


def prepare(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Data files or folders, of any format.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="New folder, or one that a killed `prepare` left.")],
    model: Annotated[str, typer.Option(help="Model folder: its tokenizer, template and image layout decide.")],
    images: Annotated[
        list[str] | None,
        typer.Option(help="Folder or archive that picture paths are relative to; once, or once per SOURCE."),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="A name, a YAML file, or `tokenizer`. Default: the model folder's own.")
    ] = None,
    placement: Annotated[str, typer.Option(help="keep <image> where it is written, or move it to the front.")] = "keep",
    max_length: Annotated[int, typer.Option(min=2, help="Longest conversation in tokens, with pictures.")] = 2048,
    too_long: Annotated[str, typer.Option(help="error (into the quarantine), drop or truncate_turns.")] = "error",
    layout: Annotated[str, typer.Option(help="ours, or cerebras: what their own loader reads.")] = "ours",
    max_images: Annotated[int, typer.Option(min=1, help="Pictures per row of the cerebras layout.")] = 1,
    embed_images: Annotated[
        bool, typer.Option("--embed-images", help="Put the picture files inside, as they are.")
    ] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one per core.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: the workers of a Ray cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster's, such as `auto`. Default: one is started here for the while.")
    ] = None,
    shard_records: Annotated[int | None, typer.Option(min=1, help="Records per file. Default: 4096.")] = None,
    max_bad: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit status 1 if a larger share of the records is bad.")
    ] = None,
    max_image_pixels: Annotated[int, typer.Option(min=1, help="Larger pictures are refused.")] = 50_000_000,
    max_image_bytes: Annotated[int, typer.Option(min=1, help="Larger picture files are refused.")] = 100_000_000,
) -> None:
    """Tokenise every conversation once, into HDF5 files; after a kill the same command goes on where it was."""
    from lapilli.base.errors import RecipeError, unknown

    for name, value, known in (
        ("--placement", placement, ("keep", "front")),
        ("--too-long", too_long, ("error", "drop", "truncate_turns")),
        ("--layout", layout, ("ours", "cerebras")),
        ("--engine", engine, ("local", "ray")),
    ):
        if value not in known:
            raise RecipeError(unknown(name, value, known))
    if address is not None and engine != "ray":
        raise RecipeError("--address belongs to --engine ray")
    read = _sources(sources, images or [])
    encoder, spec = _encoder_and_spec(model, template, max_length, too_long)

    from lapilli.data.image import ImageLimits
    from lapilli.data.prepare.job import prepare as run

    settings: dict[str, Any] = {"placement": placement, "layout": layout, "engine": engine, "address": address}
    outcome = run(
        read,
        encoder,
        spec,
        out,
        limits=ImageLimits(max_image_pixels, max_image_bytes),
        max_images=max_images,
        embed_images=embed_images,
        shard_records=shard_records,
        processes=len(os.sched_getaffinity(0)) if processes is None else processes,
        **settings,
    )
    _report(outcome)
    bad, records = outcome.statistics.bad, outcome.statistics.records
    if max_bad is not None and bad > max_bad * records:
        typer.echo(f"error: {bad:,} of {records:,} records are bad, more than --max-bad {max_bad:g}", err=True)
        raise typer.Exit(1)


def _sources(paths: Sequence[str], images: Sequence[str]) -> list[Source]:
    """Sources with their picture roots: one for all, or one for each in the order of the command line."""
    from lapilli.base.errors import RecipeError
    from lapilli.recipe.schema import Source

    if len(images) not in (0, 1, len(paths)):
        raise RecipeError(
            f"--images stands {len(images)} times for {len(paths)} sources; give it once for all, or once for each"
        )
    roots = [None] * len(paths) if not images else list(images) * (len(paths) if len(images) == 1 else 1)
    return [Source(path=path, images=root) for path, root in zip(paths, roots, strict=True)]


def _encoder_and_spec(model: str, template: str | None, max_length: int, too_long: Any) -> tuple[Encoder, ImageSpec]:
    """How a model folder makes numbers of conversations. A misspelt template is said before anything is loaded."""
    from lapilli.data.template import get_template

    chosen = None if template is None else get_template(template)

    from lapilli.base.layout import ImageLayout
    from lapilli.data.encode import Encoder
    from lapilli.model.quiet import quiet
    from lapilli.train.reading import read_description

    with quiet():
        spec, tokenizer = read_description(model)
    encoder = Encoder(
        tokenizer,
        chosen or spec.template,
        ImageLayout.model_validate(spec.joined["layout"]),
        spec.image_token,
        max_length=max_length,
        too_long=too_long,
        im_start_end=spec.im_start_end,
    )
    if encoder.untokenised_marks:
        marks = ", ".join(encoder.untokenised_marks)
        typer.echo(f"note: to this tokenizer {marks} is ordinary text of several tokens", err=True)
    return encoder, spec.image


def _report(outcome: Outcome) -> None:
    from lapilli.data.prepare.job import QUARANTINE
    from lapilli.data.prepare.params import FILE

    s = outcome.statistics
    if outcome.kept_shards:
        typer.echo(f"{outcome.kept_shards:,} of {outcome.shards:,} shards were there from before", err=True)
    typer.echo(
        f"{outcome.out}: {s.samples:,} conversations, {s.tokens:,} tokens ({s.supervised:,} supervised, "
        f"{s.image_tokens:,} of {s.pictures:,} pictures), longest {s.longest:,}; statistics in {FILE}"
    )
    for kind, count in s.notes.most_common():
        typer.echo(f"note: {count:,} x {kind}", err=True)
    if s.bad or s.dropped:
        what = f"{s.bad:,} bad, {s.dropped:,} dropped as too long"
        typer.echo(f"left out {s.bad + s.dropped:,} of {s.records:,} records ({what}): {QUARANTINE}", err=True)
        for kind, count in s.reasons.most_common():
            typer.echo(f"  {count:,} x {kind}", err=True)
