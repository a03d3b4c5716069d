"""The batch script, line by line; and a real SLURM that runs it, takes its nodes away, and gives them back."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.slurm import two_nodes, why_not
from tests.train.test_parallel import assert_learned_the_same

from lapilli.launch.slurm import Job
from lapilli.train.metrics import read_metrics

JOB = Job("align", nodes=2, gpus_per_node="a100:8", time="24:00:00", cpus_per_task=3, output="logs/%x-%j.log")


@pytest.mark.slow
def test_a_preempted_job_goes_on_and_learns_what_an_uninterrupted_run_does(workshop, tmp_path_factory, monkeypatch):
    if reason := why_not():
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
        slurm.wait(urgent, {"COMPLETED"}, 90)
        stopped = len(read_metrics(out / "metrics.jsonl"))
        assert 10 <= stopped < 150
        job = slurm.wait(number[1], {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}, 180)
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
