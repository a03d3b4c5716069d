"""What packing, balancing and static shapes cost and spare, on lengths like those of LLaVA's 665K mixture.

    python benchmarks/data_packing.py                            # synthetic lengths, seeded
    python benchmarks/data_packing.py --index RUN/index/index-*  # the lengths of your own data, from its index

Prints imbalance (1 - mean / max cost over ranks and micro-steps; a picture costs what `--image-cost` says, in tokens),
padding (computed positions that no sample fills), both together on average and in the worst step, and the processor
time to plan per sample. Nothing is decoded or tokenised. The last, shorter step of an epoch is left out.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lapilli.data.buckets import Shape, choose_shapes, padding, plan_shapes
from lapilli.data.order import epoch_order
from lapilli.data.pack import consecutive, plan_step
from lapilli.data.ranks import imbalance, plan_ranks, sample_costs


def llava_like(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths in tokens and pictures of `n` samples: 94 % with one picture of 576 tokens, 6 % long text, cut at 2048.

    The shape of the 665K mixture: many short answers to questions about a picture, a long tail of conversations.
    """
    rng = np.random.default_rng(seed)
    with_picture = 576 + 40 + np.minimum(rng.lognormal(4.7, 0.9, n), 1432)
    text_only = 40 + np.minimum(rng.lognormal(6.6, 0.8, n), 2008)
    pictures = (rng.random(n) >= 0.06).astype(np.int64)
    return np.where(pictures > 0, with_picture, text_only).astype(np.int64), pictures


def steps_of(n: int, size: int, lengths: np.ndarray, pictures: np.ndarray, order: str) -> list[np.ndarray]:
    """The full steps of epoch 0."""
    visited = epoch_order(n, 42, 0, order, lengths=lengths, pictures=pictures, batch_size=size)
    return [visited[start : start + size] for start in range(0, n - size + 1, size)]


def timed(plan: Callable[..., Any], *given: Any) -> tuple[Any, float]:
    """Return what `plan` gives and the processor time it takes, in seconds."""
    start = time.process_time()
    made = plan(*given)
    return made, time.process_time() - start


def row(what: str, waste: Sequence[float], padded: Sequence[float], microseconds: float | None = None) -> None:
    """Print one line of the table; what was not measured stays empty."""
    total = [1 - (1 - a) * (1 - b) for a, b in zip(waste or [0.0] * len(padded), padded, strict=True)]
    parts = [waste and statistics.mean(waste), padded and statistics.mean(padded)]
    parts += [total and statistics.mean(total), max(total, default=None)]
    cells = "".join(f"{part:>10.2%}" if isinstance(part, float) else f"{'':>10}" for part in parts)
    print(f"{what:<40}{cells}" + ("" if microseconds is None else f"{microseconds:>12.1f}"))


def measure_ranks(steps: Sequence[np.ndarray], lengths: np.ndarray, costs: np.ndarray, ranks: int, budget: int) -> None:
    """Packed, shared out by cost."""
    waste, seconds = [], 0.0
    for step in steps:
        cost = costs[step].tolist()
        plan, took = timed(plan_ranks, lengths[step].tolist(), budget, ranks, cost)
        waste.append(imbalance(plan, cost))
        seconds += took
    samples = sum(len(step) for step in steps)
    row(f"packed, {ranks} ranks, {budget:,} tokens", waste, [0.0] * len(waste), seconds / samples * 1e6)


def measure_classical(steps: Sequence[np.ndarray], lengths: np.ndarray, ranks: int, micro_batch_size: int) -> None:
    """What a loader that pads consecutive samples to the longest of each micro-batch computes."""
    waste, padded = [], []
    for step in steps:
        longest = [
            [int(lengths[step[b]].max()) * len(b) for b in consecutive(len(step), micro_batch_size)[rank::ranks]]
            for rank in range(ranks)
        ]
        cells = [cost for mine in longest for cost in mine]
        waste.append(1 - statistics.mean(cells) / max(cells))
        padded.append(1 - int(lengths[step].sum()) / sum(cells))
    row(f"padded, {ranks} ranks, {micro_batch_size} samples in a row", waste, padded)


def measure_shapes(
    steps: Sequence[np.ndarray], columns: Sequence[np.ndarray], shapes: Sequence[Shape], what: str
) -> None:
    """Static shapes on one device; `columns` are lengths, pictures and supervised tokens."""
    padded, seconds, used = [], 0.0, set()
    for step in steps:
        given, *more = (column[step].tolist() for column in columns)
        batches, took = timed(plan_shapes, given, *more, shapes)
        padded.append(padding(given, batches))
        used |= {batch.shape for batch in batches}
        seconds += took
    samples = sum(len(step) for step in steps)
    row(f"{len(used)} static shapes, {what}", [], padded, seconds / samples * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, help="a folder made by lapilli with lengths.npy and pictures.npy")
    parser.add_argument("--samples", type=int, default=25_600)
    parser.add_argument("--step", type=int, default=128, help="samples per step")
    parser.add_argument("--budget", type=int, default=8192, help="tokens per micro-batch")
    parser.add_argument("--image-cost", type=float, default=10.0, help="cost of encoding a picture, in tokens")
    given = parser.parse_args()
    if given.index is not None:
        lengths, pictures = (np.load(given.index / f"{name}.npy").astype(np.int64) for name in ("lengths", "pictures"))
    else:
        lengths, pictures = llava_like(given.samples, 0)
    # Of text, two tokens in three are supervised.
    columns = lengths, pictures, np.maximum(1, (lengths - 576 * pictures) * 2 // 3)
    costs = np.array(sample_costs(lengths, pictures, given.image_cost))
    low, middle, high = np.percentile(lengths, [1, 50, 99]).astype(int)
    print(
        f"{len(lengths):,} samples, {lengths.mean():,.0f} tokens on average (1 %: {low:,}, 50 %: {middle:,}, "
        f"99 %: {high:,}, longest {lengths.max():,}), {(pictures == 0).mean():.1%} text-only\n"
        f"{given.step} samples per step, a picture costs {given.image_cost:g} tokens\n"
    )
    print(f"{'':<40}{'imbalance':>10}{'padding':>10}{'both':>10}{'worst':>10}{'us/sample':>12}")
    shuffled = steps_of(len(lengths), given.step, lengths, pictures, "shuffled")
    for ranks in (1, 8, 16):
        measure_ranks(shuffled, lengths, costs, ranks, given.budget)
    measure_classical(shuffled, lengths, 8, 4)
    for count in (2, 4, 8):
        shapes = choose_shapes(*columns, given.budget, count)
        measure_shapes(shuffled, columns, shapes, "shuffled")
    grouped = steps_of(len(lengths), given.step, lengths, pictures, "length_groups")
    measure_shapes(grouped, columns, choose_shapes(*columns, given.budget, 8), "length_groups")
    for size in (128, 4096):
        lists = [lengths[start : start + size].tolist() for start in range(0, len(lengths) - size + 1, size)]
        seconds = sum(timed(plan_step, one, given.budget)[1] for one in lists)
        row(f"bin packer alone, {size} samples", [], [], seconds / (len(lists) * size) * 1e6)


if __name__ == "__main__":
    main()
