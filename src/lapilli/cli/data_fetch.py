"""`lapilli data fetch`: a published mixture, with its pictures, as one command that can be run again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lapilli.data.fetch.plan import Plan, Step
    from lapilli.data.fetch.table import Table


def fetch(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A mixture, see --list.")] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where to. Default: the folder that the mixture's document names.")
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Show the mixtures and stop.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, sizes, checks and licences; touch nothing.")
    ] = False,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="ITEM", help="An item you have, or don't want. Repeatable.")
    ] = None,
    token_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Holds a Hugging Face token, for files behind a request.")
    ] = None,
    keep_archives: Annotated[
        bool, typer.Option("--keep-archives", help="Keep zip files after unpacking them.")
    ] = False,
    no_disk_check: Annotated[
        bool, typer.Option("--no-disk-check", help="Start even if the disk looks too small.")
    ] = False,
    table: Annotated[
        str | None, typer.Option(metavar="FILE", help="A table of your own, in the form of lapilli's.")
    ] = None,
) -> None:
    """Download a published mixture into the folders that its document draws. Run it again to go on after a stop."""
    from lapilli.base.errors import RecipeError
    from lapilli.base.http import Fetcher
    from lapilli.data.fetch.plan import make_plan
    from lapilli.data.fetch.run import run_plan
    from lapilli.data.fetch.table import load_table

    sources = load_table(table)
    if show_list:
        _list(sources)
        return
    if name is None:
        raise RecipeError("name a mixture, such as `lapilli data fetch llava-pretrain-558k`; --list shows them all")
    mixture = sources.mixture(name)
    plan = make_plan(name, mixture, sources.items, out or mixture.folder, skip or ())
    _show(plan, keep_archives)
    if dry_run:
        return
    if not no_disk_check:
        plan.check_disk(keep_archives)
    http = frozenset(host for step in plan.steps for host in _http_hosts(step))
    with Fetcher(http_hosts=http, tokens=_tokens(token_file)) as fetcher:
        outcome = run_plan(plan, fetcher, keep_archives=keep_archives)
    for note in outcome.notes:
        typer.echo(note)
    for problem in outcome.problems:
        typer.echo(f"error: {problem}", err=True)
    if outcome.problems:
        raise typer.Exit(1)
    _recipe(plan)


def _http_hosts(step: Step) -> list[str]:
    from urllib.parse import urlsplit

    item = step.item
    if item.links is not None and item.links.http:
        return list(item.links.hosts)
    return [urlsplit(item.url).hostname or ""] if item.http and item.url else []


def _tokens(token_file: str | None) -> dict[str, str]:
    from lapilli.base.errors import RecipeError
    from lapilli.data.fetch.table import HUB

    if token_file is None:
        return {}
    try:
        token = Path(token_file).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--token-file {token_file}: can't read a token from it ({error})") from error
    if not token or any(character.isspace() for character in token):
        raise RecipeError(f"--token-file {token_file}: must hold one token and nothing else")
    return {HUB: token}


def _list(table: Table) -> None:
    """Every mixture with its size."""
    from lapilli.base.progress import size_text

    width = max(map(len, table.mixtures))
    for name, mixture in table.mixtures.items():
        sizes = [table.items[item].size for item in mixture.items]
        known = size_text(sum(size or 0 for size in sizes))
        more = f" and {sizes.count(None)} of unknown size" if None in sizes else ""
        asks = "; asks for a request" if any(table.items[item].request for item in mixture.items) else ""
        typer.echo(f"{name:{width}}  {mixture.title}\n{'':{width}}  {known}{more}{asks}; into {mixture.folder}/")


def _show(plan: Plan, keep_archives: bool) -> None:
    """The plan: steps, sizes, checks, licences, and what a person has to ask for."""
    from lapilli.base.progress import size_text
    from lapilli.data.fetch.plan import free_bytes

    typer.echo(f"{plan.name}: {plan.mixture.title}\ninto {plan.out}/")
    for step in plan.steps:
        item = step.item
        size = "size unknown" if item.size is None else f"{'' if item.bytes else 'about '}{size_text(item.size)}"
        where = f"{item.save}, unpacked into {item.unpack.into}/" if item.unpack else item.save
        typer.echo(f"\n  {step.name}  [{step.state}]  {size}\n    to: {where}")
        if item.url or item.links:
            typer.echo(f"    from: {item.url or f'the addresses in {item.links.list if item.links else None}'}")
        typer.echo(f"    check: {item.checked_with}\n    licence: {item.licence} ({item.licence_page})")
        if item.request:
            typer.echo(f"    request: {item.request} ({item.page})")
    unknown = f", and {', '.join(plan.unknown)} of unknown size" if plan.unknown else ""
    need, free = size_text(plan.disk_bytes(keep_archives)), size_text(free_bytes(plan.out))
    typer.echo(f"\nto bring: {size_text(plan.fetch_bytes)}{unknown}; disk at most: {need}, free: {free}")
    if waiting := [step.name for step in plan.steps if step.state == "waits for you"]:
        typer.echo(f"waiting for you, see `request`: {', '.join(waiting)}")


def _recipe(plan: Plan) -> None:
    """The lines of a recipe that use what came."""
    if not plan.mixture.sources:
        return
    typer.echo("\nin a recipe:\ndata:\n  train:")
    for source in plan.mixture.sources:
        typer.echo(f"    - path: {plan.out / source.path}\n      images: {plan.out / source.images}")
