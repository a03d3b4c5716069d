"""A run as a SkyPilot task: the YAML that `sky jobs launch` takes, spot instances included.

An instance that is taken away comes back as another one with nothing on it, so what a run writes must lie in a bucket;
then the same command goes on from the newest checkpoint, as everywhere else. SkyPilot itself is not needed to write the
file, and what is written is checked against its schema only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from lapilli.base.errors import RecipeError
from lapilli.launch.command import shell, train_words, where
from lapilli.launch.local import patience
from lapilli.recipe.load import LoadedRecipe

_PORT = 29_500
_BUCKETS = ("s3://", "gs://", "r2://", "cos://", "oci://", "https://")


@dataclass(frozen=True)
class Task:
    """What is asked of SkyPilot."""

    name: str
    gpus: str
    """Name and number per node, as `H100:8`."""
    nodes: int = 1
    spot: bool = False
    infra: str | None = None
    """`cloud`, `cloud/region` or `cloud/region/zone`; None: wherever it is cheapest."""
    disk_gb: int | None = None
    workdir: str = "."
    """The local folder that goes along; recipe and relative paths are inside it."""
    mounts: tuple[str, ...] = ()
    """`/path/there=SOURCE`, where SOURCE is a bucket's address or a local path."""
    setup: tuple[str, ...] = ("pip install lapilli",)
    restarts: int = 3
    """How often a run that failed by itself is started again; lost instances do not count."""

    @property
    def processes(self) -> int:
        count = self.gpus.partition(":")[2]
        return self.nodes * (int(count) if count.isdigit() else 1)


def task_yaml(task: Task, loaded: LoadedRecipe, overrides: Sequence[str]) -> str:
    """The task file. Raises RecipeError for what could not work there.

    That is: a spot instance whose run folders lie in no bucket, or without checkpoints; a recipe that is not in the
    folder that goes along; mounts that are no mounts.
    """
    if task.nodes < 1:
        raise RecipeError(f"--nodes {task.nodes}: a task needs one at least")
    name, _, count = task.gpus.partition(":")
    if not name or not (count or "1").isdigit() or count == "0":
        raise RecipeError(f'--gpus "{task.gpus}": a name and a number per node, as H100:8')
    mounts = _mounts(task.mounts)
    if task.spot:
        _refuse_what_would_be_lost(loaded, mounts)
    resources: dict[str, Any] = {"accelerators": task.gpus}
    if task.infra is not None:
        resources["infra"] = task.infra
    if task.disk_gb is not None:
        resources["disk_size"] = task.disk_gb
    if task.spot:
        resources["use_spot"] = True
    resources["job_recovery"] = {"max_restarts_on_errors": task.restarts}
    content: dict[str, Any] = {
        "name": task.name,
        "num_nodes": task.nodes,
        "resources": resources,
        "workdir": task.workdir,
        **({"file_mounts": mounts} if mounts else {}),
        "setup": "set -e\n" + "".join(f"{line}\n" for line in task.setup),
        "run": _run(_there(loaded.path, task.workdir), overrides),
    }
    head = (
        f"# {task.name}: written by `lapilli launch skypilot`, and checked against SkyPilot's schema only.\n"
        "# `sky jobs launch FILE` starts it, and starts it again where an instance is lost.\n"
    )
    return head + yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def _run(recipe: str, overrides: Sequence[str]) -> str:
    words = shell(["-m", "lapilli.cli", *train_words(recipe, overrides)])
    return f"""\
torchrun --nnodes "$SKYPILOT_NUM_NODES" --node-rank "$SKYPILOT_NODE_RANK" \\
  --nproc-per-node "$SKYPILOT_NUM_GPUS_PER_NODE" \\
  --master-addr "$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --master-port {_PORT} \\
  {shell(patience())} \\
  {words}
"""


def _there(recipe: str, workdir: str) -> str:
    """What the recipe is called inside the folder that goes along; a shipped recipe keeps its name."""
    file = Path(recipe).expanduser()
    if not file.is_file():
        return recipe
    try:
        return str(file.resolve().relative_to(Path(workdir).expanduser().resolve()))
    except ValueError as error:
        raise RecipeError(
            f"{recipe}: is not in {workdir}, the folder that goes along; give --workdir another"
        ) from error


def _mounts(given: Sequence[str]) -> dict[str, Any]:
    mounts: dict[str, Any] = {}
    for one in given:
        there, equals, source = one.partition("=")
        if not equals or not source or not there.startswith("/"):
            raise RecipeError(f'--mount "{one}": looks like /runs=s3://bucket, or /data=./data for a local folder')
        if source.startswith(_BUCKETS):
            # The one mode of the three that can write, append and rename as the run folder needs it.
            mounts[there] = {"source": source, "mode": "MOUNT_CACHED"}
        elif "://" in source:
            raise RecipeError(f'--mount "{one}": buckets begin with {", ".join(_BUCKETS)}')
        elif not Path(source).expanduser().exists():
            raise RecipeError(f'--mount "{one}": {source}: no such file or folder')
        else:
            mounts[there] = source
    return mounts


def _refuse_what_would_be_lost(loaded: LoadedRecipe, mounts: Mapping[str, Any]) -> None:
    buckets = [PurePosixPath(there) for there, source in mounts.items() if isinstance(source, dict)]
    stages = loaded.recipe.stages
    for stage in stages:
        start = where(stage.name, len(stages))
        if stage.train.save_every is None:
            raise RecipeError(f"{start}train.save_every: a spot instance may go at any moment; say how often to save")
        if not any(PurePosixPath(str(stage.out)).is_relative_to(bucket) for bucket in buckets):
            raise RecipeError(
                f"{start}out: {stage.out}: lies in no bucket, and would be lost with a spot instance; give "
                "--mount /runs=s3://BUCKET and out=/runs/NAME"
            )


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they are read: line by line."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
