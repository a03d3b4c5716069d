"""What to say to a run that is out of memory: the plan's own advice, for where it runs."""

from __future__ import annotations

from lapilli.base.errors import LapilliError
from lapilli.base.progress import size_text
from lapilli.recipe.schema import Stage
from lapilli.train.plan.machine import here
from lapilli.train.plan.plan import plan_stage
from lapilli.train.plan.workload import planned, planned_shapes
from lapilli.train.reading import read_corpus, read_description, reading

_CPU = "DefaultCPUAllocator"
"""How torch says that the CPU's memory is used up: it has no exception class of its own for that."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up, of the device or the machine."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU in str(error)


def advise(stage: Stage, processes: int, error: BaseException) -> str:
    """Word the end of a run that was out of memory, with what it needs and what to change."""
    said = [f"out of memory: {(str(error) or type(error).__name__).splitlines()[0]}"]
    try:
        machine = here(stage.run.precision, cpu=stage.run.device == "cpu")
        how = reading(stage, *read_description(str(stage.model)))
        corpus = read_corpus(stage.data.train, stage, how, False)
        work = planned(stage, how, corpus, processes, planned_shapes(stage, [corpus]))
        plan = plan_stage(stage, how, str(stage.model), work, machine, processes)
    except (LapilliError, RuntimeError, MemoryError) as failure:
        said.append(f"(what would fit can't be worked out: {str(failure).splitlines()[0]})")
        said.append("try train.gradient_checkpointing=full, then a smaller train.tokens_per_micro_batch")
        return "\n".join(said)
    needed = ", ".join(f"{name} {size_text(size)}" for name, size in plan.chosen.device.items() if size)
    said.append(f"this run needs about {size_text(plan.chosen.total)} on each device ({needed})")
    if plan.fits:
        said.append(
            f"which {size_text(machine.memory_bytes)} should hold: something else takes memory there (`nvidia-smi`, "
            "`free`), or a limit is set (ulimit -v, a container's or a batch job's); with less memory:"
        )
    return "\n".join([*said, *plan.advice(less=plan.fits)])
