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
PLAYED, PASSES = 6, 2
"""Steps, and micro-batches of each, of which the sizes are kept one by one."""
_GUESSED = (0.85, 0.95, 0.9, 1.0, 0.97, 1.0)
"""Sizes of micro-batches, against the heaviest, where the data are not there."""


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
    shares: tuple[tuple[float, ...], ...]
    """Positions of each micro-batch against the heaviest, in some steps over an epoch, the heaviest's among them: a
    heap grows when sizes change. Of a step's micro-batches the largest, no more than `PASSES`."""
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
    weighed = [[(_weight(loader, *one), one) for one in plan.orders()] for plan in plans]
    _, (heaviest, shape) = max((one for step in weighed for one in step), key=lambda one: one[0])
    padded = sum(one.tokens for plan in plans for one in plan.shapes)
    samples = np.concatenate([plan.samples for plan in plans])
    return Workload(
        heaviest=tuple(
            Portion(int(index.lengths[i]), int(index.supervised[i]), int(index.pictures[i])) for i in heaviest
        ),
        micro_batches=sum(len(plan.micro_batches) for plan in plans) / len(plans),
        tokens_per_step=float(index.lengths[samples].sum()) / len(plans),
        pictures_per_step=float(index.pictures[samples].sum()) / len(plans),
        shares=_shares([[weight[0] for weight, _ in step] for step in weighed], total),
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
    at_most = min(micro_batches, PASSES)
    padded = None if shape is None else float(micro_batches * processes * shape.tokens)
    return Workload(
        heaviest=(each,) * min(own, at_once),
        micro_batches=float(micro_batches),
        tokens_per_step=float(length * train.global_batch_size),
        pictures_per_step=float(train.global_batch_size),
        shares=tuple((share,) * at_most for share in _GUESSED),
        total_steps=train.max_steps,
        positions_per_step=padded or float(length * train.global_batch_size),
        shape=shape,
        assumed=f"{why}; assumed: one picture ({picture} tokens) and {length - picture} tokens of text in each "
        f"conversation, {each.supervised} of them learned",
    )


def _spread(steps: int, count: int = LOOKED_AT) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, steps - 1, min(steps, count))})


def _shares(steps: Sequence[Sequence[int]], total: int) -> tuple[tuple[float, ...], ...]:
    """`Workload.shares` of steps of which the positions of each micro-batch are given, in a run of `total` steps."""
    heaviest = max(range(len(steps)), key=lambda step: max(steps[step]))
    chosen = _spread(len(steps), PLAYED)
    if heaviest not in chosen:
        chosen[min(range(len(chosen)), key=lambda place: abs(chosen[place] - heaviest))] = heaviest
    most = max(1, *steps[heaviest])
    kept = []
    for step in chosen:
        own = steps[step]
        largest = sorted(sorted(range(len(own)), key=lambda place: own[place])[-PASSES:])
        kept.append(tuple(own[place] / most for place in largest))
    # A short epoch comes again and again.
    return tuple(kept[step % len(kept)] for step in range(max(len(kept), min(total, PLAYED))))


def _weight(loader: TrainLoader, batch: Sequence[int], shape: Shape | None) -> tuple[int, int, int]:
    if shape is not None:
        return shape.tokens, shape.pictures, shape.targets
    index, chosen = loader.corpus.index, list(batch)
    return (
        int(index.lengths[chosen].sum()),
        int(index.pictures[chosen].sum()),
        int(index.supervised[chosen].sum()),
    )
