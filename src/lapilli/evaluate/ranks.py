"""Several processes, started by `torchrun`, answer one task: each its share of the pictures, in a file of its own.

Nothing is sent between them. Who answers what follows from the questions and the number of processes alone; when a
process has finished it leaves a marker, and rank 0 waits for those of the others and gathers the answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lapilli.base.atomic import write_json
from lapilli.base.errors import RunError
from lapilli.base.progress import duration
from lapilli.evaluate.task import Question

WAIT_SECONDS = 1800.0
"""How long rank 0 waits for a process that adds no answer; loading a model from a slow disk is shorter than that."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `world` processes. `local` is its number on this machine, `run` what tells this start from an earlier."""

    rank: int = 0
    world: int = 1
    local: int = 0
    run: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Rank:
        """What torchrun says in the environment; one process where it says nothing. Raises RunError for nonsense."""
        numbers: dict[str, int] = {}
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
            text = environment.get(name, str(default))
            if not text.isdecimal():
                raise RunError(f'environment: {name}="{text}" must be a whole number')
            numbers[name] = int(text)
        if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
            raise RunError(f"environment: RANK={numbers['RANK']} with WORLD_SIZE={numbers['WORLD_SIZE']}")
        parts = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
        run = ":".join(environment.get(name, "") for name in parts)
        return cls(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], run)

    @property
    def answers(self) -> str:
        """Name of this process's answers file."""
        return "answers.jsonl" if self.world == 1 else f"answers-{_of(self.rank, self.world)}.jsonl"

    def share(self, groups: Sequence[Sequence[Question]]) -> list[Sequence[Question]]:
        """This process's groups: neighbours, about as many questions for each process."""
        total = sum(map(len, groups))
        mine: list[Sequence[Question]] = []
        before = 0
        for group in groups:
            middle = before + len(group) / 2
            if min(self.world - 1, int(middle * self.world / total)) == self.rank:
                mine.append(group)
            before += len(group)
        return mine

    def begin(self, folder: Path) -> None:
        """Take away the marker of an earlier start."""
        if self.world > 1:
            _marker(folder, self.rank, self.world).unlink(missing_ok=True)

    def finish(self, folder: Path, missing: Mapping[str, str]) -> None:
        """Leave the marker: every question of this process has an answer, or a reason in `missing`."""
        if self.world > 1:
            write_json(_marker(folder, self.rank, self.world), {"run": self.run, "missing": dict(missing)})

    def gather(self, folder: Path, stopped: Callable[[], bool], wait_seconds: float = WAIT_SECONDS) -> dict[str, str]:
        """Wait for the other processes; return their questions without an answer, with the reasons.

        Raises RunError naming the processes that added nothing for `wait_seconds`.
        """
        missing: dict[str, str] = {}
        waiting = {rank for rank in range(self.world) if rank != self.rank}
        sizes: dict[int, int] = {}
        since = time.monotonic()
        while waiting:
            for rank in sorted(waiting):
                found = self._finished(folder, rank)
                if found is not None:
                    missing |= found
                    waiting.discard(rank)
            grown = {rank: _size(folder / f"answers-{_of(rank, self.world)}.jsonl") for rank in waiting}
            if grown != sizes:
                sizes, since = grown, time.monotonic()
            elif time.monotonic() - since > wait_seconds:
                named = ", ".join(str(rank) for rank in sorted(waiting))
                raise RunError(
                    f"{folder}: no sign of rank {named} for {duration(wait_seconds)}; look for its error above. What "
                    "is answered is kept: the same command goes on with it, with as many processes as you like"
                )
            if stopped():
                return missing
            if waiting:
                time.sleep(_POLL_SECONDS)
        return missing

    def _finished(self, folder: Path, rank: int) -> dict[str, str] | None:
        try:
            value = json.loads(_marker(folder, rank, self.world).read_text(encoding="utf-8"))
        except OSError:
            return None
        return value["missing"] if value["run"] == self.run else None


def answer_files(folder: Path) -> list[Path]:
    """Every answers file of a task folder, of one process or of several."""
    return sorted([*folder.glob("answers.jsonl"), *folder.glob("answers-*-of-*.jsonl")])


def _of(rank: int, world: int) -> str:
    return f"{rank:02d}-of-{world:02d}"


def _marker(folder: Path, rank: int, world: int) -> Path:
    return folder / f"done-{_of(rank, world)}.json"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
