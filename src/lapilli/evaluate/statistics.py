"""How sure a number is: intervals by resampling questions, and whether two models differ.

Bootstrap as in Efron & Tibshirani (1993), percentile intervals. Resample k draws the same questions for every model
with the same questions, so that differences between models are paired. Questions are drawn one by one: where many ask
about one picture the true interval is somewhat wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0
_BLOCK = 1 << 17
"""Indices drawn at a time."""


@dataclass(frozen=True, slots=True)
class Difference:
    """B less A, paired by question. Values in the units of the headline (percent)."""

    value: float
    low: float
    high: float
    p: float
    test: str
    """What `p` is: `McNemar, exact` or `sign test` on questions that differ, else `bootstrap`."""
    questions: int
    a_better: int = 0
    b_better: int = 0


def resampled(
    count: int, statistic: Callable[[np.ndarray], float], resamples: int = RESAMPLES, seed: int = SEED
) -> np.ndarray:
    """(resamples,) values of a statistic of `count` questions, each from indices (count,) drawn with replacement."""
    return np.array([statistic(indices) for indices in draws(count, resamples, seed)], dtype=np.float64)


def draws(count: int, resamples: int = RESAMPLES, seed: int = SEED) -> Iterator[np.ndarray]:
    """Indices (count,) of each resample; the same for the same arguments."""
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // max(1, count))
    for start in range(0, resamples, rows):  # the same numbers as one by one, in a fraction of the time
        yield from generator.integers(0, count, (min(rows, resamples - start), count))


def mean_percent(items: np.ndarray) -> Callable[[np.ndarray], float]:
    """The statistic of a score that is the mean of its items (n,), in percent."""
    return lambda indices: 100 * float(items[indices].mean())


def ratio_percent(parts: np.ndarray) -> Callable[[np.ndarray], float]:
    """The statistic of a score that is the ratio of the sums of its parts (n, 2), in percent; NaN over nothing."""

    def ratio(indices: np.ndarray) -> float:
        above, below = parts[indices].sum(0).tolist()
        return 100 * above / below if below else math.nan

    return ratio


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The middle `level` of resampled values (n,); values that are not numbers (a class was not drawn) are left out."""
    kept = values[np.isfinite(values)]
    if not len(kept):
        return math.nan, math.nan
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired(a: np.ndarray, b: np.ndarray) -> Difference:
    """Two models' scores (n,) of the same questions, 0 to 1 each.

    `p` comes from the questions that differ: McNemar's exact test where every score is 0 or 1, else the sign test,
    which is the same arithmetic on who was better.
    """
    values = resampled(len(a), lambda indices: 100 * float((b[indices] - a[indices]).mean()))
    low, high = interval(values)
    better_a, better_b = int((a > b).sum()), int((b > a).sum())
    whole = bool(np.isin(np.concatenate([a, b]), (0.0, 1.0)).all())
    test = "McNemar, exact" if whole else "sign test"
    p = binomial_p(better_a, better_b)
    return Difference(100 * float((b - a).mean()), low, high, p, test, len(a), better_a, better_b)


def paired_resamples(value_a: float, value_b: float, a: np.ndarray, b: np.ndarray, questions: int) -> Difference:
    """Two models' headlines that are no means of items, from their values under the same resamples (k,)."""
    values = b - a
    low, high = interval(values)
    kept = values[np.isfinite(values)]
    tail = min(float((kept <= 0).mean()), float((kept >= 0).mean())) if len(kept) else math.nan
    # A p below what so many resamples can show is not claimed.
    p = min(1.0, max(2 * tail, 1 / (len(kept) + 1))) if len(kept) else math.nan
    return Difference(value_b - value_a, low, high, p, "bootstrap", questions)


def paired_ratios(a: np.ndarray, b: np.ndarray) -> Difference:
    """Two models' headlines that are ratios of sums, from the parts (n, 2) of the same questions."""
    everything = np.arange(len(a))
    first, second = ratio_percent(a), ratio_percent(b)
    return paired_resamples(
        first(everything), second(everything), resampled(len(a), first), resampled(len(b), second), len(a)
    )


def binomial_p(a: int, b: int) -> float:
    """Two-sided exact probability that a fair coin falls at least as unevenly as `a` to `b`; 1 for no tosses."""
    count = a + b
    if not count:
        return 1.0
    terms = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(min(a, b) + 1)]
    return min(1.0, 2 * math.fsum(math.exp(term - count * math.log(2)) for term in terms))
