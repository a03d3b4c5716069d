"""Runs that several real processes carry out together, one job after the other.

`python processes.py JOBS` is one process, to be started by torchrun or with its variables; every process writes what
became of each job beside JOBS. A job may wish that something happens to one process when some steps are done.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LONGEST_SECONDS = 600
_WAITING = "waiting"
"""In the run folder: process 0 waits until somebody is asked to stop."""


@dataclass(frozen=True)
class Job:
    """One run: its recipe with overrides. `signal` is sent to process 1 when `after` steps are in the metrics.

    With `fail` a layer of process 0 raises it, as an error of its own, in the first step after `after`. With `ask` the
    model answers after every step for which the recipe has a task. With `stop_validation` process 0 is asked to stop in
    the second pass of the validation of that step; with `wait` its evaluation lasts until somebody is asked to stop,
    and `signal` is sent then.
    """

    recipe: str
    overrides: Sequence[str] = ()
    resume: str = "auto"
    signal: int = 0
    after: int = 0
    fail: str = ""
    ask: bool = False
    stop_validation: int = 0
    wait: bool = False


def run_together(jobs: Sequence[Job], folder: Path, processes: int = 2) -> list[list[dict[str, Any]]]:
    """Do the jobs with torchrun; return what each process says of each: [job][process]."""
    plan = _plan(jobs, folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launched = subprocess.Popen([*torchrun, __file__, str(plan)], stderr=subprocess.PIPE, text=True)
    try:
        _, errors = launched.communicate(timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        launched.terminate()  # it ends the processes that it started; killed, it could not
        raise
    assert launched.returncode == 0, errors[-8000:]
    said = [json.loads(Path(f"{plan}.{rank}").read_text()) for rank in range(processes)]
    return [list(one) for one in zip(*said, strict=True)]


def start_alone(
    job: Job, folder: Path, rank: int, size: int, port: int, *, meet_elsewhere: bool = False
) -> subprocess.Popen[str]:
    """Start one process of several without a launcher that would end the others.

    With `meet_elsewhere` somebody else listens at the port, as torchrun does, and stays when process 0 has ended.
    """
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": True} if meet_elsewhere else {}
    return subprocess.Popen(
        [sys.executable, __file__, str(_plan([job], folder))],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    """A port for processes that are started alone to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _plan(jobs: Sequence[Job], folder: Path) -> Path:
    plan = folder / "jobs.json"
    plan.write_text(json.dumps([asdict(job) for job in jobs]))
    return plan


def _happen(job: Job, metrics: Path) -> None:
    waiting = metrics.with_name(_WAITING)
    while not (waiting.exists() if job.wait else metrics.exists() and metrics.read_text().count("\n") >= job.after):
        time.sleep(0.005)
    os.kill(os.getpid(), job.signal)


class Watcher:
    """Called after every step, in process 0: notes what the engine is, and does what the job wishes."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.engine: dict[str, Any] = {}

    def __call__(self, ready: Any, step: int, last: bool, _: Any, stopped: Any) -> dict[str, float | None] | None:
        self.engine = _facts(ready.engine)
        if self.job.fail and step == self.job.after:

            def fail(*_: Any) -> None:
                raise RuntimeError(self.job.fail)

            ready.loaded.model.language_model.base_model.layers[1].register_forward_pre_hook(fail)
        if self.job.stop_validation == step + 1:
            self._stop_in_validation(ready)
        due = any(last or step % task.every == 0 for task in ready.stage.train.evaluate)
        if self.job.wait and due:
            (ready.folder.path / _WAITING).touch()
            return self._wait(stopped)
        return _answer(ready) if self.job.ask and due else {}

    def _stop_in_validation(self, ready: Any) -> None:
        model, passes = ready.loaded.model, 0

        def ask(*_: Any) -> None:
            nonlocal passes
            passes += not model.training
            if passes == 2 and not model.training:
                os.kill(os.getpid(), signal.SIGTERM)

        model.language_model.base_model.layers[1].register_forward_pre_hook(ask)

    def _wait(self, stopped: Any) -> None:
        until = time.monotonic() + 60
        while not stopped():
            assert time.monotonic() < until, "nobody was asked to stop"
            time.sleep(0.05)


def _facts(engine: Any) -> dict[str, Any]:
    if engine.name == "deepspeed":
        return _zero_facts(engine)
    from torch._dynamo.utils import counters

    kinds = [{cls.__name__ for cls in type(module).__mro__} for module in engine.module.modules()]
    trained = [p for _, p in engine.trained()]
    return {
        "name": engine.name,
        "graphs": counters["stats"]["unique_graphs"],
        "units": sum("FSDPModule" in names for names in kinds),
        "trained": sum(p.numel() for p in trained),
        "trained here": sum(_here(p).numel() for p in trained),
        "frozen here": sum(_here(p).numel() for p in engine.module.parameters() if not p.requires_grad),
        "kinds": sorted({type(p).__name__ for p in trained}),
        "dtypes": sorted({str(p.dtype) for p in trained}),
    }


def _zero_facts(engine: Any) -> dict[str, Any]:
    flats = [flat for group in engine.zero.optimizer.param_groups for flat in group["params"]]
    flats = getattr(engine.zero, "fp32_partitioned_groups_flat", flats)
    facts = {
        "engine": type(engine.engine).__name__,
        "stage": engine.engine.zero_optimization_stage(),
        "optimizer": type(engine.zero).__name__,
        "split gradients": engine.engine.zero_optimization_partition_gradients(),
        "offloaded": engine.engine.zero_offload_optimizer() is not None,
        "groups": len(flats),
        "stepped here": sum(flat.numel() for flat in flats),
    }
    for kind, wanted in (("trained", True), ("frozen", False)):
        some = [p for p in engine.module.parameters() if p.requires_grad is wanted]
        facts[kind] = sum(getattr(p, "ds_numel", p.numel()) for p in some)
        facts[f"{kind} here"] = sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in some)
    return facts


def _here(parameter: Any) -> Any:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _answer(ready: Any) -> dict[str, float | None]:
    """What the model says, run by itself in this process: numbers that depend on every weight of the language model."""
    import torch

    from lapilli.train.setup import training_mode

    model = ready.loaded.model.eval()
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        said = model.generate(ids, max_new_tokens=4, do_sample=False)
    training_mode(model)
    return {"logits": float(logits.double().square().mean()), "said": float(said.double().sum())}


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
            watcher = Watcher(job)
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
