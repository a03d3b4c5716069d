"""One Intel Gaudi (HPU) as a training device, on stock PyTorch and Gaudi's own part of it, `habana_frameworks`.

Everything that a Gaudi needs beside other devices is decided here: how it executes (eager, with layers compiled or not,
or lazy), where a graph is cut, that batches come in few shapes because every new one is compiled, and which of its
names give random states and memory. It was tested with a stand-in that records calls, never on hardware.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from lapilli.base.errors import RunError
from lapilli.train.device.hpu_mode import PACKAGE, settle_mode

KIND = "hpu"
"""PyTorch's name of the device."""


def is_there() -> bool:
    """Whether Gaudi's package is installed and sees a device; it is imported to ask it."""
    return find_spec(PACKAGE) is not None and bool(_part("hpu").is_available())


def join_others(local_rank: int) -> str:
    """Register HCCL, and return the back ends with which processes of a run talk: HCCL for an HPU, Gloo beside it.

    Each process gets the card of its number on its machine. What starts processes as torchrun does is understood by
    HCCL itself; for others, as SLURM, the card is named here.
    """
    if "LOCAL_RANK" not in os.environ:
        visible = os.environ.get("HABANA_VISIBLE_MODULES", "").split(",")
        cards = visible if visible != [""] else [str(card) for card in range(local_rank + 1)]
        if local_rank >= len(cards):
            raise RunError(f"HABANA_VISIBLE_MODULES names {len(cards)} cards; start one process for each, and no more")
        os.environ.setdefault("HLS_MODULE_ID", cards[local_rank])
    _part("distributed.hccl")
    return "cpu:gloo,hpu:hccl"


class Hpu:
    """One process on one Gaudi."""

    name = "hpu"
    static_shapes = 8
    """So many shapes of batches, where the recipe does not say: each is compiled once."""

    def __init__(self, mode: str = "eager") -> None:
        """Take the card that HCCL gave to this process, or any that is free.

        Raises RunError where there is none, or where Gaudi's package was imported in another mode than `mode`.
        """
        if find_spec(PACKAGE) is None:
            raise RunError(
                "run.device: hpu: Gaudi's part of PyTorch (habana_frameworks) is not installed; it comes with Intel's "
                "Gaudi images of PyTorch, see docs/gaudi.md"
            )
        settle_mode("hpu", mode)
        self._core, self._hpu = _part("core"), _part("hpu")
        if not self._hpu.is_available():
            raise RunError("run.device: hpu: habana_frameworks sees no Gaudi; `hl-smi` lists those of this machine")
        self.lazy = bool(_part("utils.internal").is_lazy())
        if self.lazy != (mode == "lazy"):
            raise RunError(
                f"run.hpu_mode is {mode}, but PyTorch was imported in {'lazy' if self.lazy else 'eager'} mode; start "
                f"with PT_HPU_LAZY_MODE={int(mode == 'lazy')}"
            )
        self.device = torch.device(KIND, self._hpu.current_device())

    def autocast(self, precision: str) -> AbstractContextManager[None]:
        """Compute in bf16 inside the context if `precision` is bf16."""
        return torch.autocast(KIND, torch.bfloat16) if precision == "bf16" else nullcontext()  # type: ignore[return-value]

    def be_deterministic(self) -> None:
        """Refuse operations that may differ from run to run; Gaudi's package follows PyTorch's own switch."""
        torch.use_deterministic_algorithms(True)

    def seed(self, number: int) -> None:
        """Seed the random numbers of the CPU and of the device."""
        torch.manual_seed(number)
        self._hpu.random.manual_seed_all(number)

    def cut_graph(self) -> None:
        """In lazy mode: run what was collected since the last cut. After each backward pass and each optimiser step."""
        if self.lazy:
            self._core.mark_step()

    def compile_options(self) -> dict[str, Any]:
        """What `torch.compile` is told: one program per shape. Raises RunError in lazy mode, which compiles itself."""
        if self.lazy:
            raise RunError("run.compile with run.hpu_mode: lazy: lazy mode compiles by itself; use one of them")
        return {"backend": "hpu_backend", "dynamic": False}

    def use_tf32(self, allowed: bool) -> str:
        """Return what to tell of a wish that means nothing here; empty where there was none."""
        return "run.tf32 means nothing on a Gaudi: fp32 is fp32" if allowed else ""

    def peak_memory_bytes(self) -> int:
        """Largest memory that PyTorch has held on the device so far."""
        return int(self._hpu.max_memory_allocated())

    def random_state(self) -> dict[str, torch.Tensor]:
        return {"hpu": self._hpu.random.get_rng_state()}

    def set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        if "hpu" in state:
            self._hpu.random.set_rng_state(state["hpu"])

    def describe(self) -> str:
        return f"{self._hpu.get_device_name()}, {'lazy' if self.lazy else 'eager'} mode"


def _part(name: str) -> Any:
    """A module of Gaudi's package. Raises RunError where it can't be imported, as without its driver."""
    try:
        return import_module(f"{PACKAGE}.torch.{name}")
    except (ImportError, OSError) as error:
        raise RunError(f"run.device: hpu: {PACKAGE}.torch.{name} can't be imported: {error}") from error
