"""`run.json`: what a run is, what it was made with and where, so that it can be understood and repeated later.

Written when a run begins and each time it goes on. `facts` is what an interrupted run and its continuation must share;
the rest is for whoever reads it. Of the environment only variables that change how a run computes are written down,
by name, never all of them: others hold secrets.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lapilli.base.version import VERSION
from lapilli.recipe.schema import Stage
from lapilli.train.setup import Prepared

_LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "deepspeed", "bitsandbytes")
_VARIABLES = {
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTHONHASHSEED", "GLOO_SOCKET_IFNAME",
    "LAPILLI_CACHE", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "HABANA_VISIBLE_MODULES",
}  # fmt: skip
_FAMILIES = ("NCCL_", "TORCH_NCCL_", "PT_HPU_")
_GIT_SECONDS = 10


def manifest(ready: Prepared, facts: dict[str, Any], from_step: int) -> dict[str, Any]:
    """Return the content of `run.json` for a run that begins after `from_step` steps."""
    return {
        "facts": facts,
        "data": ready.corpus.index.summary(),
        "recipe_sha256": recipe_hash(ready.stage),
        "seed": ready.stage.run.seed,
        "total_steps": ready.total_steps,
        "from_step": from_step,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": ready.device.describe(),
        "engine": ready.engine.name,
        "processes": ready.engine.world.size,
        "machine": {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()},
        "made_with": versions(),
        "git": git_state(Path.cwd()),
        "environment": kept_variables(os.environ),
    }


def recipe_hash(stage: Stage) -> str:
    """SHA-256 of the resolved recipe, wherever its values came from and however it was written."""
    return hashlib.sha256(json.dumps(stage.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str | None]:
    """Versions of lapilli and what it runs on; None for what is not there."""
    found: dict[str, str | None] = {"lapilli": VERSION, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # says what it was built for, too
    return found | {"cuda": torch.version.cuda, "driver": _driver()}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository that `folder` is in, and whether its files differ from it; None where there is none."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def kept_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those variables that change how a run computes, by name."""
    return {
        name: value for name, value in sorted(environment.items()) if name in _VARIABLES or name.startswith(_FAMILIES)
    }


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _driver() -> str | None:
    """NVIDIA's driver as the kernel knows it."""
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None
