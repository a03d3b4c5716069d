"""The state of a run, apart from its model: what a run needs to go on as if it had never stopped.

A checkpoint folder holds the trained weights, the optimiser's tensors and the random generators' states in safetensors
under the model's own parameter names, and everything else in `state.json`. No pickle is written or read. The names say
nothing of device or engine, so that another engine can gather to and scatter from the same files. A folder is written
aside, made durable and renamed; without its completion marker it is never loaded.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lapilli.base import atomic
from lapilli.base.errors import RunError
from lapilli.data.quarantine import BadRecord
from lapilli.train.device.choose import Device
from lapilli.train.parallel.single import Single
from lapilli.train.parallel.world import World
from lapilli.train.tensors import read_tensors, write_tensors

FORMAT = 1
_NAME = "step-"


@dataclass(frozen=True)
class State:
    """What stands in `state.json`: the optimiser steps done, the facts that a resumed run must share, and the records
    found bad so far.
    """

    step: int
    facts: dict[str, Any]
    bad: tuple[BadRecord, ...] = ()


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"{_NAME}{step:06d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    found = [p for p in checkpoints.glob(f"{_NAME}*") if p.name.removeprefix(_NAME).isdigit() and atomic.is_complete(p)]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_NAME)))


def save_state(folder: Path, state: State, engine: Single, optimizer: torch.optim.Optimizer, device: Device) -> None:
    """Write a checkpoint at `folder`, durable and complete, or raise and leave nothing.

    All processes call it, and the first one writes. Raises RunError, naming the folder, when the disk refuses; the
    checkpoints before it stay good.
    """
    world = engine.world
    with world.together():
        random = _random_of_all(world, device)
        world.from_first(lambda: _write(folder, state, engine, optimizer, random))


def _write(
    folder: Path, state: State, engine: Single, optimizer: torch.optim.Optimizer, random: dict[str, torch.Tensor]
) -> None:
    try:
        with atomic.atomic_folder(folder, replace=True, marker=True) as draft:
            write_tensors(draft, "weights", engine.trained())
            write_tensors(draft, "optimizer", _optimizer_tensors(engine, optimizer))
            write_tensors(draft, "random", random.items())
            content = {"format": FORMAT, **asdict(state)}
            (draft / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{folder}: the checkpoint can't be written: {error}; earlier checkpoints are unharmed"
        ) from error


def read_state(folder: Path) -> State:
    """Read a checkpoint's `state.json`. Raises RunError for an incomplete folder or another format."""
    if not atomic.is_complete(folder):
        raise RunError(f"{folder}: not a complete checkpoint")
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise RunError(f"{folder}: written in format {content['format']}; this version reads format {FORMAT}")
        return State(content["step"], content["facts"], tuple(BadRecord(**one) for one in content.get("bad", ())))
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError(f"{folder}: state.json can't be read: {error!r}") from error


def load_tensors(folder: Path, engine: Single, optimizer: torch.optim.Optimizer, device: Device) -> None:
    """Put a checkpoint's weights, optimiser tensors and random states in place.

    A process that the checkpoint has no random state of, because there were fewer, gets a new one. Raises RunError if
    its names or shapes are not those of this run.
    """
    trained = dict(engine.trained())
    missing = set(trained)
    with torch.no_grad():
        for name, tensor in read_tensors(folder, "weights"):
            if name not in trained or tensor.shape != trained[name].shape:
                raise RunError(f"{folder}: weight {name} {tuple(tensor.shape)} does not fit this run's model")
            trained[name].copy_(tensor)
            missing.discard(name)
    if missing:
        raise RunError(f"{folder}: lacks {len(missing)} trained weights, among them {min(missing)}")
    for name, tensor in read_tensors(folder, "optimizer"):
        owner, _, kind = name.rpartition(".")
        if owner not in trained:
            raise RunError(f"{folder}: optimiser tensor {name} belongs to no trained weight")
        parameter = trained[owner]
        # As the optimiser itself places them: counters stay where its kernels look for them.
        on_device = kind != "step" or optimizer.defaults.get("fused")
        optimizer.state[parameter][kind] = tensor.to(parameter.device) if on_device else tensor
    _set_random(dict(read_tensors(folder, "random")), engine.world.rank, device)


def _random_of_all(world: World, device: Device) -> dict[str, torch.Tensor]:
    """The random states of all processes; the first one's have no number, as if it were alone."""
    own = {"cpu": torch.get_rng_state(), **device.random_state()}
    return {
        f"process-{rank}.{name}" if rank else name: tensor
        for name, state in own.items()
        for rank, tensor in enumerate(world.bytes_of_all(state))
    }


def _set_random(states: dict[str, torch.Tensor], rank: int, device: Device) -> None:
    prefix = f"process-{rank}." if rank else ""
    own = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    if "cpu" in own:
        torch.set_rng_state(own["cpu"])
        device.set_random_state(own)
    else:
        drawn = hashlib.sha256(states["cpu"].numpy().tobytes() + str(rank).encode())
        torch.manual_seed(int.from_bytes(drawn.digest()[:7], "little"))


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints."""
    for old in complete_checkpoints(checkpoints)[:-keep]:
        atomic.remove(old)


def _optimizer_tensors(engine: Single, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in engine.trained():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                yield f"{name}.{kind}", value
