"""A step as it is planned, from lengths alone, and as it is when its data are there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lapilli.data.buckets import Shape
from lapilli.data.quarantine import BadRecord
from lapilli.data.sample import Batch


@dataclass(frozen=True)
class StepPlan:
    """What a step is made of: `samples` in order, those of them that are this rank's `own`, and its micro-batches.

    All are numbers in the corpus; a mixture may visit one more than once. All ranks have as many micro-batches: an
    empty one keeps a rank in step that has nothing left to do. `shapes` are those of the micro-batches, where they are
    fixed.
    """

    step: int
    epoch: int
    samples: tuple[int, ...]
    own: tuple[int, ...]
    micro_batches: tuple[tuple[int, ...], ...]
    shapes: tuple[Shape, ...] = ()

    def orders(self) -> Iterator[tuple[tuple[int, ...], Shape | None]]:
        """What is asked of the workers: the Samples of each micro-batch, and its shape if that is fixed."""
        return zip(self.micro_batches, self.shapes or [None] * len(self.micro_batches), strict=True)


@dataclass(frozen=True)
class Step:
    """One optimiser step's data. `wait_seconds` is how long the consumer waited for it.

    `samples` are those of all ranks, `ids` name those planned for this one; Samples in quarantine are in none of the
    `batches`, and `bad` names the ones found in this step.
    """

    step: int
    epoch: int
    samples: tuple[int, ...]
    ids: tuple[str, ...]
    batches: list[Batch]
    wait_seconds: float
    bad: tuple[BadRecord, ...] = ()
