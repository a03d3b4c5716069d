"""`lapilli data`: look at data as it will be trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lapilli.cli.data_check import check
from lapilli.cli.data_fetch import fetch
from lapilli.cli.data_prepare import prepare
from lapilli.cli.data_scienceqa import convert_scienceqa

if TYPE_CHECKING:
    from lapilli.data.encode import Encoder
    from lapilli.data.show import Drawing

app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command("check")(check)
app.command("fetch")(fetch)
app.command("prepare")(prepare)
app.command("convert-scienceqa")(convert_scienceqa)


@app.callback()
def data() -> None:
    """Look at data as it will be trained."""


@app.command()
def show(
    file: Annotated[str, typer.Argument(metavar="DATA", help="File or folder of conversations, in any format.")],
    model: Annotated[str, typer.Option(help="Model folder, or the folder of a tokenizer alone.")],
    images: Annotated[str | None, typer.Option(help="Folder that picture paths are relative to.")] = None,
    template: Annotated[
        str | None, typer.Option(help="A name, a YAML file, or `tokenizer`. Default: the model folder's own.")
    ] = None,
    placement: Annotated[str, typer.Option(help="keep <image> where it is written, or move it to the front.")] = "keep",
    im_start_end: Annotated[
        bool, typer.Option("--im-start-end", help="Wrap pictures in <im_start> and <im_end>.")
    ] = False,
    no_images: Annotated[bool, typer.Option("--no-images", help="Do not open the pictures.")] = False,
    unexpanded: Annotated[bool, typer.Option("--unexpanded", help="A picture is one entry, -200.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One object per record and line: id, input_ids, labels.")
    ] = False,
    html: Annotated[str | None, typer.Option(help="Write a page for the browser.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Show the first N records only.")] = None,
) -> None:
    """Print each conversation as it will be trained: supervised tokens coloured, pictures as blocks."""
    from lapilli.base.errors import RecipeError, unknown
    from lapilli.data.template import get_template

    if placement not in ("keep", "front"):
        raise RecipeError(unknown("--placement", placement, ("keep", "front")))
    if template is not None:
        get_template(template)  # a misspelt name is reported before anything is loaded
    _say_what_is_logged()
    encoder = _encoder(model, template, im_start_end)
    opens = images is not None and not no_images
    if not opens and not unexpanded and encoder.layout is not None and encoder.layout.mode == "anyres":
        raise RecipeError("image mode anyres needs the pictures' sizes: give --images DIR, or --unexpanded")
    if images is None and not no_images:
        typer.echo("note: no --images DIR, so pictures are not opened", err=True)
    if encoder.layout is None and not unexpanded:
        typer.echo("note: no model folder, so a picture is shown as one entry, -200", err=True)
    shown = _Showing(encoder, images, placement, opens=opens, unexpanded=unexpanded)
    drawings = shown.drawings(file, limit)
    if html is not None:
        drawings = _with_page(drawings, Path(html), f"{Path(file).name} as {encoder.template.name}", encoder)
    for drawing in drawings:
        if as_json:
            typer.echo(json.dumps(drawing.as_json()))
        elif html is None:
            _print(drawing)
    if html is not None:
        typer.echo(f"wrote {html}", err=True)
    for problem in shown.problems:
        typer.echo(f"error: {problem}", err=True)
    if shown.problems:
        typer.echo(f"{len(shown.problems)} of {shown.records} records can't be used", err=True)
        raise typer.Exit(1)


@dataclass
class _Showing:
    """Goes through a file; draws what is good and collects what is not."""

    encoder: Encoder
    images: str | None
    placement: Any
    opens: bool
    unexpanded: bool
    records: int = 0
    problems: list[str] = field(default_factory=list)

    def drawings(self, file: str, limit: int | None) -> Iterator[Drawing]:
        from lapilli.base.errors import DataError
        from lapilli.data.read.open import open_source
        from lapilli.data.show import draw
        from lapilli.recipe.schema import Source

        reader = open_source(Source(path=file, images=self.images))
        for record in islice(reader.records(), limit):
            self.records += 1
            try:
                sample = reader.parse(record, self.placement)
                sizes = self._sizes(sample)
                name = record.value.get("id") if isinstance(record.value, dict) else None
                name = name if isinstance(name, str | int) else None
                yield draw(sample, self.encoder, sizes, unexpanded=self.unexpanded, name=name)
            except DataError as error:
                self.problems.append(str(error))

    def _sizes(self, sample: Any) -> list[tuple[int, int]] | None:
        from lapilli.data.image import image_size

        if not self.opens or not sample.images:
            return None
        return [image_size(image, self.images, where=sample.where) for image in sample.images]


def _encoder(model: str, template: str | None, im_start_end: bool) -> Encoder:
    """An Encoder as a model folder describes it, or from a tokenizer alone."""
    from lapilli.assemble.folder import read_spec
    from lapilli.base.errors import RecipeError
    from lapilli.base.layout import ImageLayout
    from lapilli.data.encode import Encoder
    from lapilli.data.template import get_template
    from lapilli.data.tokenizer import load_tokenizer
    from lapilli.model.quiet import quiet

    folder = Path(model)
    if (folder / "model" / "lapilli.json").is_file():
        folder = folder / "model"  # a run folder
    spec = read_spec(folder)
    if spec is None and template is None:
        raise RecipeError(f"{model} has no lapilli.json that names a template: give --template NAME")
    with quiet():
        tokenizer = load_tokenizer(folder if spec else model)
    wraps = im_start_end or (spec is not None and spec.im_start_end)
    if spec is None:
        encoder = Encoder(tokenizer, get_template(template or ""), None, None, im_start_end=wraps)
    else:
        layout = ImageLayout.model_validate(spec.joined["layout"])
        chosen = spec.template if template is None else get_template(template)
        encoder = Encoder(tokenizer, chosen, layout, spec.image_token, im_start_end=wraps)
    if encoder.untokenised_marks:
        marks = ", ".join(encoder.untokenised_marks)
        typer.echo(f"note: to this tokenizer {marks} is ordinary text of several tokens", err=True)
    return encoder


def _with_page(drawings: Iterator[Drawing], path: Path, title: str, encoder: Encoder) -> Iterator[Drawing]:
    """Pass the drawings on, and write a page of them when the last one has gone."""
    from lapilli.base.atomic import atomic_write
    from lapilli.base.errors import RecipeError
    from lapilli.data.show_html import page

    kept = []
    for drawing in drawings:
        kept.append(drawing)
        yield drawing
    facts = (f"template {encoder.template.name}, tokenizer of {len(encoder.tokenizer)} tokens",)
    try:
        atomic_write(path, "".join(page(kept, title, facts)))
    except OSError as error:
        raise RecipeError(f"--html {path}: can't write it ({error.strerror})") from error


def _print(drawing: Drawing) -> None:
    from rich.console import Console

    from lapilli.data.show import as_text

    console = Console(highlight=False, soft_wrap=True)
    console.print(as_text(drawing, coloured=console.is_terminal and not console.no_color))


def _say_what_is_logged() -> None:
    """What the library logs while it loads, such as an assumption about a tokenizer, goes to standard error."""
    log = logging.getLogger("lapilli")
    log.setLevel(logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("note: %(message)s"))
        log.addHandler(handler)
