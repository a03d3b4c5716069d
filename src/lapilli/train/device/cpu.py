"""The CPU as a training device."""

import ctypes
import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST_KEPT = 2**30


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for the next step; return whether it could be told to.

    By default it gives blocks of a training step's size back to the system and takes them anew, page by page: hundreds
    of thousands of page faults per step, about a tenth of its time. Other C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


class Cpu:
    """One process on the CPU."""

    name = "cpu"
    device = torch.device("cpu")

    def __init__(self) -> None:
        keep_freed_memory()

    def autocast(self, precision: str) -> AbstractContextManager[None]:
        """Compute in bf16 inside the context if `precision` is bf16."""
        return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()  # type: ignore[return-value]

    def be_deterministic(self) -> None:
        """Refuse operations that may differ from run to run."""
        torch.use_deterministic_algorithms(True)

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
