"""A recipe's stages in order, as one piece of work.

The data of every stage is checked before the first one trains: a missing picture of the second stage must not be found
after a day of the first. A stage that is finished already is not repeated, so that the same command carries on a
recipe of several stages wherever it was stopped.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TextIO

from lapilli.assemble.skeleton import skeleton
from lapilli.base.errors import RecipeError, RunError
from lapilli.recipe.files import check_files
from lapilli.recipe.load import LoadedRecipe
from lapilli.recipe.schema import Stage
from lapilli.run.evaluation import follow
from lapilli.train.folder import is_finished, open_folder
from lapilli.train.parallel.world import World, open_world
from lapilli.train.reading import read_corpus, read_description, reading
from lapilli.train.run import Outcome, train_stage
from lapilli.train.setup import Say, describe_corpus, describe_parts, make_trainable


def run_recipe(
    recipe: LoadedRecipe,
    *,
    resume: str = "auto",
    dry_run: bool = False,
    say: Say = lambda _line: None,
    stream: TextIO | None = None,
) -> Outcome:
    """Train every stage of a recipe that is not finished yet; see `train_stage`. Returns the last one's outcome.

    Where torchrun or SLURM started several processes, they train together, and only the first one speaks. Raises
    RunError if all stages are finished, or if `resume` names a checkpoint and there are several stages.
    """
    with open_world() as world, open(os.devnull, "w", encoding="utf-8") as nowhere:
        if world.first:
            return _run_stages(recipe, resume, dry_run, say, stream, world)
        return _run_stages(recipe, resume, dry_run, lambda _line: None, nowhere, world)


def _run_stages(
    recipe: LoadedRecipe, resume: str, dry_run: bool, say: Say, stream: TextIO | None, world: World
) -> Outcome:
    stages = recipe.recipe.stages
    several = len(stages) > 1
    if several and resume not in ("auto", "never"):
        raise RunError("--resume: name a checkpoint only with a recipe of one stage; auto finds each stage's own")
    finished = world.from_first(lambda: [s.name for s in stages if several and resume == "auto" and is_finished(s)])
    for stage in stages:
        if stage.name in finished:
            say(f"stage {stage.name} is finished already ({stage.out})")
    waiting = [stage for stage in stages if stage.name not in finished]
    if not waiting:
        raise RunError(f"{stages[-1].out}: all stages are finished; give another folder with out=...")
    with world.together():
        followed = {stage.name: follow(stage, say) for stage in waiting}
        world.from_first(lambda: check_later_stages(waiting, resume, say, stream, write_index=not dry_run))
    outcome = Outcome(0, 0)
    for stage in waiting[:1] if dry_run else waiting:
        if several:
            say(f"stage {stage.name}")
        outcome = train_stage(
            stage,
            recipe.stage_origins(stage.name),
            resume=resume,
            dry_run=dry_run,
            say=say,
            stream=stream,
            evaluate=followed[stage.name],
            world=world,
        )
        if outcome.stopped_by:
            nothing_left = stage is waiting[-1] and outcome.finished
            if outcome.finished and not nothing_left:
                say(f"stopped by {outcome.stopped_by} before the next stage; the same command goes on with it")
            return replace(outcome, stopped_by=None) if nothing_left else outcome
    return outcome


def check_later_stages(stages: list[Stage], resume: str, say: Say, stream: TextIO | None, *, write_index: bool) -> None:
    """Check folders, data and what trains of the stages after the first, whose model need not be there yet.

    A stage's model is described by the stage that makes it. Raises LapilliError as `train_stage` would.
    """
    if len(stages) < 2:
        return
    check_files(stages)
    started = {stages[0].out: str(stages[0].model)}
    made = {stages[0].out: reading(stages[0], *read_description(str(stages[0].model)))}
    for stage in stages[1:]:
        open_folder(stage, "auto" if resume == "auto" else "never")
        before = made.get(stage.model)
        start = (before.exported, before.tokenizer) if before else read_description(str(stage.model))
        # Every stage changes weights only, so the model that the first of a chain starts from has its names.
        origin = started[stage.out] = started.get(stage.model, str(stage.model))
        try:
            how = made[stage.out] = reading(stage, *start)
            model = skeleton(origin, how.spec)
            parts = None if model is None else make_trainable(model, stage, how)
        except RecipeError as error:
            raise RecipeError(f"stage {stage.name}: {error}") from error
        for what, sources in (("training", stage.data.train), ("validation", stage.data.validation)):
            if sources:
                corpus = read_corpus(sources, stage, how, write_index, stream)
                say(describe_corpus(f"{what} data of stage {stage.name}", corpus))
        if parts is not None:
            say(describe_parts(parts))
