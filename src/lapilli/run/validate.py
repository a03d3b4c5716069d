"""One of a recipe's stages, and the processes that were started, for the validation loss of a model."""

from __future__ import annotations

import os
from typing import TextIO

from lapilli.base.errors import RecipeError, unknown
from lapilli.recipe.load import LoadedRecipe
from lapilli.train.parallel.world import open_world
from lapilli.train.setup import Say
from lapilli.train.validate import Validation, validate_stage


def validate_recipe(
    recipe: LoadedRecipe, model: str, *, stage: str | None = None, say: Say, stream: TextIO | None = None
) -> Validation | None:
    """Validate `model` on the stage of that name, by default the last; None in all processes but the first.

    Raises RecipeError for a stage that there is not.
    """
    stages = {one.name: one for one in recipe.recipe.stages}
    if stage is not None and stage not in stages:
        raise RecipeError(unknown("--stage", stage, stages))
    chosen = recipe.recipe.stages[-1] if stage is None else stages[stage]
    with open_world() as world, open(os.devnull, "w", encoding="utf-8") as nowhere:
        if world.first:
            return validate_stage(chosen, model, say=say, stream=stream, world=world)
        validate_stage(chosen, model, stream=nowhere, world=world)
        return None
