"""`lapilli evaluate`: a model's answers to benchmarks, and what they are worth."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lapilli.cli.evaluate_table import choose_protocols, print_results

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lapilli.evaluate.job import Job
    from lapilli.evaluate.task import Protocol
    from lapilli.generate.assistant import Assistant

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, run folder, or adapter folder with --base.")],
    task: Annotated[
        list[str],
        typer.Option(metavar="NAME[,NAME...]", help="Tasks (see `lapilli tasks`), or YAML files of your own."),
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where answers and results go, one folder per task.")],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Holds a folder per task, or one task's files. Default: beside the YAML file."
        ),
    ] = None,
    files: Annotated[
        list[str] | None, typer.Option(metavar="PART=PATH", help="Another place for one of the task's files.")
    ] = None,
    protocol: Annotated[str, typer.Option(help="llava (the original's numbers), official, or both.")] = "both",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask only the first questions. What comes out is not the task's number.")
    ] = None,
    allow_missing: Annotated[
        int, typer.Option(min=0, help="Score although so many questions have no answer. Default: none may lack one.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers that grow at a time.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU where there is one.")] = "auto",
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A judge model scores tasks that have no scorer: model=gpt-4, url=..., max_cost=... (see the docs).",
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Model an adapter was trained on.", metavar="DIR")] = None,
    template: Annotated[str | None, typer.Option(help="Conversation template instead of the model's own.")] = None,
) -> None:
    """Ask a model a benchmark's questions, write every answer as it ends, score them. Stopped or killed, the same
    command goes on; under torchrun the processes share the questions."""
    from lapilli.evaluate.ranks import Rank

    rank = Rank.from_environment(os.environ)
    protocols = choose_protocols(protocol)
    jobs = open_named(task, data, files or [], protocols, limit, judged=judge or [])
    if rank.rank == 0:
        _say(jobs, limit)

    import torch

    from lapilli.evaluate.origin import describe_model
    from lapilli.evaluate.run import Settings
    from lapilli.evaluate.run import evaluate as run
    from lapilli.evaluate.stopped import Stopped

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and rank.world > 1:
        device = f"cuda:{rank.local}"
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16

    def bring() -> Assistant:
        from lapilli.generate.assistant import load

        return load(model, base, device, dtype, template)

    described = describe_model(model, base, template=template, dtype=str(dtype).removeprefix("torch."))
    settings = Settings(batch_size, allow_missing, rank=rank)
    try:
        results = run(jobs, out, described, bring, settings, on_results=lambda made: print_results([made]))
    except Stopped as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(128 + signal.Signals[error.signal].value) from error
    if len(results) > 1:
        print_results(results, groups=False)


def open_named(
    tasks: Sequence[str],
    data: str | None,
    files: Sequence[str],
    protocols: Sequence[Protocol],
    limit: int | None = None,
    *,
    judged: Sequence[str] = (),
    asking: bool = True,
) -> list[Job]:
    """The tasks that a command line names, their files read and checked; `judged` are the settings of a judge, who is
    to score them. Raises RecipeError or DataError."""
    from pathlib import Path

    from lapilli.base.errors import RecipeError
    from lapilli.evaluate.catalogue import is_own, load_task
    from lapilli.evaluate.files import read_overrides
    from lapilli.evaluate.job import open_jobs

    names = list(dict.fromkeys(name for one in tasks for name in one.split(",") if name))
    loaded = [load_task(name) for name in names]
    alike = {task.name for task in loaded if sum(other.name == task.name for other in loaded) > 1}
    if alike:
        raise RecipeError(f"--task: two tasks are called {', '.join(sorted(alike))}; give one of them another name")
    if len(loaded) > 1 and files:
        raise RecipeError("--files names files of one task; name one --task with it")
    jobs: list[Job] = []
    for name, task in zip(names, loaded, strict=True):
        if data is None and not is_own(name):
            raise RecipeError(
                f"--data: name the folder that holds the files of task {name} (see `lapilli tasks {name}`)"
            )
        folder = data if data is not None else str(Path(name).resolve().parent)
        named = read_overrides(files)
        jobs += open_jobs(task, folder, protocols, named=named, alone=len(loaded) == 1, limit=limit, asking=asking)
    return _with_judge(jobs, judged) if judged else jobs


def _with_judge(jobs: Sequence[Job], settings: Sequence[str]) -> list[Job]:
    """Jobs with a judge for those tasks that one can score. Raises RecipeError if there is none."""
    from dataclasses import replace

    from lapilli.base.errors import RecipeError
    from lapilli.evaluate.catalogue import judged_by
    from lapilli.evaluate.judge.items import has_reference
    from lapilli.evaluate.judge.options import JUDGE

    fit = [
        job.task.scorer == JUDGE or (job.task.scorer is None and all(map(has_reference, job.questions))) for job in jobs
    ]
    if not any(fit):
        named = ", ".join(f"{job.task.name} ({job.task.scorer or 'no reference answers'})" for job in jobs)
        raise RecipeError(f"--judge: a judge scores tasks without a scorer that have reference answers, not {named}")
    return [
        replace(job, task=judged_by(job.task, settings)) if yes else job for job, yes in zip(jobs, fit, strict=True)
    ]


def _say(jobs: Sequence[Job], limit: int | None) -> None:
    for job in jobs:
        pictures = len({image.path or image.data for question in job.asked for image in question.images})
        of = f" of {len(job.questions):,}, --limit {limit}" if len(job.asked) < len(job.questions) else ""
        judge = ", scored by a judge" if job.task.scorer == "judge" else ""
        typer.echo(f"{job.task.name}: {len(job.asked):,} questions{of}, {pictures:,} pictures{judge}", err=True)
    sys.stderr.flush()
