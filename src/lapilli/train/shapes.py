"""The few shapes that a run's batches come in, where a device compiles a program for every shape that it meets.

They are chosen before training, from the lengths of all data that the run will read, training and held-out alike.
"""

from collections.abc import Sequence

import numpy as np

from lapilli.base.errors import RecipeError, RunError
from lapilli.data.buckets import Shape, choose_shapes, padding, plan_shapes
from lapilli.data.corpus import Corpus
from lapilli.recipe.schema import Stage
from lapilli.train.device.choose import Device

MOST_COMPILED = 8
"""Programs that torch.compile makes of one function before it goes on without compiling."""


def fixed_shapes(stage: Stage, device: Device, corpora: Sequence[Corpus]) -> tuple[Shape, ...]:
    """Return the shapes of a run over these corpora; none where batches are packed, to whatever length they have.

    Raises RecipeError for settings that leave no choice of shapes, and for conversations longer than a micro-batch.
    """
    shapes = shapes_of(stage, device.static_shapes, device.name, corpora)
    if shapes and device.static_shapes and stage.run.compile and (count := _count(stage, 0)) > MOST_COMPILED:
        raise RunError(f"run.static_shapes: {count} with run.compile: torch.compile keeps at most {MOST_COMPILED}")
    return shapes


def shapes_of(stage: Stage, usual: int, where: str, corpora: Sequence[Corpus]) -> tuple[Shape, ...]:
    """As `fixed_shapes`, for a kind of device, `where`, that has `usual` shapes if the recipe does not say how many."""
    count = _count(stage, usual)
    if not count:
        return ()
    if stage.train.loss_reduction == "microbatch_mean":
        raise RecipeError(
            f"run.static_shapes ({count} on {where}) and train.loss_reduction: microbatch_mean exclude each "
            "other: micro-batches of consecutive samples have any shape; use loss_reduction: tokens"
        )
    lengths, pictures, supervised = (
        np.concatenate([getattr(corpus.index, name) for corpus in corpora])
        for name in ("lengths", "pictures", "supervised")
    )
    return choose_shapes(lengths, pictures, supervised, stage.train.tokens_per_micro_batch, count)


def _count(stage: Stage, usual: int) -> int:
    return usual if stage.run.static_shapes is None else stage.run.static_shapes


def describe_shapes(shapes: Sequence[Shape], corpus: Corpus, step_samples: int) -> str:
    """One line: the shapes, and how much of a step is padding, by the first conversations."""
    index = corpus.index
    first = slice(0, step_samples)
    lengths, pictures, supervised = (
        column[first].tolist() for column in (index.lengths, index.pictures, index.supervised)
    )
    share = padding(lengths, plan_shapes(lengths, pictures, supervised, shapes))
    listed = ", ".join(f"{s.rows} x {s.length:,} ({s.pictures} pictures)" for s in shapes)
    return f"batches of {len(shapes)} fixed shapes, rows x tokens: {listed}; about {share:.0%} padding"
