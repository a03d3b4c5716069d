"""`metrics.jsonl`: one JSON object per optimiser step, each step once, whatever happened to the run."""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from lapilli.base.errors import RunError
from lapilli.train.trackers import Trackers


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the steps written so far; a last line that a crash cut short is left out.

    Raises RunError for any other line that is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise RunError(f"{path}: line {number} is not JSON: {error}") from error
    return rows


class MetricsFile:
    """Appends steps to `metrics.jsonl`, and sends them to the run's trackers, which are closed with it.

    Lines after `resumed_step` are of work that was lost and are cut off.
    """

    def __init__(self, path: Path, resumed_step: int, trackers: Trackers | None = None) -> None:
        self._path, self._trackers = path, trackers
        self._rewrite([row for row in read_metrics(path) if row["step"] <= resumed_step])
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        """Write a step's numbers; what is not finite becomes null, which other readers of JSON understand."""
        self._file.write(json.dumps(_finite(row)) + "\n")
        self._file.flush()
        if self._trackers is not None:
            self._trackers.log(row)

    def amend(self, step: int, more: dict[str, Any]) -> None:
        """Add to the last line, if that is the step's, what was found out about the step by a run that went on."""
        rows = read_metrics(self._path)
        if not more or not rows or rows[-1]["step"] != step:
            return
        self._file.close()
        self._rewrite([*rows[:-1], rows[-1] | _finite(more)])
        self._file = self._path.open("a", encoding="utf-8")
        if self._trackers is not None:
            self._trackers.log({"step": step, **more})

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        aside = self._path.with_suffix(".jsonl.partial")
        aside.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        os.replace(aside, self._path)

    def make_durable(self) -> None:
        """Have the disk hold every line; done before each checkpoint, which must not be ahead of its metrics."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._trackers is not None:
            self._trackers.close()


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
