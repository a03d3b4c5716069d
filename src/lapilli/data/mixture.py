"""Which samples an epoch of a mixture has, by the weights of its sources.

Weight w visits every sample of a source as often as the whole part of w says, and a share of them once more. The share
is chosen by a number drawn for (seed, epoch, id): nothing about it has to be saved, and every epoch has the same size.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from lapilli.base.errors import RecipeError

_DOMAIN = np.array([0, 0, 0, 1], dtype=np.uint64)
"""Where the draws start in the generator's stream, far from those that shuffle the epoch."""


def source_sizes(sources: np.ndarray, weights: Sequence[float]) -> list[tuple[int, int]]:
    """How an epoch visits each source: (whole passes, samples visited once more).

    `sources` (n,) holds each sample's source, a place in `weights`. Raises RecipeError for a weight so small that none
    of a source's samples is left.
    """
    sizes = []
    for place, (weight, n) in enumerate(zip(weights, np.bincount(sources, minlength=len(weights)), strict=True)):
        # The weight as it is written: 0.29 of 100 samples are 29, though the nearest double is a little less.
        exact = Fraction(str(float(weight)))
        passes = int(exact)
        extra = int((exact - passes) * int(n) + Fraction(1, 2))
        if n and not passes and not extra:
            raise RecipeError(
                f"data.train.{place}.weight: {weight:g} of its {n:,} samples is less than one of them; "
                "raise it, or remove the source"
            )
        sizes.append((passes, extra))
    return sizes


def epoch_size(sources: np.ndarray, weights: Sequence[float]) -> int:
    """How many samples every epoch has, those that come again included. Raises RecipeError as `source_sizes`."""
    counts = np.bincount(sources, minlength=len(weights))
    sizes = source_sizes(sources, weights)
    return sum(passes * int(n) + extra for (passes, extra), n in zip(sizes, counts, strict=True))


def epoch_samples(ids: np.ndarray, sources: np.ndarray, weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """Return the numbers (m,) int64 of the samples that epoch `epoch` visits, pass by pass, rising within a pass.

    `ids` (n,) are distinct whole numbers from 0 that name the samples, such as `DataIndex.kept`; `sources` (n,) are
    their sources. With weight 1 everywhere the result is 0 to n-1. Raises RecipeError as `source_sizes`.
    """
    sizes = source_sizes(sources, weights)
    visits = np.array([passes for passes, _ in sizes], dtype=np.int64)[sources]
    if any(extra for _, extra in sizes):
        drawn = _draw(ids, seed, epoch)
        for place, (_, extra) in enumerate(sizes):
            members = np.flatnonzero(sources == place)
            visits[members[np.argsort(drawn[members], kind="stable")[:extra]]] += 1
    passes = [np.flatnonzero(visits > p) for p in range(int(visits.max(initial=0)))]
    return np.concatenate(passes) if passes else np.zeros(0, dtype=np.int64)


def _draw(ids: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A number (n,) uint64 for each id: the id-th of a counter-based generator, whose raw stream NumPy promises."""
    if not len(ids):
        return np.zeros(0, dtype=np.uint64)
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=_DOMAIN).random_raw(int(ids.max()) + 1)[ids]
