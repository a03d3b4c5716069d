"""Trackers, each with its real package: what was sent is read back, and none of them can end a run."""

import sqlite3
from pathlib import Path

import pytest
from tests.support.runs import train_alone

from lapilli.base.errors import RunError
from lapilli.recipe.schema import Run, Stage
from lapilli.train import trackers as room
from lapilli.train.metrics import read_metrics
from lapilli.train.trackers import Trackers, check_trackers


def stage(*names: str) -> Stage:
    return Stage(name="align", out="run", run=Run(trackers=names))


def row(step: int, **more):
    return {"step": step, "loss": 2.0 / step, "grad_norm": 1.0, "tokens": 100, "seconds": 0.5, **more}


def scalars(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)} if name in events.Tags()["scalars"] else {}


def test_tensorboard_gets_the_run_and_not_what_was_lost(tmp_path):
    said: list[str] = []
    first = Trackers(stage("tensorboard"), tmp_path, 0, said.append)
    for step in range(1, 5):
        first.log(row(step))
    first.close()
    again = Trackers(stage("tensorboard"), tmp_path, 2, said.append)
    again.log(row(3, loss=9.0, validation_loss=1.5, evaluation={"pope": 80.0, "gqa": None}, grad_norm=float("nan")))
    again.close()
    assert scalars(tmp_path / "tensorboard", "loss") == pytest.approx({1: 2.0, 2: 1.0, 3: 9.0})
    assert scalars(tmp_path / "tensorboard", "validation_loss") == {3: 1.5}
    assert scalars(tmp_path / "tensorboard", "evaluation/pope") == {3: 80.0}
    assert scalars(tmp_path / "tensorboard", "evaluation/gqa") == {}
    assert scalars(tmp_path / "tensorboard", "tokens_per_second")[1] == 200.0
    assert sorted(scalars(tmp_path / "tensorboard", "grad_norm")) == [1, 2]
    assert said == []


def test_a_run_sends_what_stands_in_its_metrics(recipe_file):
    folder = train_alone(recipe_file(), "run.trackers=[tensorboard]", "data.validation=held-out.json")
    rows = read_metrics(folder / "metrics.jsonl")
    assert scalars(folder / "tensorboard", "loss") == pytest.approx({r["step"]: r["loss"] for r in rows})
    assert scalars(folder / "tensorboard", "validation_loss") == pytest.approx({4: rows[-1]["validation_loss"]})


def two_parts(name, folder):
    """A run's folder, where it was stopped after two steps and went on for two more; its name for trackers."""
    folder.mkdir()
    for done in (0, 2):
        opened = Trackers(stage(name), folder, done, pytest.fail)
        for step in (done + 1, done + 2):
            opened.log(row(step))
        opened.close()
    return room._identity(folder)


@pytest.mark.slow
def test_wandb_offline_keeps_the_run_when_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    identity = two_parts("wandb", tmp_path / "run")
    written = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(written) == 2
    assert all(name.name.endswith(f"-{identity}") for name in written)
    assert all(next(name.glob("*.wandb")).stat().st_size > 0 for name in written)


@pytest.mark.slow
def test_trackio_keeps_the_run_when_it_goes_on(tmp_path, monkeypatch):
    pytest.importorskip(
        "trackio", reason="trackio asks for Pillow below 13, so it is not in `dev`: pip install trackio"
    )
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    identity = two_parts("trackio", tmp_path / "run")
    (base,) = [file for file in tmp_path.rglob("*.db") if "lapilli" in file.name]
    with sqlite3.connect(base) as opened_base:
        found = opened_base.execute("select run_name, step from metrics order by step").fetchall()
    assert found == [(f"run-{identity}", step) for step in (1, 2, 3, 4)]


def test_a_tracker_that_fails_is_said_once_and_counted(tmp_path):
    said: list[str] = []
    opened = Trackers(stage("tensorboard"), tmp_path, 0, said.append)

    class Broken:
        errors = (ValueError,)

        def log(self, step, numbers):
            raise OSError("no route to host\nmore") if step < 3 else ValueError("odd")

        def close(self):
            raise OSError("gone")

    opened._open["broken"] = Broken()
    for step in (1, 2, 3):
        opened.log(row(step))
    opened.close()
    assert opened.failed == {"broken": 3}
    assert said == [
        "broken failed at step 1 and may miss numbers from now on: no route to host",
        "broken could not be closed: gone",
        "broken did not get 3 steps; metrics.jsonl has all of them",
    ]
    assert sorted(scalars(tmp_path / "tensorboard", "loss")) == [1, 2, 3]


def test_a_missing_package_is_told_before_anything_else(monkeypatch, recipe_file):
    monkeypatch.setattr(room, "find_spec", lambda _name: None)
    with pytest.raises(RunError, match=r"run\.trackers: wandb not installed: pip install wandb"):
        check_trackers(["wandb"])
    with pytest.raises(RunError, match="tensorboard not installed"):
        train_alone(recipe_file(), "run.trackers=[tensorboard]", "model=no-such-model")
