"""Which engine a run uses."""

import torch

from lapilli.base.errors import RunError
from lapilli.recipe.schema import Run, Stage
from lapilli.train.loss import LossModule
from lapilli.train.parallel.ddp import Ddp
from lapilli.train.parallel.single import Single
from lapilli.train.parallel.world import World

ENGINES: dict[str, type[Single]] = {"single": Single, "ddp": Ddp}


def engine_name(wanted: str, world: World) -> str:
    """Return the engine of that name; `auto` is `single` for one process, else `ddp`.

    Raises RunError for `single` where several processes were started.
    """
    if wanted == "auto":
        return "single" if world.size == 1 else "ddp"
    if wanted == "single" and world.size > 1:
        raise RunError(f"run.engine: single is for one process, but {world.size} were started; use auto or ddp")
    return wanted


def check_engine(name: str, stage: Stage, world: World, device: torch.device) -> tuple[str, ...]:
    """Return lines about settings of the engine of that name that do something else than they seem to.

    Raises LapilliError, before anything is loaded, for settings that it can't have here.
    """
    sections = {"fsdp": stage.run.fsdp, "deepspeed": stage.run.deepspeed}
    others = [key for key, section in sections.items() if key != name and section != type(section)()]
    notes = tuple(f"run.{key} has no effect: run.engine is {name}" for key in others)
    if name == "fsdp":
        from lapilli.train.parallel.fsdp import check_fsdp

        check_fsdp(stage, world)
    if name == "deepspeed":
        from lapilli.train.parallel.deepspeed import check_deepspeed

        return notes + check_deepspeed(stage.train, stage.run, world.size, device.type)
    return notes


def make_engine(name: str, module: LossModule, world: World, run: Run, device: torch.device) -> Single:
    """Wrap the module in the engine of that name, which computes on `device`."""
    if name == "fsdp":
        from lapilli.train.parallel.fsdp import Fsdp

        return Fsdp(module, world, run, device)
    if name == "deepspeed":
        from lapilli.train.parallel.deepspeed import DeepSpeed

        return DeepSpeed(module, world, run, device)
    return ENGINES[name](module, world)
