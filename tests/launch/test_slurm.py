"""The batch script, line by line; and a real SLURM that runs it, takes its nodes away, and gives them back."""

import os
import re
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.slurm import two_nodes, why_not
from tests.train.test_parallel import assert_learned_the_same
from typer.testing import CliRunner

from lapilli.base.errors import LapilliError, RecipeError, RunError
from lapilli.cli.launch import app
from lapilli.launch.slurm import Job, batch_script, seconds, submit
from lapilli.train.metrics import read_metrics

JOB = Job("align", nodes=2, gpus_per_node="a100:8", time="24:00:00", cpus_per_task=3, output="logs/%x-%j.log")

HEADER = """\
#SBATCH --job-name=align
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=a100:8
#SBATCH --cpus-per-task=3
#SBATCH --time=24:00:00
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --requeue
"""


def test_the_script_starts_one_process_per_device_and_says_nothing_of_this_machine():
    text = batch_script(JOB, "align.yaml", ["out=/scratch/a b"])
    assert HEADER in text
    (run,) = re.findall(r"^srun .*\\\n.*$", text, re.MULTILINE)
    assert run.split() == [
        "srun", "--cpus-per-task=3", "--kill-on-bad-exit=0", "--wait=60", "\\",
        "lapilli", "train", "align.yaml", "'out=/scratch/a", "b'", "--resume", "auto", "||", "status=$?",
    ]  # fmt: skip
    assert "torchrun" not in text
    assert not re.search(r"/home|/root|/tmp|/usr", text)
    more = replace(JOB, partition="gpu", account="lab", qos="long", constraint="ib", mem="200G")
    more = replace(more, more=("--mail-type=END",), setup=("module load cuda",))
    text = batch_script(more, "align.yaml", [])
    for option in ("partition=gpu", "account=lab", "qos=long", "constraint=ib", "mem=200G", "mail-type=END"):
        assert f"#SBATCH --{option}\n" in text
    assert text.index("trap") < text.index("module load cuda") < text.index("srun")
    text = batch_script(replace(JOB, gpus_per_node="0", processes_per_node=8), "align.yaml", [])
    assert "gpus" not in text
    assert "#SBATCH --ntasks-per-node=8\n" in text
    assert "#SBATCH --ntasks-per-node=1\n" in batch_script(replace(JOB, gpus_per_node="0"), "align.yaml", [])


@pytest.mark.parametrize(
    ("status", "cancelled", "restarts", "again"),
    [
        (138, False, 0, True),
        (143, False, 5, True),
        (143, True, 0, False),
        (138, False, 100, False),
        (1, False, 0, False),
        (0, False, 0, False),
    ],
)
def test_the_script_asks_for_another_start_only_of_a_run_that_was_asked_to_stop(
    tmp_path, status, cancelled, restarts, again
):
    """The script itself is run, with an srun and an scontrol that note what they are asked."""
    tell = "kill -TERM $PPID; sleep 0.1" if cancelled else ":"
    for name, does in (("srun", f"{tell}; exit {status}"), ("scontrol", 'echo "$@" >> asked')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job").write_text(batch_script(JOB, "align.yaml", []))
    environment = {"PATH": f"{tmp_path}:/bin:/usr/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    made = subprocess.run(["bash", "job"], cwd=tmp_path, env=environment, check=False)
    assert made.returncode == status
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if again else "")


def test_times_as_slurm_writes_them():
    given = {"90": 5400, "30:15": 1815, "24:00:00": 86_400, "2-12": 216_000, "2-12:30": 217_800, "1-0:0:9": 86_409}
    assert {time: seconds(time) for time in given} == given
    for wrong in ("", "2 hours", "1:2:3:4", "-5"):
        with pytest.raises(RecipeError, match="SLURM takes minutes"):
            seconds(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": "5"}, "--time 5 is not longer than the 300 seconds"),
        ({"nodes": 0}, "--nodes 0"),
        ({"gpus_per_node": "a100"}, "a number, or type:number"),
        ({"processes_per_node": 0}, "--processes-per-node 0"),
        ({"cpus_per_task": 0}, "--cpus-per-task 0"),
        ({"more": ("END",)}, '"END" is no option of sbatch'),
        ({"partition": "a\n#SBATCH --wrap=x"}, "is no option of sbatch"),
    ],
)
def test_a_job_that_slurm_could_not_carry_out_is_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        batch_script(replace(JOB, **change), "align.yaml", [])


def test_a_recipe_is_checked_before_it_waits_in_a_queue(write_recipe):
    recipe, words = write_recipe(), ["--time", "60", "--dry-run"]
    run = CliRunner().invoke
    assert run(app, ["slurm", recipe, *words]).exit_code == 0
    for override, message in {
        "train.lerning_rate=1": 'unknown key .did you mean "learning_rate"',
        "data.train=nowhere.json": "nowhere.json: no such file",
        "model=nowhere": "nowhere: no such model folder",
        "run.engine=single": "single is for one process, but 4 would be started",
    }.items():
        made = run(app, ["slurm", recipe, override, "--nodes", "2", "--gpus-per-node", "2", *words])
        with pytest.raises(LapilliError, match=message):
            raise made.exception or AssertionError(made.output)


def test_a_batch_script_is_written_without_torch(write_recipe):
    words = ["launch", "slurm", write_recipe(), "--time", "60", "--dry-run"]
    code = (
        f"import sys; from lapilli.cli.main import app; app({words}, standalone_mode=False); print(sorted(sys.modules))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "#SBATCH" in made.stdout
    assert "'torch'" not in made.stdout


def test_a_job_is_submitted_once_its_script_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    script = tmp_path / "align.sbatch"
    with pytest.raises(RunError, match=r"sbatch is not here: submit .* print the script: --dry-run"):
        submit("#!/bin/bash\n", script, "%j.log")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (tmp_path / "sbatch").write_text('#!/bin/bash\n[ -s "$2" ] && echo "4711;cluster" && cp "$2" sent\n')
    (tmp_path / "sbatch").chmod(0o755)
    assert submit("#!/bin/bash\n", script, "%j.log") == "4711"
    assert (tmp_path / "sent").read_text() == script.read_text() == "#!/bin/bash\n"
    with pytest.raises(RunError, match="is there already and differs"):
        submit("#!/bin/sh\n", script, "%j.log")
    assert submit("#!/bin/sh\n", script, "%j.log", replace=True) == "4711"
    with pytest.raises(RunError, match="logs is no folder"):
        submit("#!/bin/sh\n", script, "logs/%j.log")
    (tmp_path / "sbatch").write_text('#!/bin/bash\necho "invalid partition: gpus" >&2; exit 1\n')
    with pytest.raises(RunError, match="sbatch refuses it: invalid partition: gpus"):
        submit("#!/bin/sh\n", script, "%j.log")


@pytest.mark.slow
def test_a_preempted_job_goes_on_and_learns_what_an_uninterrupted_run_does(workshop, tmp_path_factory, monkeypatch):
    if reason := why_not():
        warnings.warn(reason, stacklevel=1)  # a skip alone is only a letter in pytest's output
        pytest.skip(reason)
    monkeypatch.chdir(workshop.folder)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    out, lapilli = workshop.folder / "slurm", [sys.executable, "-m", "lapilli.cli"]
    asked = ["--nodes", "2", "--gpus-per-node", "0", "--time", "10", "--cpus-per-task", "1", "--job-name", "tiny"]
    # Names of these nodes are SLURM's own; on a cluster they are the machines'.
    asked += ["--setup", "export MASTER_ADDR=127.0.0.1", "--setup", "export OMP_NUM_THREADS=1"]
    with two_nodes(tmp_path_factory.mktemp("slurm")) as slurm:
        made = subprocess.run(
            [*lapilli, "launch", "slurm", "recipe.yaml", f"out={out}", *asked],
            env=slurm.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        number = re.search(r"as job (\d+); log: tiny-\1.log", made.stdout)
        assert number is not None, made.stdout
        log = workshop.folder / f"tiny-{number[1]}.log"
        _wait_for_steps(out, 10, log)
        urgent = slurm.ask("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "--wrap=sleep 1").strip()
        slurm.wait(urgent, {"COMPLETED"}, 150)
        stopped = len(read_metrics(out / "metrics.jsonl"))
        assert 10 <= stopped < 150
        job = slurm.wait(number[1], {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}, 300)
        said = log.read_text()
        assert job["JobState"] == "COMPLETED", said
        assert job["Restarts"] == "1"
    assert f"stopped by SIGUSR1 after step {stopped}" in said
    assert f"going on after step {stopped}" in said
    assert "2 processes (ddp)" in said
    assert_learned_the_same(workshop.alone, out)


def _wait_for_steps(out: Path, steps: int, log: Path) -> None:
    end = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert time.monotonic() < end, log.read_text() if log.exists() else "the job never began"
        time.sleep(0.1)
