"""`lapilli data check`: everything that could spoil a run, found before it starts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lapilli.data.doctor.diagnosis import Diagnosis
    from lapilli.data.encode import Encoder
    from lapilli.data.image import ImageSpec
    from lapilli.recipe.schema import Source


def check(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Data files or folders, prepared ones too; or RECIPE [A.B=VALUE...]."),
    ],
    images: Annotated[
        list[str] | None,
        typer.Option(help="Folder or archive that picture paths are relative to; once, or once per SOURCE."),
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Held-out data, to be checked too and for leakage.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder: lengths in tokens, and what only a model decides.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="A name, a YAML file, or `tokenizer`. Default: the model folder's own.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Longest conversation in tokens, with --model.")] = 2048,
    decode: Annotated[
        str, typer.Option(help="header: open every picture; full: decode it, which finds damage inside.")
    ] = "header",
    placement: Annotated[str, typer.Option(help="keep <image> where it is written, or move it to the front.")] = "keep",
    max_image_pixels: Annotated[int, typer.Option(min=1, help="Larger pictures are oversized.")] = 50_000_000,
    max_image_bytes: Annotated[int, typer.Option(min=1, help="Larger picture files are oversized.")] = 100_000_000,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes. Default: one per core.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batches that padding is computed for.")] = 16,
    listed: Annotated[int, typer.Option("--list", min=0, help="Records spelt out per reason.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with every finding.")] = False,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a page for the browser.")] = None,
    fix: Annotated[
        str | None, typer.Option(metavar="OUT", help="Write the good records as LLaVA JSON, and quarantine.jsonl.")
    ] = None,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="--fix leaves repeated records in.")
    ] = False,
) -> None:
    """Parse every record, open every picture, count what a run will meet. Exit status 1 if a record can't be used.

    A recipe's data are examined stage by stage as it will read them, and the index that `train` needs is made.
    """
    from lapilli.base.errors import RecipeError, unknown
    from lapilli.recipe.load import is_recipe

    for name, value, known in (("--decode", decode, ("header", "full")), ("--placement", placement, ("keep", "front"))):
        if value not in known:
            raise RecipeError(unknown(name, value, known))
    shown = _Shown(as_json, html, batch_size, listed)
    processes = len(os.sched_getaffinity(0)) if workers is None else workers
    if is_recipe(sources[0]):
        _refuse_options(context)
        _check_recipe(sources, decode, processes, shown)
        return
    if fix is not None and Path(fix).exists():
        raise RecipeError(f"--fix {fix}: exists already; choose another name or remove it")
    if model is None and template is not None:
        raise RecipeError("--template needs --model, for its tokenizer")
    train, held_out = _sources(sources, validation or [], images or [])

    from lapilli.data.corpus import are_prepared
    from lapilli.data.doctor.examine import examine
    from lapilli.data.image import ImageLimits

    rows = are_prepared(train)
    if rows and fix is not None:
        raise RecipeError(f"--fix: {train[0].path} is prepared data; mend the conversations that it was made from")
    longest = None if rows and not _given(context, "max_length") else max_length
    encoder, spec = (None, None) if model is None else _encoder_and_spec(model, template, longest)
    settings: dict[str, Any] = {"decode": decode, "placement": placement}
    diagnosis = examine(
        train,
        held_out,
        encoder=encoder,
        spec=spec,
        limits=ImageLimits(max_image_pixels, max_image_bytes),
        workers=processes,
        **settings,
    )
    shown.report([("", diagnosis, ())])
    if as_json:
        for piece in diagnosis.json_pieces(batch_size):
            typer.echo(piece, nl=False)
        typer.echo()
    if fix is not None:
        _fix(diagnosis, [*train, *held_out], fix, placement, keep_duplicates)
    if not diagnosis.ok:
        raise typer.Exit(1)


OF_SOURCES = (
    *("images", "validation", "model", "template", "max_length", "placement", "max_image_pixels", "max_image_bytes"),
    *("fix", "keep_duplicates"),
)
"""Options that a recipe answers itself, or that write new sources."""


def _given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_options(context: typer.Context) -> None:
    from lapilli.base.errors import RecipeError

    for option in OF_SOURCES:
        if _given(context, option):
            name = option.replace("_", "-")
            if option in ("fix", "keep_duplicates"):
                raise RecipeError(f"--{name} goes with sources: name the recipe's data files in its place")
            keys = {"validation": "data.validation", "model": "model"}
            key = keys.get(option, f"data.{option}")
            raise RecipeError(f"--{name}: a recipe says that itself; set it with {key}=...")


@dataclass(frozen=True)
class _Shown:
    """How what was found is shown."""

    as_json: bool
    html: str | None
    batch_size: int
    listed: int

    def report(self, checked: Sequence[tuple[str, Diagnosis, Sequence[str]]]) -> None:
        """Show examinations, each with its name and what is to be said of it, on the terminal and as a page."""
        from lapilli.base.atomic import atomic_write
        from lapilli.base.errors import RecipeError

        if self.html is not None:
            from lapilli.data.doctor.html import html_report

            try:
                atomic_write(self.html, html_report(checked, self.batch_size))
            except OSError as error:
                raise RecipeError(f"--html {self.html}: can't write it ({error.strerror})") from error
        if not self.as_json:
            from lapilli.data.doctor.text import print_report

            for name, diagnosis, said in checked:
                if name:
                    typer.echo(f"{name}\n")
                print_report(diagnosis, self.listed, self.batch_size)
                for line in said:
                    typer.echo(line)
                if name:
                    typer.echo()
        if self.html is not None:
            typer.echo(f"wrote {self.html}", err=True)


def _check_recipe(given: Sequence[str], decode: Any, workers: int, shown: _Shown) -> None:
    from lapilli.recipe.load import load_recipe

    recipe = load_recipe(given[0], list(given[1:]))

    from lapilli.run.check import check_recipe

    stages = list(check_recipe(recipe, decode=decode, workers=workers))
    lines = [(*stage.notes, stage.conclusion) for stage in stages]
    shown.report([(f"stage {s.name}", s.diagnosis, said) for s, said in zip(stages, lines, strict=True)])
    ok = all(stage.ok for stage in stages)
    if shown.as_json:
        typer.echo(f'{{"ok": {json.dumps(ok)}, "stages": [', nl=False)
        for place, stage in enumerate(stages):
            typer.echo(", " if place else "", nl=False)
            more = {"stage": stage.name, "notes": stage.notes, "refused": stage.refused}
            for piece in stage.diagnosis.json_pieces(shown.batch_size, **more):
                typer.echo(piece, nl=False)
        typer.echo("]}")
    if not ok:
        raise typer.Exit(1)


def _sources(
    train: Sequence[str], validation: Sequence[str], images: Sequence[str]
) -> tuple[list[Source], list[Source]]:
    """Sources with their picture roots: one for all, or one for each in the order of the command line."""
    from lapilli.base.errors import RecipeError
    from lapilli.recipe.schema import Source

    paths = [*train, *validation]
    if len(images) not in (0, 1, len(paths)):
        raise RecipeError(
            f"--images stands {len(images)} times for {len(paths)} sources; give it once for all, or once for each, "
            "those of --validation last"
        )
    roots = list(images) * len(paths) if len(images) == 1 else images or [None] * len(paths)
    made = [Source(path=path, images=root) for path, root in zip(paths, roots, strict=True)]
    return made[: len(train)], made[len(train) :]


def _encoder_and_spec(model: str, template: str | None, max_length: int | None) -> tuple[Encoder, ImageSpec]:
    """How a model folder, or the one in a run folder, makes numbers of conversations and tiles of pictures."""
    from lapilli.assemble.folder import read_spec
    from lapilli.base.errors import RecipeError
    from lapilli.base.layout import ImageLayout
    from lapilli.data.encode import Encoder
    from lapilli.data.template import get_template
    from lapilli.data.tokenizer import load_tokenizer
    from lapilli.model.quiet import quiet

    chosen = None if template is None else get_template(template)
    folder = Path(model)
    if (folder / "model" / "lapilli.json").is_file():
        folder = folder / "model"
    spec = read_spec(folder)
    if spec is None:
        raise RecipeError(f"--model {model}: not a model folder of `lapilli build` (it has no lapilli.json)")
    with quiet():
        tokenizer = load_tokenizer(folder)
    layout = ImageLayout.model_validate(spec.joined["layout"])
    encoder = Encoder(
        tokenizer,
        chosen or spec.template,
        layout,
        spec.image_token,
        max_length=max_length,
        im_start_end=spec.im_start_end,
    )
    return encoder, spec.image


def _fix(diagnosis: Diagnosis, sources: Sequence[Source], out: str, placement: Any, keep_duplicates: bool) -> None:
    from lapilli.data.doctor.fix import QUARANTINE, write_clean

    fixed = write_clean(diagnosis, sources, out, placement=placement, keep_duplicates=keep_duplicates)
    for file in fixed.files:
        root = f", pictures from {file.images}" if file.images else ""
        typer.echo(f"wrote {file.path}: {file.records:,} records{root}", err=True)
    typer.echo(f"wrote {Path(out) / QUARANTINE}: {fixed.quarantined:,} records with reasons", err=True)
