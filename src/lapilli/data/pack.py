"""From the Examples of one step to Batches without padding.

Bins are planned from lengths alone, before a picture is read. Nothing leaves its step: what a step learns does not
depend on the token budget, only memory does.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch

from lapilli.base.errors import DataError
from lapilli.data.sample import IGNORE, Batch, Example, Pixels

VISION = "vision"
"""Name of the vision encoder in `Batch.images`."""

_PATIENCE = 32
"""Full bins looked at before another number of bins is tried; bounds the time per sample."""


class ExampleTooLong(DataError):
    """One Example alone is longer than a micro-batch may be. `position` is its place in the step."""

    def __init__(self, position: int, length: int, budget_tokens: int, where: str = "") -> None:
        self.position, self.length, self.budget_tokens = position, length, budget_tokens
        super().__init__(
            f"{where or f'example {position} of the step'}: {length:,} tokens are more than "
            f"tokens_per_micro_batch {budget_tokens:,}; raise it, or lower max_length"
        )


def plan_step(lengths: Sequence[int], budget_tokens: int, costs: Sequence[float] | None = None) -> list[list[int]]:
    """Bin the Examples of one step, given by length in tokens, into micro-batches of at most `budget_tokens`.

    Returns positions: each of 0 to len(lengths)-1 exactly once, rising within a bin, bins in order of their first.
    The number of bins is the smallest for which dealing the longest first to the cheapest bin that has room succeeds,
    and never more than best-fit-decreasing needs; `costs` (default: the lengths) is what is balanced.
    Raises ExampleTooLong.
    """
    if not len(lengths):
        return []
    sizes = [int(length) for length in lengths]
    for position, length in enumerate(sizes):
        if length > budget_tokens:
            raise ExampleTooLong(position, length, budget_tokens)
    weights = sizes if costs is None else [float(cost) for cost in costs]
    longest_first = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    fitted = _best_fit(longest_first, sizes, budget_tokens)
    fewest = max(1, -(-sum(sizes) // budget_tokens))
    bins = next(
        (
            dealt
            for count in range(fewest, len(fitted) + 1)
            if (dealt := _deal(longest_first, sizes, weights, budget_tokens, count)) is not None
        ),
        fitted,
    )
    _even_out(bins, sizes, weights, budget_tokens)
    return sorted((sorted(b) for b in bins), key=lambda b: b[0])


def _best_fit(order: Sequence[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit-decreasing: each Example goes to the bin that it fills best, else to a new one."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for item in order:
        place = bisect_left(rooms, (sizes[item], -1))
        if place == len(rooms):
            bins.append([item])
            insort(rooms, (budget - sizes[item], len(bins) - 1))
            continue
        room, target = rooms.pop(place)
        bins[target].append(item)
        insort(rooms, (room - sizes[item], target))
    return bins


def _deal(
    order: Sequence[int], sizes: Sequence[int], weights: Sequence[float], budget: int, count: int
) -> list[list[int]] | None:
    """Deal to the cheapest of `count` bins that has room; None when an Example finds none."""
    bins: list[list[int]] = [[] for _ in range(count)]
    rooms = [budget] * count
    heap: list[tuple[float, int]] = [(0.0, i) for i in range(count)]
    for item in order:
        full: list[tuple[float, int]] = []
        while heap and rooms[heap[0][1]] < sizes[item]:
            full.append(heapq.heappop(heap))
            if len(full) > _PATIENCE:
                return None
        if not heap:
            return None
        cost, target = heap[0]
        bins[target].append(item)
        rooms[target] -= sizes[item]
        heapq.heapreplace(heap, (cost + weights[item], target))
        for entry in full:
            heapq.heappush(heap, entry)
    return [b for b in bins if b]


def _even_out(bins: list[list[int]], sizes: Sequence[int], weights: Sequence[float], budget: int) -> None:
    """Swap Examples between the costliest and the cheapest bin, in place, while that narrows the gap.

    Dealing leaves bins about one small Example apart; swapping pairs brings them within a fraction of that.
    """
    costs = [sum(weights[i] for i in b) for b in bins]
    room = [budget - sum(sizes[i] for i in b) for b in bins]
    for _ in range(2 * len(bins)):
        high, low = costs.index(max(costs)), costs.index(min(costs))
        gap = costs[high] - costs[low]
        swap = _best_swap(bins[high], sorted(bins[low], key=weights.__getitem__), weights, gap)
        if swap is None:
            return
        given, taken = swap
        tokens = sizes[given] - sizes[taken]
        if not -room[high] <= tokens <= room[low]:
            return
        bins[high].remove(given)
        bins[low].remove(taken)
        bins[high].append(taken)
        bins[low].append(given)
        costs[high] -= weights[given] - weights[taken]
        costs[low] += weights[given] - weights[taken]
        room[high] += tokens
        room[low] -= tokens


def _best_swap(high: Sequence[int], low: Sequence[int], weights: Sequence[float], gap: float) -> tuple[int, int] | None:
    """The pair (from `high`, from `low`, which is sorted by weight) whose exchange moves closest to half of `gap`."""
    lighter = [weights[i] for i in low]
    best: tuple[float, int, int] | None = None
    for given in high:
        place = bisect_left(lighter, weights[given] - gap / 2)
        for taken in low[max(0, place - 1) : place + 1]:
            moved = weights[given] - weights[taken]
            miss = abs(moved - gap / 2)
            if 0 < moved < gap and (best is None or miss < best[0]):
                best = (miss, given, taken)
    return None if best is None else (best[1], best[2])


def consecutive(n: int, micro_batch_size: int) -> list[list[int]]:
    """Micro-batches of `micro_batch_size` consecutive positions, never re-binned; the last may be shorter."""
    return [list(range(i, min(n, i + micro_batch_size))) for i in range(0, n, micro_batch_size)]


def pack(examples: Sequence[Example], tiles: Sequence[torch.Tensor] = ()) -> Batch:
    """Lay Examples end to end in the given order; no padding, and no Example is split.

    `tiles` holds one uint8 tensor (tiles, C, H, W) per image slot, in order of Examples and their slots. The label of
    each Example's first position is -100: nothing before it predicts it. Raises ValueError if slots and tiles differ
    in number.
    """
    slots = [slot for example in examples for slot in example.images]
    if len(slots) != len(tiles):
        raise ValueError(f"{len(slots)} image slots and {len(tiles)} pictures")
    lengths = [example.length for example in examples]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    labels = np.concatenate([example.labels for example in examples]).astype(np.int64)
    labels[starts[:-1]] = IGNORE
    images = {}
    if slots:
        images[VISION] = Pixels(
            tiles=torch.cat(list(tiles)),
            tiles_per_image=torch.tensor([len(t) for t in tiles], dtype=torch.int64),
            sizes=torch.tensor([(slot.width, slot.height) for slot in slots], dtype=torch.int64),
        )
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([example.input_ids for example in examples]).astype(np.int64)),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])),
        cu_seqlens=torch.from_numpy(starts),
        images=images,
        ids=tuple(example.id for example in examples),
    )
