"""`lapilli plan`: memory, time, engine and checkpointing of a recipe, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lapilli.train.plan.machine import Machine

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values to set, as in train.lora.r=16.", metavar="A.B=VALUE")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that train together.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="Devices, and so processes, of each machine.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="Kind of device, as h100, a100-80gb, rtx4090 or cpu. Default: what is here.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of each device, as 80GB or 24GiB.")] = None,
    rate: Annotated[
        float | None, typer.Option(min=0, help="TFLOP/s of each device in dense matrix products of the precision.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a list of the stages' plans.")] = False,
) -> None:
    """Say what each stage needs on every device and how long it takes; exit status 1 if one does not fit."""
    from lapilli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])

    from lapilli.run.plan import plan_recipe

    machine = _machine(device, memory, rate, loaded.recipe.stages[0].run)
    say = (lambda _line: None) if as_json else typer.echo
    made = []
    for one in plan_recipe(loaded, machine, nodes * gpus, say=say):
        made.append(one)
        for line in () if as_json else one.lines():
            typer.echo(line)
    if as_json:
        typer.echo(json.dumps([one.as_json() for one in made], indent=2))
    if not all(one.fits for one in made):
        raise typer.Exit(1)


def _machine(device: str | None, memory: str | None, rate: float | None, run: object) -> Machine:
    from lapilli.recipe.schema import Run
    from lapilli.train.plan.machine import here, named, parse_bytes

    assert isinstance(run, Run)
    given = parse_bytes(memory) if memory is not None else None
    cpu = device == "cpu" or (device is None and run.device == "cpu")
    machine = here(run.precision, cpu=cpu) if device in (None, "cpu") else named(str(device))
    if given is not None and device is None and machine.kind == "cpu" and run.device != "cpu":
        machine = replace(named("a100-80gb"), name="a GPU as fast as an A100")
    if given is not None:
        machine = replace(machine, memory_bytes=given)
    return machine if rate is None else replace(machine, flops_per_second=rate * 1e12)
