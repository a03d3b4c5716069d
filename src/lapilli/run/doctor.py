"""What this machine has for training and serving, what is missing, and what to do about it.

Everything is tried rather than looked up where trying is cheap: a process group of one, a matrix product on every
device. A `problem` keeps lapilli from working as it is; a `note` is something that a run may want.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lapilli.base.progress import size_text
from lapilli.base.version import VERSION

Level = Literal["ok", "note", "problem"]

PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "pillow", "pydantic", "h5py")
OPTIONAL = {
    "bitsandbytes": ("models and optimisers in 8 and 4 bits", "quantise"),
    "deepspeed": ("run.engine: deepspeed", "deepspeed"),
    "pyarrow": ("parquet files and Hugging Face datasets", "data"),
    "ray": ("data prepare --engine ray", "ray"),
    "fastapi": ("lapilli serve", "serve"),
    "tensorboard": ("run.trackers: [tensorboard]", "trackers"),
    "wandb": ("run.trackers: [wandb]", "trackers"),
    "trackio": ("run.trackers: [trackio]", "trackio"),
}
"""Packages that some commands need: what for, and the extra that installs them."""

_GB = 10**9
LITTLE_DISK_BYTES, LITTLE_SHARED_BYTES, FEW_FILES = 20 * _GB, 10**9, 4096


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `remedy` says what to do where it is not `ok`."""

    group: str
    name: str
    value: str
    level: Level = "ok"
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at everything; nothing is changed."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions, _devices, _kernels, _network, _memory, _disk, _extras,
    )  # fmt: skip
    return [finding for check in checks for finding in check()]


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "lapilli", VERSION)
    yield Finding("versions", "python", f"{platform.python_version()}, {platform.platform()}")
    wanted = _requirements()
    for name in PACKAGES:
        found, needs = _version(name), wanted.get(name, "")
        if found is None:
            yield Finding("versions", name, "missing", "problem", f'pip install "{name}{needs}"')
        elif not _fits(found, needs):
            yield Finding("versions", name, f"{found}, {needs} needed", "problem", f'pip install "{name}{needs}"')
        else:
            yield Finding("versions", name, found)


def _requirements() -> dict[str, str]:
    """Version limits of lapilli's own packages, by name."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("lapilli") or []
    except metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    return {one.name.lower(): str(one.specifier) for one in parsed if one.marker is None}


def _fits(version: str, limits: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(limits).contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    import torch

    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    limit = os.environ.get("OMP_NUM_THREADS")
    yield Finding("devices", "cpu", f"{_cpu_name()}, {threads}" + (f" (OMP_NUM_THREADS={limit})" if limit else ""))
    if torch.version.cuda is None:
        yield Finding("devices", "cuda", "PyTorch is a build without CUDA", *_without_cuda())
    elif not torch.cuda.is_available():
        remedy = "look at `nvidia-smi`; a driver that is too old, or a container without --gpus, hides the GPUs"
        yield Finding("devices", "cuda", f"built for CUDA {torch.version.cuda}, but no GPU is seen", "note", remedy)
    else:
        yield from (_gpu(number) for number in range(torch.cuda.device_count()))
    if find_spec("habana_frameworks") is not None:
        yield Finding("devices", "hpu", f"habana_frameworks {_version('habana-torch-plugin') or 'found'}")


def _without_cuda() -> tuple[Level, str]:
    if shutil.which("nvidia-smi") is None:
        return "ok", ""
    return "problem", "this machine has NVIDIA tools: install PyTorch from https://download.pytorch.org/whl/cu128"


def _gpu(number: int) -> Finding:
    import torch

    name = f"cuda:{number}"
    try:
        facts = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        product = torch.ones(64, 64, device=name) @ torch.ones(64, 64, device=name)
        works = float(product[0, 0]) == 64.0
    except RuntimeError as error:
        return Finding("devices", name, str(error).splitlines()[0], "problem", "look at `nvidia-smi` and `dmesg`")
    said = f"{facts.name}, {size_text(total)} ({size_text(free)} free), capability {facts.major}.{facts.minor}"
    if not works:
        return Finding("devices", name, f"{said}: wrong product of two matrices", "problem", "do not use this GPU")
    if facts.major < 8:
        return Finding("devices", name, said, "note", "no bf16 in hardware: set run.precision: fp32")
    return Finding("devices", name, said)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


def _kernels() -> Iterator[Finding]:
    import torch

    varlen = find_spec("torch.nn.attention.varlen") is not None
    if not varlen:
        yield Finding("kernels", "attention", "no variable-length kernel", "problem", 'pip install "torch>=2.11"')
    elif torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8:
        yield Finding("kernels", "attention", "PyTorch's variable-length FlashAttention")
    else:
        yield Finding("kernels", "attention", "scaled_dot_product_attention, one segment after the other")
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    remedy = "torch.compile and DeepSpeed's offload build kernels: install g++ (apt-get install g++)"
    yield _found("kernels", "C++ compiler", compiler, remedy)
    yield _found("kernels", "ninja", shutil.which("ninja"), "DeepSpeed's offload needs it: pip install ninja")
    if torch.cuda.is_available():
        remedy = "torch.compile on CUDA needs it: it comes with PyTorch's CUDA wheels"
        yield _found("kernels", "triton", _version("triton"), remedy)


def _found(group: str, name: str, value: str | None, remedy: str) -> Finding:
    return Finding(group, name, value) if value else Finding(group, name, "missing", "note", remedy)


def _network() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        remedy = "install another build: several processes can't train together with this one"
        yield Finding("network", "torch.distributed", "not in this build of PyTorch", "problem", remedy)
        return
    yield _gloo()
    if torch.cuda.is_available():
        remedy = "several GPUs can't train together: install PyTorch's CUDA wheels"
        yield _found("network", "nccl", "found" if dist.is_nccl_available() else None, remedy)
    if find_spec("habana_frameworks") is not None:
        hccl = find_spec("habana_frameworks.torch.distributed.hccl") is not None
        yield _found(
            "network", "hccl", "found" if hccl else None, "install habana-torch-plugin of the driver's version"
        )


def _gloo() -> Finding:
    """A process group of one, so that the network interface that Gloo chooses is really opened."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return Finding("network", "gloo", "in use")
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=10))
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        remedy = f"{socket.gethostname()} must resolve to an address of this machine, or set GLOO_SOCKET_IFNAME=lo"
        return Finding("network", "gloo", f"can't connect: {said}", "problem", remedy)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return Finding("network", "gloo", "connects")


def _memory() -> Iterator[Finding]:
    total, free = _host_memory()
    yield Finding("memory", "host", f"{size_text(total)} ({size_text(free)} free)" if total else "unknown")
    if limit := _container_limit():
        yield Finding("memory", "container's limit", size_text(limit))
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        said = f"{size_text(usage.total)} ({size_text(usage.free)} free)"
        remedy = "data workers hand batches over there: docker run --shm-size 8g (or --ipc host), or data.workers: 0"
        few = usage.free < LITTLE_SHARED_BYTES
        yield Finding("memory", "/dev/shm", said, "problem" if few else "ok", remedy if few else "")
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files != resource.RLIM_INFINITY and files < FEW_FILES
    remedy = f"many data workers may run out: ulimit -n {min(most, 65536) if most > 0 else 65536}"
    yield Finding("memory", "open files", str(files), "note" if few else "ok", remedy if few else "")


def _host_memory() -> tuple[int, int]:
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    total, free = (int(facts[name][0]) * 1024 if name in facts else 0 for name in ("MemTotal", "MemAvailable"))
    return total, free


def _container_limit() -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup") / name
        text = file.read_text().strip() if file.is_file() else "max"
        if text.isdigit() and int(text) < 2**60:
            return int(text)
    return None


def _disk() -> Iterator[Finding]:
    from lapilli.data.cache import index_root

    for name, place in (
        ("here", Path.cwd()),
        ("data index", index_root(None)),
        ("temporary files", Path(tempfile.gettempdir())),
    ):
        there = next((folder for folder in (place, *place.parents) if folder.exists()), Path("/"))
        usage = shutil.disk_usage(there)
        said = f"{place}: {size_text(usage.free)} of {size_text(usage.total)} free"
        if not os.access(there, os.W_OK):
            yield Finding("disk", name, f"{place}: can't be written", "problem", "set LAPILLI_CACHE, TMPDIR or out=")
        elif usage.free < LITTLE_DISK_BYTES:
            remedy = "a checkpoint of a 7B model in training takes 80 GB, its export 14 GB"
            yield Finding("disk", name, said, "note", remedy)
        else:
            yield Finding("disk", name, said)


def _extras() -> Iterator[Finding]:
    for name, (purpose, extra) in OPTIONAL.items():
        yield _found("extras", name, _version(name), f"{purpose} needs it: pip install 'lapilli[{extra}]'")
