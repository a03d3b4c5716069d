"""A run as a SLURM job: a batch script that a person can read and change, and its submission.

`srun` itself starts one process per device; there is no launcher inside it that would start as many again. Rank and
address come from SLURM's variables. Some minutes before the time limit, and where the cluster says so before a
preemption, SLURM sends SIGUSR1: the run saves and ends with a status of its own, upon which the script asks for the job
to be queued again.
"""

import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lapilli.base import atomic
from lapilli.base.errors import RecipeError, RunError
from lapilli.launch.command import SAVE_SECONDS, shell, train_words

SAVED = (128 + signal.SIGUSR1, 128 + signal.SIGTERM)
"""Exit status of a run that was asked to stop and is saved, and of one that was ended before its first step: by the
signal that the script asks for, or by the one that a cluster sends which preempts without regard to it."""
REQUEUES = 100
"""How often a job queues itself again; a run that never gets on must not do so for ever."""
_LAST_WORDS_SECONDS = 60
_TIMES = (
    (r"(\d+)", (60,)),
    (r"(\d+):(\d+)", (60, 1)),
    (r"(\d+):(\d+):(\d+)", (3600, 60, 1)),
    (r"(\d+)-(\d+)", (86400, 3600)),
    (r"(\d+)-(\d+):(\d+)", (86400, 3600, 60)),
    (r"(\d+)-(\d+):(\d+):(\d+)", (86400, 3600, 60, 1)),
)
"""SLURM's ways to write a time, and the seconds that each number counts."""


@dataclass(frozen=True)
class Job:
    """What is asked of SLURM. None: the cluster's own default."""

    name: str
    nodes: int
    gpus_per_node: str
    """As SLURM takes them: a number, or `type:number`; `0` for CPUs, or devices that SLURM calls otherwise."""
    time: str
    cpus_per_task: int
    output: str
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    mem: str | None = None
    processes_per_node: int | None = None
    """None: one for each GPU, or one."""
    more: tuple[str, ...] = ()
    """Further options of sbatch, as `--mail-type=END`."""
    setup: tuple[str, ...] = ()
    """Shell lines that come before the run, as `module load cuda`."""
    save_seconds: int = SAVE_SECONDS

    @property
    def tasks_per_node(self) -> int:
        return max(1, _gpus(self.gpus_per_node)) if self.processes_per_node is None else self.processes_per_node

    def options(self) -> list[str]:
        """The options of sbatch, one each. Raises RecipeError for values that SLURM could not carry out."""
        if self.nodes < 1:
            raise RecipeError(f"--nodes {self.nodes}: a job needs one at least")
        if self.cpus_per_task < 1:
            raise RecipeError(f"--cpus-per-task {self.cpus_per_task}: a process needs one at least")
        if self.tasks_per_node < 1:
            raise RecipeError(f"--processes-per-node {self.processes_per_node}: a run needs one at least")
        if seconds(self.time) <= self.save_seconds:
            raise RecipeError(
                f"--time {self.time} is not longer than the {self.save_seconds} seconds before its end in which the "
                "run is saved; ask for more, or give --save-seconds"
            )
        named = {
            "job-name": self.name,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks_per_node,
            "gpus-per-node": self.gpus_per_node if _gpus(self.gpus_per_node) else None,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.mem,
            "time": self.time,
            "output": self.output,
            "open-mode": "append",
            "signal": f"USR1@{self.save_seconds}",
        }
        options = [f"--{name}={value}" for name, value in named.items() if value is not None]
        options += ["--requeue", *self.more]
        for option in options:
            if not re.fullmatch(r"--?[A-Za-z][^\n]*", option):
                raise RecipeError(f'"{option}" is no option of sbatch; they look like --mail-type=END')
        # sbatch splits these lines at spaces, as a shell would.
        return [
            name if not value else f"{name}={_quoted(value)}" for name, _, value in (o.partition("=") for o in options)
        ]


def seconds(time: str) -> int:
    """SLURM's time, as `90`, `30:00`, `24:00:00`, `2-12` or `2-12:30:00`, in seconds. Raises RecipeError."""
    for form, units in _TIMES:
        found = re.fullmatch(form, time)
        if found:
            return sum(int(number) * unit for number, unit in zip(found.groups(), units, strict=True))
    raise RecipeError(
        f'--time "{time}": SLURM takes minutes, hours:minutes:seconds or days-hours, as 90, 24:00:00, 2-12'
    )


def _gpus(given: str) -> int:
    found = re.fullmatch(r"(?:[\w.\-]+:)?(\d+)", given)
    if not found:
        raise RecipeError(f'--gpus-per-node "{given}": a number, or type:number as SLURM takes it, as 8 or a100:8')
    return int(found.group(1))


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[^\s'\"\\$`]+", value) else shlex.quote(value)


def batch_script(job: Job, recipe: str, overrides: Sequence[str]) -> str:
    """The whole batch script. Raises RecipeError for a job that SLURM could not carry out."""
    header = "\n".join(f"#SBATCH {option}" for option in job.options())
    setup = "".join(f"{line}\n" for line in job.setup)
    words = shell(["lapilli", *train_words(recipe, overrides)])
    saved, terminated = SAVED
    return f"""\
#!/bin/bash
# {job.name}: written by `lapilli launch slurm`. Change what you like; submit again, from this folder, with `sbatch`.
{header}

set -e
cancelled=
trap 'cancelled=yes' TERM
{setup}
# One process per device. Each finds its rank and the address of the first one in SLURM's variables. If one ends, the
# others have {_LAST_WORDS_SECONDS} seconds to end by themselves and say why.
status=0
srun --cpus-per-task={job.cpus_per_task} --kill-on-bad-exit=0 --wait={_LAST_WORDS_SECONDS} \\
  {words} || status=$?

# {saved} is 128 + SIGUSR1, {terminated} 128 + SIGTERM: the time is nearly up or the nodes are wanted, and all is saved.
# Queued again, the run goes on from there; but not if it was cancelled, which SLURM tells this script too.
asked=
if [[ $status == {saved} || $status == {terminated} ]]; then asked=yes; fi
if [[ $asked && ! $cancelled && ${{SLURM_RESTART_COUNT:-0}} -lt {REQUEUES} ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def command_is_missing(job: Job) -> list[str]:
    """A note if neither this environment nor the set-up lines can bring `lapilli` along; sbatch hands PATH on."""
    if job.setup or shutil.which("lapilli"):
        return []
    return ["lapilli is not on PATH, which the job takes over; activate its environment first, or in a line of --setup"]


def submit(text: str, script: Path, output: str, *, replace: bool = False) -> str:
    """Write the batch script and submit it; return the number that SLURM gave the job.

    Raises RunError without sbatch, for a script that is there already and differs, for a folder of the log that is not
    there, and with sbatch's own words for what it refuses.
    """
    if shutil.which("sbatch") is None:
        raise RunError("sbatch is not here: submit from a login node of the cluster, or print the script: --dry-run")
    if not replace and script.exists() and script.read_text(encoding="utf-8", errors="replace") != text:
        raise RunError(f"{script}: is there already and differs; give --force to replace it, or --script another name")
    folder = Path(output).parent
    if "%" not in str(folder) and not folder.is_dir():
        raise RunError(
            f"--output {output}: {folder} is no folder; SLURM would end the job without a word. Make it first"
        )
    atomic.atomic_write(script, text)
    made = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if made.returncode:
        raise RunError(f"{script}: sbatch refuses it: {made.stderr.strip() or made.returncode}")
    return made.stdout.strip().partition(";")[0]
