"""A recipe's stages planned in order: what each needs, before anything is loaded or trained.

A stage that starts from the model of an earlier one is planned with the folder that the first of them starts from:
training changes weights, not their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from lapilli.base.errors import ModelError
from lapilli.base.progress import Progress
from lapilli.recipe.load import LoadedRecipe
from lapilli.recipe.schema import Source, Stage
from lapilli.train.plan.machine import Machine
from lapilli.train.plan.plan import CHECKPOINTING, StagePlan, plan_stage
from lapilli.train.plan.workload import Workload, assumed, planned, planned_shapes
from lapilli.train.reading import Reading, read_corpus, read_description, reading


def plan_recipe(
    recipe: LoadedRecipe,
    machine: Machine,
    processes: int,
    *,
    say: Callable[[str], None] = lambda _line: None,
    stream: TextIO | None = None,
) -> Iterator[StagePlan]:
    """Plan every stage; data that are there are indexed, for others a mixture is assumed, which the plan says.

    Raises LapilliError for what can't be trained.
    """
    started: dict[str | None, str] = {}
    made: dict[str | None, Reading] = {}
    for stage in recipe.recipe.stages:
        before = made.get(stage.model)
        origin = started[stage.out] = started.get(stage.model, str(stage.model))
        if before is None and not Path(str(stage.model)).exists():
            raise ModelError(f"stage {stage.name}: {stage.model}: no such folder; `lapilli build` makes it")
        known = (before.exported, before.tokenizer) if before else read_description(str(stage.model))
        how = made[stage.out] = reading(stage, *known)
        say(f"stage {stage.name}")
        workload = _workload(stage, how, processes, stream)
        with Progress("tracing a step", len(CHECKPOINTING), stream=stream) as progress:
            yield plan_stage(stage, how, origin, workload, machine, processes, progress)


def _workload(stage: Stage, how: Reading, processes: int, stream: TextIO | None) -> Workload:
    absent = _absent(stage.data.train)
    if absent:
        return assumed(stage, how, processes, f"{absent[0]} is not there")
    if not stage.data.train:
        return assumed(stage, how, processes, "data.train names nothing")
    corpora = [read_corpus(stage.data.train, stage, how, True, stream)]
    if stage.data.validation and not _absent(stage.data.validation):
        corpora.append(read_corpus(stage.data.validation, stage, how, True, stream))  # fixed shapes are for it too
    return planned(stage, how, corpora[0], processes, planned_shapes(stage, corpora))


def _absent(sources: Sequence[Source]) -> list[str]:
    return [source.path for source in sources if "{" not in source.path and not Path(source.path).exists()]
