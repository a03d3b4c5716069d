"""The state of a run, apart from its model: what a run needs to go on as if it had never stopped.

    checkpoints/step-000120/
      weights/, optimizer/, average/   tensors under the model's own names, as safetensors, a file or more per process
      random.safetensors               the states of random numbers of every process
      state.json                       everything else, and the size of every file
      .complete                        written last: without it, the folder is never loaded

No pickle is written or read. The names say nothing of device, engine or number of processes, so that another engine
can go on from the same files. How they are written is told in `checkpoints.py`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lapilli.base import atomic
from lapilli.base.errors import RunError
from lapilli.data.quarantine import BadRecord
from lapilli.train.device.choose import Device
from lapilli.train.parallel.world import World

FORMAT = 2
_CONTENT = "state.json"
_RANDOM = "random.safetensors"
_NAME = "step-"


@dataclass(frozen=True)
class SkippedStep:
    """A step, counted from 1, that changed no weight because it was not finite, and what was not."""

    step: int
    reason: str


@dataclass(frozen=True)
class State:
    """What stands in `state.json`: the optimiser steps done, the facts that a resumed run must share, the records found
    bad and the steps skipped so far, and the validation loss after the last step, if that was computed. `judged` is
    false where a stop kept the run from validating or evaluating that step to the end: it is done first by a run that
    goes on.
    """

    step: int
    facts: dict[str, Any]
    bad: tuple[BadRecord, ...] = ()
    skipped: tuple[SkippedStep, ...] = ()
    validation_loss: float | None = None
    judged: bool = True


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"{_NAME}{step:06d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    found = [p for p in checkpoints.glob(f"{_NAME}*") if p.name.removeprefix(_NAME).isdigit() and atomic.is_complete(p)]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_NAME)))


def write_state(draft: Path, state: State, random: dict[str, torch.Tensor]) -> None:
    """Complete a checkpoint's folder, whose tensors are written, with everything else."""
    save_file(random, draft / _RANDOM)
    files = {p.relative_to(draft).as_posix(): p.stat().st_size for p in sorted(draft.rglob("*")) if p.is_file()}
    content = {"format": FORMAT, **asdict(state), "files": files}
    (draft / _CONTENT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_state(folder: Path) -> State:
    """Read a checkpoint's `state.json`. Raises RunError for an incomplete folder or another format."""
    if not atomic.is_complete(folder):
        raise RunError(f"{folder}: not a complete checkpoint")
    try:
        content = json.loads((folder / _CONTENT).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise RunError(
                f"{folder}: written in format {content['format']}, and this version reads format {FORMAT}; go on with "
                "the version that wrote it (run.json says which), or start again with another out=..."
            )
        for name, size in content["files"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise RunError(f"{folder / name}: missing or cut short; go on from another checkpoint: --resume FOLDER")
        bad = tuple(BadRecord(**one) for one in content["bad"])
        skipped = tuple(SkippedStep(**one) for one in content["skipped"])
        judged = content.get("judged", True)  # which earlier versions always were
        return State(content["step"], content["facts"], bad, skipped, content["validation_loss"], judged)
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder}: {_CONTENT} can't be read: {error!r}") from error


def random_of_all(world: World, device: Device) -> dict[str, torch.Tensor]:
    """The random states of all processes; the first one's have no number, as if it were alone."""
    own = {"cpu": torch.get_rng_state(), **device.random_state()}
    return {
        f"process-{rank}.{name}" if rank else name: tensor
        for name, state in own.items()
        for rank, tensor in enumerate(world.bytes_of_all(state))
    }


def set_random(folder: Path, rank: int, device: Device) -> None:
    """Put a checkpoint's random states in place.

    A process that it has none of, because there were fewer, gets a new one. Raises RunError for a damaged file.
    """
    try:
        states = load_file(folder / _RANDOM)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{folder / _RANDOM}: can't be read: {error}") from error
    prefix = f"process-{rank}." if rank else ""
    own = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    if "cpu" in own:
        torch.set_rng_state(own["cpu"])
        device.set_random_state(own)
    else:
        drawn = hashlib.sha256(states["cpu"].numpy().tobytes() + str(rank).encode())
        torch.manual_seed(int.from_bytes(drawn.digest()[:7], "little"))
