"""What the steps of a run are made of, as far as memory and time depend on it.

Where the data are there, this is the run's own plan of its micro-batches, from lengths alone; where they are not, as
when a run on a cluster is planned on a laptop, it is an assumption, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lapilli.data.buckets import Shape, choose_shapes
from lapilli.data.corpus import Corpus
from lapilli.data.loader import TrainLoader
from lapilli.recipe.schema import Stage
from lapilli.train.device.hpu import Hpu
from lapilli.train.parallel.world import World
from lapilli.train.reading import Reading
from lapilli.train.setup import count_steps, training_loader
from lapilli.train.shapes import shapes_of

LOOKED_AT = 64
"""Steps, evenly over an epoch, among which the heaviest micro-batch is looked for."""
ASSUMED_TEXT = 200
ASSUMED_SUPERVISED = 100
"""Tokens of a conversation beside its picture, and how many of them are learned, where the data are not there."""


@dataclass(frozen=True)
class Portion:
    """One conversation of a micro-batch, in tokens; `length` includes those of its pictures."""

    length: int
    supervised: int
    pictures: int


@dataclass(frozen=True)
class Workload:
    """The heaviest micro-batch of one process, and means over the steps of all of them."""

    heaviest: tuple[Portion, ...]
    micro_batches: float
    """Per step and process."""
    tokens_per_step: float
    pictures_per_step: float
    total_steps: int | None
    """None where it depends on data that are not there."""
    positions_per_step: float = 0.0
    """Positions that are computed, padding to fixed shapes included."""
    shape: Shape | None = None
    """What the heaviest micro-batch is padded to, where batches have fixed shapes (`run.static_shapes`)."""
    assumed: str = ""
    """What was assumed for want of data; empty where they were there."""

    @property
    def tokens(self) -> int:
        """Tokens of the heaviest micro-batch."""
        return sum(portion.length for portion in self.heaviest)

    @property
    def positions(self) -> int:
        """Positions of the heaviest micro-batch, padding included."""
        return self.tokens if self.shape is None else self.shape.tokens

    @property
    def pictures(self) -> int:
        """Pictures of the heaviest micro-batch; those of padding too."""
        return self.shape.pictures if self.shape is not None else sum(portion.pictures for portion in self.heaviest)

    @property
    def supervised(self) -> int:
        """Supervised tokens of the heaviest micro-batch."""
        return sum(portion.supervised for portion in self.heaviest)


def planned_shapes(stage: Stage, corpora: Sequence[Corpus]) -> tuple[Shape, ...]:
    """The fixed shapes that a run over these corpora will have on the device that its recipe names."""
    kind = stage.run.device
    return shapes_of(stage, Hpu.static_shapes if kind == "hpu" else 0, kind, corpora)


def planned(stage: Stage, how: Reading, corpus: Corpus, processes: int, shapes: Sequence[Shape] = ()) -> Workload:
    """The workload of a run over `corpus` in so many processes, with batches of these `shapes` if there are any.

    Raises LapilliError as the loader would.
    """
    loader = training_loader(stage, how, corpus, stage.data.train, world=World(0, processes), shapes=shapes)
    total = count_steps(stage, loader.steps_per_epoch)
    looked_at = _spread(min(total, loader.steps_per_epoch))
    plans = [loader.plan(step) for step in looked_at]
    index = corpus.index
    heaviest, shape = max((one for plan in plans for one in plan.orders()), key=lambda one: _weight(loader, *one))
    padded = sum(one.tokens for plan in plans for one in plan.shapes)
    samples = np.concatenate([plan.samples for plan in plans])
    return Workload(
        heaviest=tuple(
            Portion(int(index.lengths[i]), int(index.supervised[i]), int(index.pictures[i])) for i in heaviest
        ),
        micro_batches=sum(len(plan.micro_batches) for plan in plans) / len(plans),
        tokens_per_step=float(index.lengths[samples].sum()) / len(plans),
        pictures_per_step=float(index.pictures[samples].sum()) / len(plans),
        total_steps=total,
        positions_per_step=(padded * processes if shapes else float(index.lengths[samples].sum())) / len(plans),
        shape=shape,
    )


def assumed(stage: Stage, how: Reading, processes: int, why: str) -> Workload:
    """The workload of conversations about one picture each, packed full; `why` the data are not there."""
    train = stage.train
    picture = how.layout.tokens(640, 480)
    length = min(picture + ASSUMED_TEXT, stage.data.max_length)
    each = Portion(length, min(ASSUMED_SUPERVISED, length - 1), 1)
    own = -(-train.global_batch_size // processes)
    at_once = train.micro_batch_size or max(1, train.tokens_per_micro_batch // length)
    shape = None
    if stage.run.static_shapes or (stage.run.static_shapes is None and stage.run.device == "hpu"):
        (shape,) = choose_shapes([length], [1], [each.supervised], train.tokens_per_micro_batch, 1)
        at_once = shape.rows
    micro_batches = -(-own // at_once)
    padded = None if shape is None else float(micro_batches * processes * shape.tokens)
    return Workload(
        heaviest=(each,) * min(own, at_once),
        micro_batches=float(micro_batches),
        tokens_per_step=float(length * train.global_batch_size),
        pictures_per_step=float(train.global_batch_size),
        total_steps=train.max_steps,
        positions_per_step=padded or float(length * train.global_batch_size),
        shape=shape,
        assumed=f"{why}; assumed: one picture ({picture} tokens) and {length - picture} tokens of text in each "
        f"conversation, {each.supervised} of them learned",
    )


def _spread(steps: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, steps - 1, min(steps, LOOKED_AT))})


def _weight(loader: TrainLoader, batch: Sequence[int], shape: Shape | None) -> tuple[int, int, int]:
    if shape is not None:
        return shape.tokens, shape.pictures, shape.targets
    index, chosen = loader.corpus.index, list(batch)
    return (
        int(index.lengths[chosen].sum()),
        int(index.pictures[chosen].sum()),
        int(index.supervised[chosen].sum()),
    )
