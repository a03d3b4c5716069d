"""Runs that several real processes carry out together, one job after the other.

`python processes.py JOBS` is one process, to be started by torchrun or with its variables; every process writes what
became of each job beside JOBS. A job may wish that something happens to one process when some steps are done.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One run: its recipe with overrides. `signal` is sent to process 1 when `after` steps are in the metrics.

    With `fail` a layer of process 0 raises it, as an error of its own, in the first step after `after`.
    """

    recipe: str
    overrides: Sequence[str] = ()
    resume: str = "auto"
    signal: int = 0
    after: int = 0
    fail: str = ""


def run_together(jobs: Sequence[Job], folder: Path, processes: int = 2) -> list[list[dict[str, Any]]]:
    """Do the jobs with torchrun; return what each process says of each: [job][process]."""
    plan = _plan(jobs, folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    made = subprocess.run([*torchrun, __file__, str(plan)], capture_output=True, text=True, timeout=300, check=False)
    assert made.returncode == 0, made.stderr[-4000:]
    said = [json.loads(Path(f"{plan}.{rank}").read_text()) for rank in range(processes)]
    return [list(one) for one in zip(*said, strict=True)]


def start_alone(job: Job, folder: Path, rank: int, size: int, port: int) -> subprocess.Popen[str]:
    """Start one process of several without a launcher that would end the others."""
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, __file__, str(_plan([job], folder))],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        stderr=subprocess.PIPE,
        text=True,
    )


def _plan(jobs: Sequence[Job], folder: Path) -> Path:
    plan = folder / "jobs.json"
    plan.write_text(json.dumps([asdict(job) for job in jobs]))
    return plan


def _happen(job: Job, metrics: Path) -> None:
    while not metrics.exists() or metrics.read_text().count("\n") < job.after:
        time.sleep(0.005)
    os.kill(os.getpid(), job.signal)


class _Watcher:
    """Called after every step, in process 0: notes what the engine is, and lets a layer fail if that is wished."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.engine: dict[str, Any] = {}

    def __call__(self, ready: Any, step: int, *_: Any) -> dict[str, Any]:
        here = [p.to_local() if hasattr(p, "to_local") else p for _, p in ready.engine.trained()]
        kinds = [type(module).__mro__ for module in ready.engine.module.modules()]
        self.engine = {
            "name": ready.engine.name,
            "units": sum("FSDPModule" in {cls.__name__ for cls in mro} for mro in kinds),
            "trained": sum(p.numel() for _, p in ready.engine.trained()),
            "trained here": sum(p.numel() for p in here),
            "frozen here": sum(
                (p.to_local() if hasattr(p, "to_local") else p).numel()
                for p in ready.engine.module.parameters()
                if not p.requires_grad
            ),
            "kinds": sorted({type(p).__name__ for _, p in ready.engine.trained()}),
        }
        if self.job.fail and step == self.job.after:

            def fail(*_: Any) -> None:
                raise RuntimeError(self.job.fail)

            ready.loaded.model.language_model.base_model.layers[1].register_forward_pre_hook(fail)
        return {}


def _main() -> None:
    from lapilli.base.errors import LapilliError
    from lapilli.recipe.load import load_recipe
    from lapilli.train.parallel.world import ProcessLost, open_world
    from lapilli.train.run import train_stage

    said = []
    with open_world() as world, open(os.devnull, "w") as nowhere:
        for job in (Job(**one) for one in json.loads(Path(sys.argv[1]).read_text())):
            loaded = load_recipe(job.recipe, list(job.overrides))
            (stage,) = loaded.recipe.stages
            if job.signal and world.rank == 1:
                metrics = Path(str(stage.out)) / "metrics.jsonl"
                threading.Thread(target=_happen, args=(job, metrics), daemon=True).start()
            watcher = _Watcher(job)
            try:
                outcome = train_stage(stage, {}, resume=job.resume, stream=nowhere, world=world, evaluate=watcher)
                said.append({"step": outcome.step, "stopped_by": outcome.stopped_by})
                if watcher.engine:
                    Path(str(stage.out), "engine.json").write_text(json.dumps(watcher.engine))
            except ProcessLost:
                raise
            except LapilliError as error:
                said.append({"error": type(error).__name__, "message": str(error)})
    Path(f"{sys.argv[1]}.{world.rank}").write_text(json.dumps(said))


if __name__ == "__main__":
    _main()
