"""The run folder: who may write in it, and where a run that was interrupted goes on.

    recipe.yaml     the resolved recipe, with the origin of every value
    run.json        the facts that an interrupted run and its continuation must share, and what the run was made with
    left_out.jsonl  the records that were dropped or shortened, one object each; only if there are any
    metrics.jsonl   one object per optimiser step
    evaluation/     answers and scores of the tasks that were followed, a folder per step
    checkpoints/    the state of the run
    model/          the trained model, written last: a folder with it is finished
    report.html     loss curves and totals

A folder that holds anything else is never written to.
"""

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapilli.base import atomic
from lapilli.base.errors import RunError
from lapilli.recipe.schema import Stage
from lapilli.train.state import complete_checkpoints

MANIFEST = "run.json"
LEFT_OUT = "left_out.jsonl"
_UNTRAINED = {MANIFEST, LEFT_OUT, "index", "recipe.yaml"}
"""Files of a run that has not trained yet: it may start again with another recipe. The index is there where
`data.index` says so."""

_FREE = {
    "train": {
        "tokens_per_micro_batch", "gradient_checkpointing", "train_type", "validate_every", "evaluate", "save_every",
        "keep_checkpoints", "keep_best", "non_finite", "max_skipped_steps",
    },
    "data": {"workers", "max_image_pixels", "max_image_bytes", "train", "validation", "images", "index"},
}  # fmt: skip
"""Keys that may differ when a run goes on. Data files are compared by what they hold, by the index's stamp."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run, and the checkpoint it goes on from (None: from the start)."""

    path: Path
    resume_from: Path | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model"


def run_facts(stage: Stage) -> dict[str, Any]:
    """Return what decides the result of a run, but for its data, as flat dotted keys."""
    whole = stage.model_dump(mode="json")
    facts = {"model": whole["model"], "run.seed": whole["run"]["seed"], "run.precision": whole["run"]["precision"]}
    facts["data.weights"] = [source.weight for source in stage.data.train]
    for section, free in _FREE.items():
        facts |= {f"{section}.{key}": value for key, value in whole[section].items() if key not in free}
    return facts


def is_finished(stage: Stage) -> bool:
    """Whether the stage's folder holds the finished run of the same recipe."""
    folder = Path(str(stage.out))
    return (folder / "model").is_dir() and not _differences(_manifest_facts(folder), run_facts(stage))


def open_folder(stage: Stage, resume: str) -> RunFolder:
    """Decide what happens in the stage's folder, without writing anything.

    `resume`: `auto` goes on where an interrupted run of the same recipe stopped, `never` takes only a folder that is
    new or empty, and a path goes on from that checkpoint. Raises RunError for a folder that holds a finished run,
    another run or something else.
    """
    folder = Path(str(stage.out))
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file; give another folder with out=...")
    present = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    present = [name for name in present if not (name.startswith(".") or _is_empty(folder / name))]
    if set(present) <= _UNTRAINED:
        return RunFolder(folder, None if resume in ("auto", "never") else _checkpoint(Path(resume), stage))
    if (folder / "model").is_dir():
        raise RunError(f"{folder}: holds a finished run; give another folder with out=..., or remove it")
    if not (folder / MANIFEST).is_file():
        raise RunError(f"{folder}: holds other files ({', '.join(present[:3])}) and no run; give another with out=...")
    if resume == "never":
        raise RunError(
            f"{folder}: holds an interrupted run; resume it with --resume auto, or give another with out=..."
        )
    refuse_differences(_manifest_facts(folder), run_facts(stage), str(folder))
    if resume != "auto":
        return RunFolder(folder, _checkpoint(Path(resume), stage))
    complete = complete_checkpoints(folder / "checkpoints")
    return RunFolder(folder, complete[-1] if complete else None)


@contextmanager
def only_writer(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from training in the same folder, until this one leaves or dies.

    Raises RunError if another one is at it. Where the file system has no locks, that is said, and nothing is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as held:
        try:
            # A record lock, because forked data workers, which outlive a killed run by seconds, do not inherit it.
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise RunError(
                f"{folder}: another process is training here; wait for it, or give another out=..."
            ) from error
        except OSError as error:
            say(f"{folder}: its file system has no locks ({error.strerror}); see that nothing else trains there")
        yield


def _is_empty(path: Path) -> bool:
    """The metrics and checkpoints of a run that ended before its first step are no work that could be lost."""
    if path.name == "metrics.jsonl":
        return path.is_file() and path.stat().st_size == 0
    return path.name == "checkpoints" and path.is_dir() and not any(path.iterdir())


def _checkpoint(path: Path, stage: Stage) -> Path:
    if not atomic.is_complete(path):
        raise RunError(
            f"--resume {path}: not a complete checkpoint (give auto, never or a checkpoints/step-... folder)"
        )
    run = path.resolve().parent.parent
    if (run / MANIFEST).is_file():
        refuse_differences(_manifest_facts(run), run_facts(stage), str(path))
    return path


def _manifest_facts(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["facts"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return {}


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return [f"{key}: {there.get(key)} there, {value} now" for key, value in here.items() if there.get(key) != value]


def refuse_differences(there: dict[str, Any], here: dict[str, Any], where: str) -> None:
    """Raise RunError, listing them, if facts of this run differ from those of the run found at `where`."""
    differing = _differences(there, here)
    if differing:
        raise RunError(
            f"{where}: holds a run of another recipe; give another folder with out=..., or its own values:\n  "
            + "\n  ".join(differing)
        )
