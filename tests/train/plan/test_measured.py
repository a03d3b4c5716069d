"""Planned and measured peaks of real runs, each in a process of its own; none of them had a part in the fit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "plan.py"


@pytest.mark.slow
def test_plans_are_within_15_percent_of_what_runs_take(tmp_path):
    ways = ["two samples", "two samples, checkpointing", "two micro-batches"]
    command = [sys.executable, str(BENCHMARK), "--work", str(tmp_path), "--only", *ways]
    made = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
    errors = [float(found) for found in re.findall(r"([+-][\d.]+)%", made.stdout)]
    assert len(errors) == len(ways)
    assert all(abs(error) <= 15 for error in errors), made.stdout
