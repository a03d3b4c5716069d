"""One CUDA GPU as a training device."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lapilli.base.errors import RunError


class Cuda:
    """One process on one CUDA device."""

    name = "cuda"
    static_shapes = 0

    def __init__(self, local_rank: int = 0) -> None:
        """Take the device of that number, or the only one there is: a cluster may show each process its own.

        Raises RunError where PyTorch sees no such CUDA device.
        """
        if not torch.cuda.is_available():
            raise RunError("run.device: cuda: PyTorch sees no CUDA device; use cpu, or install a CUDA build of PyTorch")
        devices = torch.cuda.device_count()
        if devices > 1:
            if local_rank >= devices:
                raise RunError(f"this machine has {devices} CUDA devices; start one process for each, and no more")
            torch.cuda.set_device(local_rank)
        self.device = torch.device("cuda", torch.cuda.current_device())

    def autocast(self, precision: str) -> AbstractContextManager[None]:
        """Compute in bf16 inside the context if `precision` is bf16."""
        return torch.autocast("cuda", torch.bfloat16) if precision == "bf16" else nullcontext()  # type: ignore[return-value]

    def be_deterministic(self) -> None:
        """Refuse operations that may differ from run to run; cuBLAS reads its part before its first call."""
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    def seed(self, number: int) -> None:
        """Seed the random numbers, those of the GPU among them."""
        torch.manual_seed(number)

    def cut_graph(self) -> None:
        """Nothing is collected here."""

    def compile_options(self) -> dict[str, Any]:
        """What `torch.compile` is told: one program for all shapes."""
        return {"dynamic": True}

    def use_tf32(self, allowed: bool) -> str:
        """Let products of fp32 matrices be rounded to TF32, or not. Returns what to tell of it, if anything."""
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed
        if allowed and torch.cuda.get_device_capability(self.device) < (8, 0):
            return f"run.tf32 means nothing on {self.describe()}: TF32 came with compute capability 8.0"
        return ""

    def peak_memory_bytes(self) -> int:
        """Largest memory that PyTorch has held on the device so far."""
        return torch.cuda.max_memory_allocated(self.device)

    def random_state(self) -> dict[str, torch.Tensor]:
        return {"cuda": torch.cuda.get_rng_state(self.device)}

    def set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def describe(self) -> str:
        return torch.cuda.get_device_name(self.device)
