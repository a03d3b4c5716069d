"""What a run is planned for: kinds of devices with their memory and speed, or the device that is here.

Speeds are those that the makers state for dense matrix products in bf16; what training reaches of them is a share.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lapilli.base.errors import RecipeError, unknown

_GB, _T = 10**9, 10**12
DEVICES = {
    "v100": (32 * _GB, 125 * _T), "a10": (24 * _GB, 125 * _T), "a100-40gb": (40 * _GB, 312 * _T),
    "a100-80gb": (80 * _GB, 312 * _T), "l40s": (48 * _GB, 362 * _T), "rtx4090": (24 * _GB, 165 * _T),
    "h100": (80 * _GB, 989 * _T), "h200": (141 * _GB, 989 * _T), "b200": (180 * _GB, 2250 * _T),
    "gaudi2": (96 * _GB, 432 * _T), "gaudi3": (128 * _GB, 1835 * _T),
}  # fmt: skip
"""Memory in bytes, and operations per second of matrix products as the maker states them."""
REACHED = {"cpu": 0.5, "cuda": 0.4}
"""The share of that speed that training is expected to reach; on the CPU, of the speed measured here."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Machine:
    """One device of those that a run is planned for."""

    kind: str
    """`cpu` or `cuda`; of a Gaudi too, memory is planned as on a GPU."""
    name: str
    memory_bytes: int
    flops_per_second: float
    """Stated, or on the CPU measured."""

    @property
    def reached(self) -> float:
        """Operations per second that training is expected to do."""
        return self.flops_per_second * REACHED[self.kind]


def named(name: str) -> Machine:
    """A device from the table. Raises RecipeError, with the nearest name, for one that is not there."""
    if name.lower() not in DEVICES:
        raise RecipeError(unknown("--device", name, [*DEVICES, "cpu"]))
    memory, rate = DEVICES[name.lower()]
    return Machine("cuda", name.lower(), memory, rate)


def here(precision: str, *, cpu: bool = False) -> Machine:
    """The device that a run on this machine would take; the CPU's speed is measured in half a second."""
    if torch.cuda.is_available() and not cpu:
        facts = torch.cuda.get_device_properties(0)
        known = [name for name in DEVICES if name.split("-")[0] in facts.name.lower().replace(" ", "")]
        rate = DEVICES[known[0]][1] if known else 2 * _matrix_rate("cuda", torch.bfloat16)
        return Machine("cuda", facts.name, facts.total_memory, rate)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Machine("cpu", f"cpu, {torch.get_num_threads()} threads", _host_bytes(), _matrix_rate("cpu", dtype))


def parse_bytes(text: str) -> int:
    """`80GB`, `24GiB` or plain bytes. Raises RecipeError."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]i?)?b?\s*", text.lower())
    if found is None:
        raise RecipeError(f"--memory {text}: give a number with a unit, as 80GB or 24GiB")
    return int(float(found.group(1)) * _UNITS[found.group(2) or ""])


def _matrix_rate(device: str, dtype: torch.dtype, size: int = 1024) -> float:
    """Operations per second of products of two square matrices, the best of half a second of them."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    best, until = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < until:
        began = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _host_bytes() -> int:
    """Memory of this machine, or what its container may have of it."""
    total = next(
        (int(line.split()[1]) * 1024 for line in _lines(Path("/proc/meminfo")) if line.startswith("MemTotal")), 0
    )
    limit = next((line.strip() for line in _lines(Path("/sys/fs/cgroup/memory.max"))), "max")
    return min(total, int(limit)) if limit.isdigit() and total else total


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []
