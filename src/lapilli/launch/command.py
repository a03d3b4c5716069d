"""What every launcher starts, and what is checked before anything waits in a queue.

A recipe's mistakes are told at once, without torch: a job that waits a night and ends at its first line is the dearest
way to find a typo.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from lapilli.base.errors import RecipeError
from lapilli.recipe.files import check_files
from lapilli.recipe.load import LoadedRecipe

SAVE_SECONDS = 300
"""How long before its end a run is asked to stop, and how long launchers wait for what it saves."""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What torchrun hands on to the processes that it started."""


def train_words(recipe: str, overrides: Sequence[str]) -> list[str]:
    """The words after `lapilli`: the same command begins a run and goes on with it."""
    return ["train", recipe, *overrides, "--resume", "auto"]


def shell(words: Sequence[str]) -> str:
    """Words as a line for a shell."""
    return shlex.join(words)


def check_launch(loaded: LoadedRecipe, processes: int, *, here: bool = True) -> list[str]:
    """Return what a user should know before a launch.

    Raises RecipeError for what several processes can't do, and, where its files are `here`, for a model that is not
    there; DataError for data files that are not there.
    """
    stages = loaded.recipe.stages
    if processes < 1:
        raise RecipeError(f"{processes} processes: a run needs one at least")
    for stage in stages:
        if processes > 1 and stage.run.engine == "single":
            raise RecipeError(f"run.engine: single is for one process, but {processes} would be started; use auto")
    if here:
        check_files(stages)
        made: set[str | None] = set()
        for stage in stages:
            if stage.model not in made and not Path(str(stage.model)).exists():
                raise RecipeError(f"{stage.model}: no such model folder; `lapilli build` makes one")
            made.add(stage.out)
    return [
        f"{where(stage.name, len(stages))}train.save_every is not set: a run that is killed, not asked to stop, begins "
        "again from its first step"
        for stage in stages
        if stage.train.save_every is None
    ]


def where(name: str, stages: int) -> str:
    """How a message begins that is about one stage: with its name, if there are others."""
    return f"stage {name}: " if stages > 1 else ""
