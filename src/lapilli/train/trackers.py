"""Services that draw a run's curves beside its own `metrics.jsonl`: TensorBoard, Weights & Biases, trackio.

Each is a small class behind one door, its package is imported when it is asked for, and only the first process of a run
has any. A run that goes on has the same name and id in all of them. `metrics.jsonl` is what counts: a tracker that
fails is said once and counted, and the run goes on without it.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from lapilli.base.atomic import write_json
from lapilli.base.errors import RunError
from lapilli.recipe.schema import Stage

IDENTITY = "trackers.json"
"""In the run folder: the id that the run has in every tracker."""


class Tracker(Protocol):
    """One service. `errors` are what its calls raise when it fails, beside OSError."""

    errors: tuple[type[Exception], ...]

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class TensorBoard:
    """Event files in `tensorboard/` of the run folder. Steps that were lost are purged by their files' readers."""

    errors: tuple[type[Exception], ...] = (RuntimeError, ValueError)

    def __init__(self, stage: Stage, folder: Path, identity: str, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases, on line or with `WANDB_MODE=offline`; the project is `WANDB_PROJECT`, else `lapilli`."""

    def __init__(self, stage: Stage, folder: Path, identity: str, done: int) -> None:
        import wandb
        from wandb.errors import Error

        self.errors: tuple[type[Exception], ...] = (Error, ValueError)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lapilli"),
            name=folder.name,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=stage.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # By our own step, so that steps that are done again after a crash do not count as late ones.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Hugging Face's trackio, on this machine; the project is `TRACKIO_PROJECT`, else `lapilli`."""

    errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, sqlite3.Error)

    def __init__(self, stage: Stage, folder: Path, identity: str, done: int) -> None:
        from contextlib import redirect_stdout
        from io import StringIO

        import trackio  # pyright: ignore[reportMissingImports] - an extra that `dev` does without: it holds Pillow below 13

        with redirect_stdout(StringIO()):  # it explains how its page is opened
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "lapilli"),
                name=f"{folder.name}-{identity}",
                config=stage.model_dump(mode="json"),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


KNOWN: dict[str, Callable[[Stage, Path, str, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise RunError, with the command that installs it, for a tracker whose package is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise RunError(
            f"run.trackers: {', '.join(missing)} not installed: pip install {' '.join(missing)}, or leave it out"
        )


class Trackers:
    """All trackers of a run. `failed` counts the steps that each of them did not get."""

    def __init__(self, stage: Stage, folder: Path, done: int, say: Callable[[str], None]) -> None:
        """Open them. Raises RunError for one that can't be opened, before the first step."""
        self._say = say
        self._open: dict[str, Tracker] = {}
        self.failed: dict[str, int] = {}
        identity = _identity(folder) if stage.run.trackers else ""
        for name in dict.fromkeys(stage.run.trackers):
            try:
                self._open[name] = KNOWN[name](stage, folder, identity, done)
            except (OSError, RuntimeError, ValueError, *_own_errors(name)) as error:
                self.close()
                raise RunError(f"run.trackers: {name} can't be opened: {_line(error)}") from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Send a row of `metrics.jsonl`. One that fails is said the first time, and counted."""
        numbers = _numbers(row)
        for name, tracker in self._open.items():
            try:
                tracker.log(row["step"], numbers)
            except (OSError, *tracker.errors) as error:
                if name not in self.failed:
                    self._say(f"{name} failed at step {row['step']} and may miss numbers from now on: {_line(error)}")
                self.failed[name] = self.failed.get(name, 0) + 1

    def close(self) -> None:
        """Let them send what is left."""
        for name, tracker in self._open.items():
            try:
                tracker.close()
            except (OSError, *tracker.errors) as error:
                self._say(f"{name} could not be closed: {_line(error)}")
        for name, steps in self.failed.items():
            self._say(f"{name} did not get {steps:,} steps; metrics.jsonl has all of them")
        self._open = {}


def _own_errors(name: str) -> tuple[type[Exception], ...]:
    if name != "wandb":
        return ()
    from wandb.errors import Error

    return (Error,)


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _identity(folder: Path) -> str:
    """The run's id, drawn when it begins."""
    file = folder / IDENTITY
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["id"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        drawn = uuid.uuid4().hex[:12]
        write_json(file, {"id": drawn})
        return drawn


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's finite numbers, with tokens per second and `evaluation/TASK` for scores."""
    flat = {name: value for name, value in row.items() if name != "step"}
    flat |= {f"evaluation/{task}": score for task, score in flat.pop("evaluation", {}).items()}
    if row.get("seconds"):
        flat["tokens_per_second"] = row["tokens"] / row["seconds"]
    return {name: float(value) for name, value in flat.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
