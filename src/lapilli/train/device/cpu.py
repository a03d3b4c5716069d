"""The CPU as a training device."""

import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lapilli.base.memory import keep_freed_memory


class Cpu:
    """One process on the CPU."""

    name = "cpu"
    static_shapes = 0
    device = torch.device("cpu")

    def __init__(self) -> None:
        keep_freed_memory()

    def autocast(self, precision: str) -> AbstractContextManager[None]:
        """Compute in bf16 inside the context if `precision` is bf16."""
        return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()  # type: ignore[return-value]

    def be_deterministic(self) -> None:
        """Refuse operations that may differ from run to run."""
        torch.use_deterministic_algorithms(True)

    def seed(self, number: int) -> None:
        """Seed the random numbers."""
        torch.manual_seed(number)

    def cut_graph(self) -> None:
        """Nothing is collected here."""

    def compile_options(self) -> dict[str, Any]:
        """What `torch.compile` is told: one program for all shapes."""
        return {"dynamic": True}

    def use_tf32(self, allowed: bool) -> str:
        """Return what to tell of a wish that means nothing here; empty where there was none."""
        return "run.tf32 means nothing on the CPU: fp32 is fp32" if allowed else ""

    def peak_memory_bytes(self) -> int:
        """Largest resident memory of this process so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def random_state(self) -> dict[str, torch.Tensor]:
        return {}

    def set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        """Nothing beside PyTorch's CPU generator, which the run state keeps itself."""

    def describe(self) -> str:
        return f"cpu, {torch.get_num_threads()} of {os.cpu_count()} threads"
