"""`lapilli tasks`: the benchmarks that lapilli knows, and what each one is."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def tasks(name: Annotated[str | None, typer.Argument(help="A task, to see all about it.")] = None) -> None:
    """List the tasks, or show one: its files, its prompt, its metric, and where these are defined."""
    from rich.console import Console
    from rich.table import Table

    from lapilli.evaluate.catalogue import all_tasks, load_task

    console = Console(highlight=False)
    if name is None:
        table = Table()
        for column in ("task", "what it is", "headline", "submission"):
            table.add_column(column, overflow="fold")
        for task in all_tasks():
            table.add_row(task.name, task.title, task.headline if task.scorer else "-", task.submission or "-")
        console.print(table)
        return
    task = load_task(name)
    console.print(f"{task.name}: {task.title}", soft_wrap=True, markup=False)
    console.print(task.about, soft_wrap=True, markup=False)
    rows: list[tuple[str, str]] = [
        (f"file {part}", f"{place}{' (may be missing)' if part in task.optional else ''}")
        for part, place in task.files.items()
    ]
    rows += [("folder", task.folder or task.name), ("get it", task.obtain)]
    rows += [(f"option {key}", repr(value)) for key, value in task.options.items()]
    for protocol, options in task.protocols.items():
        rows += [(f"option {key}", f"{value!r} under protocol {protocol}") for key, value in options.items()]
    decoding = ", ".join(f"{key} {value}" for key, value in task.decoding.model_dump(exclude_none=True).items())
    rows += [("second round", repr(task.follow_up.text))] if task.follow_up else []
    rows += [("decoding", decoding), ("reader", task.reader), ("scorer", task.scorer or "-")]
    rows += [("submission", task.submission or "-"), ("headline", task.headline)]
    rows += [("source", source) for source in task.source]
    for label, value in rows:
        if value:
            console.print(f"  {label:<18} {value}", soft_wrap=True, markup=False)
