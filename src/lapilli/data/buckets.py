"""Static shapes for devices that compile a graph per shape: every batch is padded to one of a few.

The shapes are chosen once for a corpus, from its lengths alone; each step is then cut into batches of these shapes such
that as little as possible is computed for nothing. Nothing here reads a sample or touches a device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lapilli.base.errors import DataError, RecipeError

SPARE_TARGETS = 1.25
"""Room for supervised tokens over what full rows have on average: batches are seldom cut short for want of it."""

Counts = Sequence[int] | np.ndarray
"""One number per sample."""


@dataclass(frozen=True, order=True)
class Shape:
    """A padded batch: `rows` sequences of `length` tokens, with room for `pictures` pictures, and for `targets` tokens
    that give a loss."""

    length: int
    rows: int
    pictures: int
    targets: int

    @property
    def tokens(self) -> int:
        """Positions that are computed, filled or not."""
        return self.rows * self.length


@dataclass(frozen=True)
class PaddedBatch:
    """Positions in the step, one row each, longest first, and the Shape that they are padded to."""

    positions: tuple[int, ...]
    shape: Shape


def choose_shapes(
    lengths: Counts, pictures: Counts, supervised: Counts, budget_tokens: int, count: int, *, multiple: int = 64
) -> tuple[Shape, ...]:
    """Choose at most `count` shapes of at most `budget_tokens` tokens for samples of these lengths (n,) in tokens, of
    which `supervised` (n,) give a loss.

    Lengths are multiples of `multiple`, and those for which padding each sample to the next one adds the fewest tokens.
    Each shape has as many rows as the budget allows. It has room for a picture per row, or for all of the sample of its
    length that has the most, or for none where no sample of its length has any; and for somewhat more than the
    supervised tokens that its rows have on average, or for all of one sample. Raises RecipeError if the longest sample,
    rounded up, is over the budget.
    """
    if count < 1 or multiple < 1:
        raise ValueError("count and multiple are at least 1")
    given, images, targets = (np.asarray(one, dtype=np.int64) for one in (lengths, pictures, supervised))
    if not len(given):
        return ()
    rounded = -(-given // multiple)
    if int(rounded.max()) * multiple > budget_tokens:
        raise RecipeError(
            f"the longest sample has {int(given.max()):,} tokens, {int(rounded.max()) * multiple:,} as a multiple of "
            f"{multiple}: more than tokens_per_micro_batch {budget_tokens:,}; raise it, or lower max_length"
        )
    ends = _best_cuts(np.bincount(rounded), count)
    shapes = []
    for start, end in zip([-1, *ends], ends, strict=False):
        inside = (rounded > start) & (rounded <= end)
        rows = budget_tokens // (end * multiple)
        most = int(images[inside].max())
        usual = math.ceil(float(targets[inside].mean()) * rows * SPARE_TARGETS)
        room = -(-max(usual, int(targets[inside].max()), 1) // multiple) * multiple
        shape = Shape(end * multiple, rows, max(rows, most) if most else 0, min(room, rows * end * multiple))
        shapes.append(shape)
    assert len(shapes) <= count
    return tuple(shapes)


def _best_cuts(histogram: np.ndarray, count: int) -> list[int]:
    """At most `count` rising lengths, the last the longest there is, that pad the least.

    `histogram[n]` samples have length n. Exact, by dynamic programming over the lengths that occur.
    """
    present = np.flatnonzero(histogram)
    samples = np.concatenate([[0], np.cumsum(histogram[present])])
    # cost[k][j]: padded tokens of the first j lengths with k + 1 shapes, the last of which is present[j - 1].
    cost = samples[1:] * present
    chosen = [np.zeros(len(present), dtype=np.int64)]
    for _ in range(min(count, len(present)) - 1):
        table = np.full((len(present), len(present)), np.iinfo(np.int64).max)
        for last in range(1, len(present)):
            table[last, :last] = cost[:last] + (samples[last + 1] - samples[1 : last + 1]) * present[last]
        better, before = table.min(axis=1), table.argmin(axis=1)
        chosen.append(np.where(better < cost, before, -1))
        cost = np.minimum(better, cost)
    cuts, last = [], len(present) - 1
    for before in reversed(chosen[1:]):
        if before[last] >= 0:
            cuts.append(last)
            last = int(before[last])
    return [int(present[i]) for i in reversed([*cuts, last])]


def plan_shapes(
    lengths: Sequence[int], pictures: Sequence[int], supervised: Sequence[int], shapes: Sequence[Shape]
) -> list[PaddedBatch]:
    """Cut one step, given by lengths in tokens, pictures and supervised tokens, into batches of the given shapes.

    Every position comes exactly once; neighbours in length share a batch. Among all such plans the one that computes
    the fewest positions is returned, costliest batches first. Raises DataError for a sample that fits no shape.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    # best[i]: (positions computed from the i-th longest on, where the next batch starts, its shape)
    best: list[tuple[int, int, Shape | None]] = [(0, len(order), None)] * (len(order) + 1)
    for i in reversed(range(len(order))):
        options = []
        for shape in shapes:
            if lengths[order[i]] <= shape.length:
                stop = _fill(order, i, pictures, supervised, shape)
                if stop > i:
                    options.append((shape.tokens + best[stop][0], stop, shape))
        if not options:
            one = order[i]
            raise DataError(
                f"example {one} of the step: {lengths[one]:,} tokens, {pictures[one]} pictures and {supervised[one]:,} "
                f"supervised tokens fit no shape; the largest is {max(shapes, default=None)}"
            )
        best[i] = min(options, key=lambda option: (option[0], option[1]))
    batches, i = [], 0
    while i < len(order):
        _, stop, shape = best[i]
        assert shape is not None
        batches.append(PaddedBatch(tuple(order[i:stop]), shape))
        i = stop
    assert len({batch.shape for batch in batches}) <= len(shapes)
    return sorted(batches, key=lambda batch: -batch.shape.tokens)


def _fill(order: Sequence[int], start: int, pictures: Sequence[int], supervised: Sequence[int], shape: Shape) -> int:
    """Where a batch of this shape that starts with the `start`-th longest sample is full."""
    stop, images, targets = start, 0, 0
    while stop < len(order) and stop - start < shape.rows:
        images += pictures[order[stop]]
        targets += supervised[order[stop]]
        if images > shape.pictures or targets > shape.targets:
            break
        stop += 1
    return stop


def padding(lengths: Sequence[int], batches: Sequence[PaddedBatch]) -> float:
    """Part of all computed positions that no sample fills."""
    computed = sum(batch.shape.tokens for batch in batches)
    return 1 - sum(lengths) / computed if computed else 0.0
