"""From the Examples of one step to Batches without padding.

Bins are planned from lengths alone, before a picture is read. Nothing leaves its step: what a step learns does not
depend on the token budget, only memory does.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lapilli.base.errors import DataError
from lapilli.data.sample import IGNORE, Batch, Example, Pixels

VISION = "vision"
"""Name of the vision encoder in `Batch.images`."""

_PATIENCE = 32
"""Full bins looked at before another number of bins is tried; bounds the time per sample."""
_CHEAPEST = 4
"""Bins that the costliest one tries to exchange Examples with."""
_EVEN = 0.002
"""Part of the costliest bin's cost by which the others may stay behind it."""


class ExampleTooLong(DataError):
    """One Example alone is longer than a micro-batch may be. `position` is its place in the step."""

    def __init__(self, position: int, length: int, budget_tokens: int, where: str = "") -> None:
        self.position, self.length, self.budget_tokens = position, length, budget_tokens
        super().__init__(
            f"{where or f'example {position} of the step'}: {length:,} tokens are more than "
            f"tokens_per_micro_batch {budget_tokens:,}; raise it, or lower max_length"
        )


def plan_step(
    lengths: Sequence[int], budget_tokens: int, costs: Sequence[float] | None = None, *, multiple: int = 1
) -> list[list[int]]:
    """Bin the Examples of one step, given by length in tokens, into micro-batches of at most `budget_tokens`.

    Returns positions: each of 0 to len(lengths)-1 exactly once, rising within a bin, bins in order of their first.
    The number of bins is the smallest `multiple` for which dealing the longest first to the cheapest bin that has room
    succeeds, and never more than best-fit-decreasing needs, rounded up; `costs` (default: the lengths) is what is
    balanced. Only with fewer Examples than bins are some bins empty; they come last. Raises ExampleTooLong.
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
    fewest = _round_up(max(1, -(-sum(sizes) // budget_tokens)), multiple)
    most = _round_up(len(fitted), multiple)
    dealt = (_deal(longest_first, sizes, weights, budget_tokens, count) for count in range(fewest, most + 1, multiple))
    bins = next((bins for bins in dealt if bins is not None), None)
    bins = _fill_up(fitted, most) if bins is None else _fill_up([b for b in bins if b], len(bins))
    _even_out(bins, sizes, weights, budget_tokens)
    return sorted((sorted(b) for b in bins), key=lambda b: b[0] if b else len(sizes))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _fill_up(bins: list[list[int]], count: int) -> list[list[int]]:
    """Bring bins to `count` by taking one Example at a time from the fullest for each new one, while any has two."""
    bins = [list(b) for b in bins]
    while len(bins) < count:
        fullest = max(bins, key=len)
        bins.append([fullest.pop()] if len(fullest) > 1 else [])
    return bins


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
    return bins


def _even_out(bins: list[list[int]], sizes: Sequence[int], weights: Sequence[float], budget: int) -> None:
    """Move and swap Examples between the costliest and the cheapest bins, in place, while that narrows the gap.

    Dealing leaves bins about one small Example apart; swapping pairs brings them within a fraction of that.
    """
    costs = [sum(weights[i] for i in b) for b in bins]
    rooms = [budget - sum(sizes[i] for i in b) for b in bins]
    for _ in range(2 * len(bins)):
        high = costs.index(max(costs))
        if costs[high] - min(costs) <= _EVEN * costs[high]:
            return
        for low in (costs.index(min(costs)), *_cheapest(costs)):
            found = _best_change(bins, rooms, costs[high] - costs[low], high, low, sizes, weights)
            if found is not None:
                break
        else:
            return
        given, taken = found
        cost, tokens = weights[given], sizes[given]
        bins[high].remove(given)
        bins[low].append(given)
        if taken is not None:
            cost, tokens = cost - weights[taken], tokens - sizes[taken]
            bins[low].remove(taken)
            bins[high].append(taken)
        costs[high] -= cost
        costs[low] += cost
        rooms[high] += tokens
        rooms[low] -= tokens


def _cheapest(costs: Sequence[float]) -> Iterator[int]:
    """The cheapest bins but the first, looked for only where that one has nothing to exchange."""
    yield from heapq.nsmallest(_CHEAPEST, range(len(costs)), key=costs.__getitem__)[1:]


def _best_change(
    bins: Sequence[Sequence[int]],
    rooms: Sequence[int],
    gap: float,
    high: int,
    low: int,
    sizes: Sequence[int],
    weights: Sequence[float],
) -> tuple[int, int | None] | None:
    """What bin `high` gives `low`, and takes back (None: nothing), to move closest to half of `gap`; None if nothing.

    Both bins keep their budget, and `high` keeps an Example.
    """
    others = sorted(bins[low], key=weights.__getitem__)
    lighter = [weights[i] for i in others]
    best: tuple[float, int, int | None] | None = None
    for given in bins[high]:
        place = bisect_left(lighter, weights[given] - gap / 2)
        partners: list[int | None] = [*others[max(0, place - 1) : place + 1]]
        if place == 0 and len(bins[high]) > 1:
            partners.append(None)
        for taken in partners:
            moved = weights[given] - (0 if taken is None else weights[taken])
            tokens = sizes[given] - (0 if taken is None else sizes[taken])
            miss = abs(moved - gap / 2)
            fits = -rooms[high] <= tokens <= rooms[low]
            if fits and 0 < moved < gap and (best is None or miss < best[0]):
                best = (miss, given, taken)
    return None if best is None else best[1:]


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
        weights=_weights(examples, labels),
    )


def _weights(examples: Sequence[Example], labels: np.ndarray) -> torch.Tensor | None:
    """Weights (T,) of the labels; None if every one counts 1."""
    if all(example.weights is None for example in examples):
        return None
    parts = np.concatenate([example_weights(example) for example in examples])
    return torch.from_numpy(np.where(labels == IGNORE, 0.0, parts).astype(np.float32))


def example_weights(example: Example) -> np.ndarray:
    """How much each label (T,) of an Example counts."""
    return np.ones(example.length, dtype=np.float32) if example.weights is None else example.weights
