"""`lapilli launch`: start a run in several processes: here, as a SLURM job, or as a SkyPilot task."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Start a run in several processes: on this machine, as a SLURM job, or in a cloud.",
)

Recipe = Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values to set, as in train.learning_rate=1e-4.", metavar="A.B=VALUE")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be started, and start nothing.")]
Setup = Annotated[
    list[str] | None,
    typer.Option(help="Shell line to run first, as 'module load cuda'; may be given several times."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there and differs.")]


@app.command()
def slurm(
    recipe: Recipe,
    time: Annotated[str, typer.Option(help="Time limit, as SLURM writes it: 90, 24:00:00, 2-12.")],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    gpus_per_node: Annotated[
        str, typer.Option(help="Devices of each, one process for each: 8, or a100:8; 0: one process on CPUs.")
    ] = "1",
    processes_per_node: Annotated[
        int | None, typer.Option(help="For devices that SLURM does not count as GPUs; default: one for each GPU.")
    ] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    constraint: Annotated[str | None, typer.Option(help="Features that the machines must have.")] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option(help="CPUs of each process; default: one, and one for each of data.workers.")
    ] = None,
    mem: Annotated[str | None, typer.Option(help="Memory of each machine, as 200G.")] = None,
    job_name: Annotated[str | None, typer.Option(help="Default: the recipe's.")] = None,
    output: Annotated[str | None, typer.Option(help="Log file, with SLURM's %-letters; default: NAME-%j.log.")] = None,
    setup: Setup = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="Any other option of sbatch, as --sbatch=--mail-type=END; repeatable.")
    ] = None,
    save_seconds: Annotated[int, typer.Option(help="Seconds before the end at which the run is saved.")] = 300,
    script: Annotated[str | None, typer.Option(help="Batch script to write; default: NAME.sbatch.")] = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Write a batch script and submit it; a run that is preempted or out of time queues itself again and goes on."""
    from lapilli.launch.command import check_launch
    from lapilli.launch.slurm import Job, batch_script, command_is_missing, submit
    from lapilli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    name = job_name or _name(recipe)
    workers = max(stage.data.workers for stage in loaded.recipe.stages)
    job = Job(
        name=name,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        time=time,
        cpus_per_task=1 + workers if cpus_per_task is None else cpus_per_task,
        output=output or f"{name}-%j.log",
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        mem=mem,
        more=tuple(sbatch or ()),
        setup=tuple(setup or ()),
        processes_per_node=processes_per_node,
        save_seconds=save_seconds,
    )
    text = batch_script(job, recipe, overrides or [])
    notes = [*check_launch(loaded, job.nodes * job.tasks_per_node), *command_is_missing(job)]
    _note(notes)
    if dry_run:
        typer.echo(text, nl=False)
        return
    where = Path(script or f"{name}.sbatch")
    number = submit(text, where, job.output, replace=force)
    typer.echo(f"submitted {where} as job {number}; log: {job.output.replace('%j', number).replace('%x', name)}")
    typer.echo(f"scancel --signal=USR1 {number} saves it and queues it again; scancel {number} ends it")


@app.command()
def local(
    recipe: Recipe,
    overrides: Overrides = None,
    processes: Annotated[int | None, typer.Option(help="Default: one for each CUDA device.")] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="How often all start again, from the newest checkpoint, after one failed.")
    ] = 3,
    dry_run: DryRun = False,
) -> None:
    """Run in several processes of this machine, by torchrun; a signal to this command saves and stops the run."""
    from lapilli.launch.command import check_launch, shell
    from lapilli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if processes is not None:
        _note(check_launch(loaded, processes))

    import signal

    from lapilli.launch.local import default_processes, start, torchrun_words

    if processes is None:
        processes = default_processes()
        _note(check_launch(loaded, processes))
    words = torchrun_words(recipe, overrides or [], processes, restarts)
    if dry_run:
        typer.echo(f"torchrun {shell(words)}")
        return
    stopped_by = start(words)
    if stopped_by:
        raise typer.Exit(128 + signal.Signals[stopped_by])


@app.command()
def skypilot(
    recipe: Recipe,
    gpus: Annotated[str, typer.Option(help="Devices of each machine, as H100:8.")],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    spot: Annotated[bool, typer.Option("--spot", help="Cheaper machines that may be taken away.")] = False,
    infra: Annotated[
        str | None, typer.Option("--infra", "--cloud", help="Cloud, cloud/region or cloud/region/zone.")
    ] = None,
    disk: Annotated[int | None, typer.Option(help="Disk of each machine in GB.")] = None,
    workdir: Annotated[str, typer.Option(help="Folder that goes along, with the recipe inside.")] = ".",
    mount: Annotated[
        list[str] | None,
        typer.Option(help="A bucket or local folder there, as /runs=s3://bucket or /data=./data; repeatable."),
    ] = None,
    setup: Setup = None,
    restarts: Annotated[int, typer.Option(min=0, help="How often a run that fails by itself starts again.")] = 3,
    name: Annotated[str | None, typer.Option(help="Default: the recipe's.")] = None,
    out: Annotated[str | None, typer.Option(help="Task file to write; default: NAME.sky.yaml.")] = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Write a SkyPilot task file (checked against its schema only); `sky jobs launch FILE` starts it."""
    from lapilli.base import atomic
    from lapilli.base.errors import RunError
    from lapilli.launch.command import check_launch
    from lapilli.launch.skypilot import Task, task_yaml
    from lapilli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    name = name or _name(recipe)
    task = Task(
        name=name,
        gpus=gpus,
        nodes=nodes,
        spot=spot,
        infra=infra,
        disk_gb=disk,
        workdir=workdir,
        mounts=tuple(mount or ()),
        setup=tuple(setup or ("pip install lapilli",)),
        restarts=restarts,
    )
    text = task_yaml(task, loaded, overrides or [])
    _note(check_launch(loaded, task.processes, here=False))
    if dry_run:
        typer.echo(text, nl=False)
        return
    where = Path(out or f"{name}.sky.yaml")
    if not force and where.exists() and where.read_text(encoding="utf-8", errors="replace") != text:
        raise RunError(f"{where}: is there already and differs; give --force to replace it, or --out another name")
    atomic.atomic_write(where, text)
    typer.echo(f"wrote {where}; `sky jobs launch {where}` starts it")


def _name(recipe: str) -> str:
    return recipe.removesuffix(".yaml").removesuffix(".yml").rstrip("/").replace("/", "-").lstrip(".-")


def _note(notes: list[str]) -> None:
    for note in notes:
        typer.echo(f"note: {note}", err=True)
