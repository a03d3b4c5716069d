"""Several processes of this machine: one that dies brings all back, a signal to the launcher saves and stops them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.proc import children
from tests.train.test_parallel import assert_learned_the_same
from typer.testing import CliRunner

from lapilli.cli.launch import app
from lapilli.launch.local import torchrun_words
from lapilli.train.metrics import read_metrics


def test_what_torchrun_is_told(write_recipe):
    path = write_recipe()
    words = ["launch", "local", path, "train.epochs=2", "--processes", "2", "--restarts", "1", "--dry-run"]
    made = CliRunner().invoke(app, words[1:])
    assert made.exit_code == 0, made.output
    line = made.stdout.splitlines()[-1]
    assert line == "torchrun " + " ".join(torchrun_words(path, ["train.epochs=2"], 2, 1))
    assert line.endswith(f"-m lapilli.cli train {path} train.epochs=2 --resume auto")
    assert "--max-restarts 1 " in line
    assert re.search(r"--signals-to-handle \S*SIGUSR1", line)
    assert "train.save_every is not set" in made.stderr


@pytest.mark.slow
def test_a_killed_process_brings_all_back_and_a_signal_stops_all(workshop):
    out, said = workshop.folder / "local", workshop.folder / "local.log"
    metrics = out / "metrics.jsonl"
    with said.open("w") as log:
        launcher = _start(workshop.recipe, out, log, "--restarts", "1")
        try:
            _wait_for_steps(metrics, 12, said)
            os.kill(_worker(launcher.pid, rank=1), signal.SIGKILL)
            # More steps than the killed processes can have done: the restarted ones are at work.
            _wait_for_steps(metrics, 40, said, after=lambda: "going on after step" in said.read_text())
            launcher.terminate()
            began = time.monotonic()
            assert launcher.wait(timeout=60) == 128 + signal.SIGTERM, said.read_text()
            assert time.monotonic() - began < 30
        finally:
            launcher.kill()
        text = said.read_text()
        assert re.search(r"going on after step \d+", text)
        stopped = re.search(r"stopped by SIGTERM after step (\d+)", text)
        assert stopped is not None, text
        assert len(read_metrics(metrics)) == int(stopped[1]) < 150
        assert _start(workshop.recipe, out, log).wait(timeout=200) == 0, said.read_text()
    assert f"going on after step {stopped[1]}" in said.read_text()
    assert_learned_the_same(workshop.alone, out)


@pytest.mark.slow
def test_a_run_that_can_not_start_says_so_once_more_at_the_end(workshop):
    (workshop.folder / "empty").mkdir(exist_ok=True)
    said = workshop.folder / "empty.log"
    with said.open("w") as log:
        launcher = _start(workshop.recipe, workshop.folder / "never", log, "model=empty", "--restarts", "0")
        assert launcher.wait(timeout=120) == 1
    text = said.read_text()
    assert re.search(r"error: .*empty", text)
    assert re.search(r"error: process \d ended with status 1, and no restart is left", text)
    assert "Traceback" not in text


def _start(recipe, out, log, *more) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "lapilli.cli", "launch", "local", recipe, f"out={out}", "--processes", "2", *more]
    return subprocess.Popen(words, stdout=log, stderr=log, cwd=Path(recipe).parent)


def _worker(launcher: int, rank: int) -> int:
    """The number of the process of that rank among a launcher's children."""
    for child in children(launcher):
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return child
    raise AssertionError(f"no process of rank {rank}")


def _wait_for_steps(metrics: Path, steps: int, said: Path, after=lambda: True) -> None:
    end = time.monotonic() + 150
    while not (after() and metrics.exists() and metrics.read_text().count("\n") >= steps):
        assert time.monotonic() < end, said.read_text()[-6000:]
        time.sleep(0.1)
