"""A packed multimodal run that is killed at any moment goes on as if nothing had happened, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lapilli.base import atomic
from lapilli.train.metrics import read_metrics
from lapilli.train.state import complete_checkpoints

COMMON = [
    "train.epochs=6", "train.save_every=1", "data.workers=1", "train.average_decay=0.9", "train.export=average",
    "train.lora={r: 4, dropout: 0.2}", "train.freeze=full", "data.validation=held-out.json", "train.validate_every=7",
    "train.keep_best=1", "train.keep_checkpoints=2",
]  # fmt: skip
"""Everything that a checkpoint must bring back: dropout's random state, a moving average, the best one so far."""


def start(path, folder, *more):
    command = [sys.executable, "-m", "lapilli.cli", "train", path, f"out={folder}", *COMMON, *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def steps_of(folder):
    return len(read_metrics(folder / "metrics.jsonl"))


def drafts(folder):
    """Checkpoints that are being written at this moment."""
    place = folder / "checkpoints"
    return [p for p in place.iterdir() if ".tmp-" in p.name] if place.is_dir() else []


def kill_at_random(process, folder, rng):
    """Let the run get a few steps on, and kill it with its workers, every other time in the middle of a save."""
    saving = rng.random() < 0.5
    after = steps_of(folder) + rng.randint(0, 2)
    while process.poll() is None and not (steps_of(folder) > after and (drafts(folder) or not saving)):
        time.sleep(0.001)
    time.sleep(0 if saving else rng.random() * 0.1)
    killed_in_save = bool(drafts(folder))
    with suppress(ProcessLookupError):  # it may be through
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return killed_in_save


def learned(folder):
    keys = ("step", "loss", "grad_norm", "learning_rate", "validation_loss", "supervised_tokens")
    return [tuple(row.get(key) for key in keys) for row in read_metrics(folder / "metrics.jsonl")]


def tensors(folder):
    return {
        (file.parent.name, name): tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same(one: Path, two: Path):
    assert learned(one) == learned(two)
    for part in ("model", f"checkpoints/{complete_checkpoints(one / 'checkpoints')[-1].name}"):
        a, b = tensors(one / part), tensors(two / part)
        assert a.keys() == b.keys()
        assert a
        for name, tensor in a.items():
            assert torch.equal(tensor, b[name]), (part, name)
    best = [json.loads((folder / "checkpoints/best.json").read_text()) for folder in (one, two)]
    assert best[0] == best[1]


def survive(path, tmp_path, kills, seed):
    whole = start(path, tmp_path / "whole")
    output, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, output
    rng, killed, in_saves, folders = random.Random(seed), 0, 0, []
    while killed < kills:
        folder = tmp_path / f"killed-{len(folders)}"
        folders.append(folder)
        for _ in range(kills - killed):
            process = start(path, folder)
            in_save = kill_at_random(process, folder, rng)
            if process.returncode == 0:
                break  # it was through before it was killed: another folder
            killed, in_saves = killed + 1, in_saves + in_save
            for one in complete_checkpoints(folder / "checkpoints"):
                assert (one / atomic.MARKER).is_file()
        if not (folder / "model").is_dir():
            rest = start(path, folder)
            output, _ = rest.communicate(timeout=600)
            assert rest.returncode == 0, output
        assert not drafts(folder)
        assert_same(tmp_path / "whole", folder)
    return killed, in_saves


@pytest.mark.slow
def test_killed_at_some_moments(recipe_file, tmp_path):
    """Three of them; `make soak` has thirty."""
    killed, _ = survive(recipe_file(), tmp_path, 3, seed=1)
    assert killed == 3


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_at_thirty_random_moments(recipe_file, tmp_path):
    killed, in_saves = survive(recipe_file(), tmp_path, 30, seed=0)
    assert killed == 30
    assert in_saves >= 5, "too few of them in the middle of a save"


@pytest.mark.slow
def test_a_polite_end_takes_less_than_thirty_seconds(recipe_file, tmp_path):
    """SIGTERM to the process alone, as SLURM's batch script gets it."""
    process = start(recipe_file(), tmp_path / "run", "train.save_every=null")
    while process.poll() is None and steps_of(tmp_path / "run") < 3:
        time.sleep(0.01)
    began = time.monotonic()
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode == 128 + signal.SIGTERM, output
    (saved,) = complete_checkpoints(tmp_path / "run/checkpoints")
    assert int(saved.name.removeprefix("step-")) == steps_of(tmp_path / "run")
    assert not drafts(tmp_path / "run")
